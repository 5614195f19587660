"""The loops of examples/loops: short, without the engine, and with the numbers of the command line, bit for bit."""

import ast
import importlib.util
from pathlib import Path

import pytest

LOOPS = Path(__file__).parents[2] / "examples" / "loops"
NAMES = ("sft", "dpo", "grpo")
STEPS = 4
REWARDS = "def spread(completions):\n    return [sum(map(ord, one)) % 5 / 4 for one in completions]\n"


def load(path: Path):
    spec = importlib.util.spec_from_file_location(f"module_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def question(i: int) -> str:
    return f"{i} + {i * 7 % 11}" + " please" * (i % 3) + " ="


def pair(i: int) -> dict:
    right, wrong = i + i * 7 % 11, i + 1 + i * 5 % 7
    return {"prompt": question(i), "chosen": f" {right}" + "!" * (i % 4), "rejected": f" {wrong}" + " or so" * (i % 2) + "?"}


@pytest.fixture
def command(tiny, here, tune, kit):
    """command("sft", ...) -> records of the steps and of the evaluations of a run."""

    def run(name: str, *args) -> list[dict]:
        common = ["--model", tiny.model, "--max-steps", STEPS, "--sample-prompt=", "--output-dir", "run"]
        done = tune(name, *common, *args)
        assert done.code == 0, done.err
        return kit.metrics(here / "run")

    return run


def same_numbers(records: list[dict], history: list[dict], *, but: tuple[str, ...] = ()) -> int:
    """Assert that steps and the last evaluation of both agree in all that both have; how many numbers were compared."""
    count = 0
    for prefix, kind in (("train/loss", "loss"), ("eval/", "eval/")):
        ours = [record for record in history if any(key.startswith(kind) for key in record)]
        theirs = [record for record in records if any(key.startswith(prefix) for key in record)]
        ours, theirs = (ours, theirs) if kind == "loss" else ([ours[0], ours[-1]], [theirs[0], theirs[-1]])
        assert [one["step"] for one in ours] == [one["step"] for one in theirs] and ours
        for one, other in zip(ours, theirs, strict=True):
            other = other | ({"loss": other["train/loss"]} if kind == "loss" else {})
            names = [name for name in one if name in other and name not in but]
            assert {name: one[name] for name in names} == {name: other[name] for name in names}
            count += len(names)
    return count


TOTALS = ("num_tokens",)  # of a step in the loops, of all steps so far in the records of a run


def test_sft_has_the_numbers_of_the_command(tiny, here, kit, command):
    records = command("sft", "--data", tiny.chat, "--sequence-len", 128)
    history = load(LOOPS / "sft.py").train(str(tiny.model), str(tiny.chat), "out", steps=STEPS, sequence_len=128)
    assert same_numbers(records, history, but=TOTALS) >= 4 * 8
    assert kit.same(*(kit.tensors(here / name / "adapter_model.safetensors") for name in ("out", "run/adapter")))


def test_dpo_has_the_numbers_of_the_command(tiny, here, kit, command):
    kit.write_rows(here / "pairs.jsonl", [pair(i) for i in range(20)])
    records = command("dpo", "--data", "pairs.jsonl", "--sequence-len", 128, "--learning-rate", 0.01)
    history = load(LOOPS / "dpo.py").train(str(tiny.model), "pairs.jsonl", "out", steps=STEPS, sequence_len=128, learning_rate=0.01)
    assert same_numbers(records, history, but=TOTALS) >= 4 * 14
    assert kit.same(*(kit.tensors(here / name / "adapter_model.safetensors") for name in ("out", "run/adapter")))


def test_grpo_has_the_numbers_of_the_command(tiny, here, kit, command):
    kit.write_rows(here / "prompts.jsonl", [{"prompt": question(i)} for i in range(20)])
    (here / "rewards.py").write_text(REWARDS)
    sizes = ["--num-generations", 4, "--max-completion-length", 6, "--val-set-size", 4, "--learning-rate", 0.01]
    records = command("grpo", "--data", "prompts.jsonl", "--reward-funcs", "rewards.py:spread", *sizes, "--no-skip-zero-advantage-batches")
    loop, spread = load(LOOPS / "grpo.py"), load(here / "rewards.py").spread
    options = {"generations": 4, "max_tokens": 6, "learning_rate": 0.01}
    history = loop.train(str(tiny.model), "prompts.jsonl", "out", spread, steps=STEPS, **options)
    assert same_numbers(records, history, but=TOTALS) >= 4 * 12
    assert kit.same(*(kit.tensors(here / name / "adapter_model.safetensors") for name in ("out", "run/adapter")))


@pytest.mark.parametrize("name", NAMES)
def test_a_loop_is_short_and_takes_nothing_of_the_engine(name):
    text = (LOOPS / f"{name}.py").read_text()
    assert len(text.splitlines()) < 90
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    whole = {f"{node.module}.{alias.name}" for node in imports for alias in node.names}
    assert not [one for one in whole if one.startswith(("treetune.cli", "treetune.core.run"))]
