"""Every method on a tiny random model of each family that is trained most: three steps, what they begin at, and what they leave."""

import importlib.util
import math
import signal
from pathlib import Path

import pytest
import torch

from treetune.models import plain_model

spec = importlib.util.spec_from_file_location("architectures", Path(__file__).parents[1] / "models" / "architectures.py")
architectures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(architectures)

STEPS = 3
VOCABULARY = 260  # the tokenizer has 259
FAMILIES = (
    "gemma3_text", "gpt_oss", "qwen3_moe", "phi3", "deepseek_v3", "glm4", "qwen3_5_text", "qwen3_5_moe_text", "nemotron_h",
)  # fmt: skip
FULL = ("--adapter", "none", "--learning-rate", 1e-3)
METHODS = {
    "sft": ["sft", "--data", "text.jsonl", "--val-data", "text.jsonl", "--sequence-len", 96, "--micro-batch-size", 8],
    "dpo": ["dpo", "--data", "pairs.jsonl", "--val-data", "pairs.jsonl", "--sequence-len", 96, "--micro-batch-size", 4],
    "reward": ["reward", "--data", "pairs.jsonl", "--val-data", "pairs.jsonl", "--sequence-len", 96, "--micro-batch-size", 4],
    "grpo": [
        "grpo", "--data", "prompts.jsonl", "--reward-funcs", "rewards.py:spread", "--num-generations", 4, "--max-completion-length", 6,
        "--num-completions-to-print", 0, "--micro-batch-size", 2,
    ],
    "ebft": [
        "ebft", "--mode", "strided", "--data", "text.jsonl", "--max-rows", 3, "--sequence-len", 24, "--stride", 8, "--context-length", 4,
        "--generate-max-len", 3, "--n-samples-per-prompt", 2, "--micro-batch-size", 1,
    ],
}  # fmt: skip
WITH_REFERENCE = ("--beta", 0.1, "--sync-ref-model", "--ref-model-sync-steps", 1)
LORA = ["--lora-r", 4, "--learning-rate", 0.01]
RUNS = {name: (name, LORA) for name in METHODS} | {"sft, full": ("sft", FULL)}
EXPERTS = ["--lora-r", 4, "--learning-rate", 0.05, "--lora-target-modules", "experts", "o_proj"]
ON_EXPERTS = {f"{name}, experts": (name, EXPERTS) for name in ("sft", "grpo")}
# Routers of these choose by a bias beside their logits, a buffer of the file that no gradient reaches.
BIASED = ("deepseek_v3", "nemotron_h")
WHOLE = {
    "dpo, full": ("dpo", FULL), "reward, full": ("reward", FULL), "ebft, full": ("ebft", FULL),
    "grpo, full": ("grpo", [*FULL, *WITH_REFERENCE]),
}  # fmt: skip
QUANTISED = {f"{name}, nf4": (name, [*LORA, "--quant", "nf4"]) for name in METHODS}
SHAPES = ("phi3", "qwen3_moe", "glm4", "qwen3_5_text")  # shared rows in the files, experts, transformers' modules, one document at a time
WITH_EXPERTS = ("gpt_oss", "qwen3_moe", "deepseek_v3", "qwen3_5_moe_text", "nemotron_h")
FAST = {("gemma3_text", "sft"), ("qwen3_moe", "dpo"), ("glm4", "grpo"), ("qwen3_moe", "grpo, nf4")}


def marks(*case: str) -> list:
    return [] if case in FAST else [pytest.mark.slow]


SOME = ((FAMILIES, RUNS), (WITH_EXPERTS, ON_EXPERTS), (BIASED, WHOLE), (SHAPES, QUANTISED))
PAIRS = [(family, run) for families, runs in SOME for family in families for run in runs]
CASES = [pytest.param(*case, marks=marks(*case), id="-".join(case)) for case in PAIRS]
RUNS |= ON_EXPERTS | WHOLE | QUANTISED


def text(i: int) -> dict:
    return {"text": f"Line {i}. " + "the cat sat. " * (1 + i % 4)}


