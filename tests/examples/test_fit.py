"""examples/fit.py: the runs of the command line from Python, to the bit, in at most 25 lines each."""

import ast
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "examples" / "fit.py"
REWARDS = "def spread(completions):\n    return [sum(map(ord, one)) % 5 / 4 for one in completions]\n"
SFT = {"sequence_len": 128, "lora_r": 4}
DPO = {"sequence_len": 128, "learning_rate": 0.01}
GRPO = {"num_generations": 4, "max_completion_length": 6, "val_set_size": 4, "learning_rate": 0.01, "lora_r": 4}


@pytest.fixture
def rows(tiny, here, kit):
    """Rows of each method, in files of the working folder."""
    kit.write_rows(here / "pairs.jsonl", [{"prompt": f"{i} +", "chosen": f" {i}!", "rejected": f" {i + 1}?"} for i in range(20)])
    kit.write_rows(here / "prompts.jsonl", [{"prompt": f"{i} + {i * 7 % 11} ="} for i in range(20)])
    (here / "rewards.py").write_text(REWARDS)
    return {"sft": tiny.chat, "dpo": "pairs.jsonl", "grpo": "prompts.jsonl"}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("method", "options"), [("sft", SFT), ("dpo", DPO), ("grpo", GRPO)])
def test_a_call_has_the_numbers_of_the_command(method, options, tiny, here, kit, tune, rows, monkeypatch, capsys):
    monkeypatch.syspath_prepend(FILE.parent)
    import fit

    common = options | {"max_steps": 4, "sample_prompt": ""}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in common.items()]
    more = ["--reward-funcs", "rewards.py:spread"] if method == "grpo" else []
    assert tune(method, "--model", tiny.model, "--data", rows[method], "--output-dir", "command", *flags, *more).code == 0
    reward = {"reward": "rewards.py:spread"} if method == "grpo" else {}
    result = getattr(fit, method)(str(tiny.model), str(rows[method]), output_dir="python", **common, **reward)
    assert capsys.readouterr().out.count("step ") == 4, "the tracker prints each step"
    one, other = (kit.left(here / name, 4) for name in ("command", "python"))
    assert kit.same(one[0], other[0]) and kit.same(one[1], other[1])
    timed = ("rollout/seconds",)
    numbers = [[{key: value for key, value in record.items() if key not in timed} for record in side] for side in (one[2], other[2])]
    assert numbers[0] == numbers[1] and result.folder.name == "python"


def test_a_call_takes_25_lines_at_most():
    functions = {
        node.name: node.end_lineno - node.lineno + 1 for node in ast.parse(FILE.read_text()).body if isinstance(node, ast.FunctionDef)
    }
    assert all(lines + functions["curve"] <= 25 for name, lines in functions.items())