def pair(i: int) -> dict:
    return {"prompt": f"{i} + {i * 7 % 11} =", "chosen": f" {i + i * 7 % 11}" + "!" * (i % 4), "rejected": f" {i + 1}?"}


def prompt(i: int) -> dict:
    return {"prompt": f"{i} + {i * 7 % 11} ="}


def biases(tensors: dict) -> dict:
    """By which routers choose and which no gradient reaches."""
    return {name: leaf for name, leaf in tensors.items() if name.endswith("e_score_correction_bias")}


@pytest.fixture(scope="session")
def folder(kit, tmp_path_factory):
    """folder(family) -> its model, saved by transformers with the tokenizer of the tests, once per session."""
    root, saved = tmp_path_factory.mktemp("families"), {}

    def save(family: str) -> Path:
        if family not in saved:
            saved[family] = root / family
            config = architectures.tiny(family)
            config.vocab_size, config.max_position_embeddings = VOCABULARY, 256
            config.bos_token_id, config.eos_token_id, config.pad_token_id = None, 256, 257
            model = architectures.build(family, config=config)
            chosen_by = biases(model.state_dict())
            assert bool(chosen_by) == (family in BIASED)
            for i, bias in enumerate(chosen_by.values()):
                bias.copy_(0.2 * torch.randn(bias.shape, generator=torch.Generator().manual_seed(i)))
            model.save_pretrained(saved[family])
            kit.tokenizer().save_pretrained(saved[family])
        return saved[family]

    return save


@pytest.fixture
def train(kit, here, tune, folder):
    """train(family, run, ...) -> Done; the arguments follow those of the run."""
    (here / "rewards.py").write_text("def spread(completions):\n    return [sum(map(ord, one)) % 5 / 4 for one in completions]\n")
    for name, row in (("text", text), ("pairs", pair), ("prompts", prompt)):
        kit.write_rows(here / f"{name}.jsonl", [row(i) for i in range(8)])

    def run(family, name, *args, by=tune):
        return by(*arguments(folder(family), name, *args))

    return run


def arguments(model: Path, name: str, *args) -> list:
    method, own = RUNS[name]
    shared = {"--model": model, "--max-steps": STEPS, "--output-dir": "run"} | dict(zip(args[::2], args[1::2], strict=True))
    silent = ["--sample-prompt="] if method != "reward" else []
    return [*METHODS[method], *own, *silent, *(part for option in shared.items() for part in option)]


def trained(kit, root) -> list[dict]:
    return [record for record in kit.metrics(root) if "train/loss" in record]


def left(kit, root, step: int) -> tuple:
    """All that a finished run leaves, without what the clock decides."""
    state, weights, records = kit.left(root, step)
    return state, weights, [{key: value for key, value in record.items() if key != "rollout/seconds"} for record in records]


def printed(done, name: str) -> float:
    assert done.code == 0, done.err
    line = next(line for line in done.out.splitlines() if line.startswith(name))
    return float(line.split()[1])


def plain_loss(kit, model: Path) -> float:
    """Of transformers' own model on the texts, each with the token that ends it."""
    tokens = [[*kit.tokenizer()(text(i)["text"]).input_ids, 256] for i in range(8)]
    with torch.no_grad():
        return plain_model.loss(plain_model.load(model), tokens).item()


def check_sft(kit, root: Path, model: Path, tune, *, quantised: bool) -> None:
    """Step 1 holds all rows, so its loss is that of transformers; what is saved evaluates as the run ended."""
    gap = abs(trained(kit, root)[0]["train/loss"] - plain_loss(kit, model))
    assert 1e-4 < gap < 0.5 if quantised else gap <= 1e-5
    last = [record["eval/loss"] for record in kit.metrics(root) if "eval/loss" in record][-1]
    saved = ["--adapter", root] if (root / "adapter").exists() else ["--model", root / "model"]
    assert printed(tune("eval", *saved, "--data", "text.jsonl", "--sequence-len", 96), "loss") == pytest.approx(last, abs=5e-6)


def check_reward(kit, root: Path, model: Path, tune) -> None:
    """The margin of the saved model is that of the last evaluation."""
    done = tune("score", root, "--data", "pairs.jsonl", "--sequence-len", 96, "--output", "scores.jsonl")
    assert done.code == 0, done.err
    scores = kit.metrics(Path(), "scores.jsonl")
    margin = sum(score["chosen_score"] - score["rejected_score"] for score in scores) / len(scores)
    last = [record["eval/margin"] for record in kit.metrics(root) if "eval/loss" in record][-1]
    assert margin == pytest.approx(last, abs=1e-5)


def check_written(kit, root: Path, model: Path, tune) -> None:
    """What is written is what transformers computes from it: an adapter is merged first."""
    if (root / "adapter").exists():
        own = printed(tune("eval", "--adapter", root, "--data", "text.jsonl", "--sequence-len", 96), "loss")
        merged = tune("merge", root, "merged")
        assert merged.code == 0, merged.err
        written = Path("merged")
    else:
        own = printed(tune("eval", "--model", root / "model", "--data", "text.jsonl", "--sequence-len", 96), "loss")
        written = root / "model"
    assert plain_loss(kit, written) == pytest.approx(own, abs=1e-5)
    assert abs(own - plain_loss(kit, model)) > 1e-3, "the run has changed nothing"
    before, after = (biases(plain_model.load(path).state_dict()) for path in (model, written))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) and before[name].any() for name in before)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("family", "run"), CASES)
def test_three_steps(family, run, kit, here, tune, train, folder):
    """Losses are finite and begin where they must; what is saved evaluates as the run ended."""
    done = train(family, run)
    assert done.code == 0, done.err
    records = trained(kit, here / "run")
    assert len(records) == STEPS and all(
        math.isfinite(value) for record in records for value in record.values() if isinstance(value, float)
    )
    assert all(record["grad_norm"] > 0 for record in records)
    root, model, method = here / "run", folder(family), RUNS[run][0]
    if method == "reward":
        return check_reward(kit, root, model, tune)
    if method == "sft":
        check_sft(kit, root, model, tune, quantised="nf4" in run)
    if method == "dpo":
        assert records[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    if method == "grpo":
        apart = [record["sampling/sampling_logp_difference/max"] for record in records]
        assert max(apart) <= 5e-5, "the sampler's log-probs are the trainer's"
    check_written(kit, root, model, tune)


KILLED = [
    ("qwen3_moe", "sft"), ("gemma3_text", "grpo"), ("glm4", "dpo"), ("qwen3_5_text", "sft"), ("qwen3_5_text", "dpo"),
    ("deepseek_v3", "sft, full"), ("qwen3_moe", "grpo, experts"), ("gpt_oss", "grpo, experts"), ("deepseek_v3", "grpo, experts"),
    ("qwen3_moe", "grpo, nf4"), ("glm4", "sft, nf4"), ("phi3", "dpo, nf4"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("family", "run"), [pytest.param(*case, id="-".join(case)) for case in KILLED])
def test_killed_run_resumes_bit_for_bit(family, run, kit, here, tune, train, folder, forked):
    """Killed after the weights of step 4 have changed, with a checkpoint of step 2."""
    args = ["--max-steps", 5, "--save-steps", 2] + (["--lora-dropout", 0.2] if run in METHODS else [])
    assert train(family, run, *args, "--output-dir", "whole").code == 0
    killed = arguments(folder(family), run, *args)
    assert forked(kit.die_at(4), *killed).code == -signal.SIGKILL
    assert trained(kit, here / "run")[-1]["step"] < 5
    done = tune(*killed, "--resume", "auto")
    assert done.code == 0, done.err
    one, other = left(kit, here / "whole", 5), left(kit, here / "run", 5)
    assert kit.same(one[0], other[0]) and kit.same(one[1], other[1]) and one[2] == other[2]
