"""Adapters on a base in 4 bits learn as those on the base as it is: the real model, 40 steps each, side by side.

In the dtype of the machine, as bfloat16 takes minutes a step on CPUs that do not multiply in it.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "examples" / "data"
COMMON = ["--max-steps", "40", "--seed", "1", "--sample-prompt", "", "--gradient-accumulation-steps", "1"]
CHATS, PAIRS, TEXT = (str(DATA / f"{name}_sample.jsonl") for name in ("gsm8k_train", "gsm8k_preference", "shakespeare"))
RUNS = {
    "sft": [
        "--data", CHATS, "--val-set-size", "20", "--micro-batch-size", "2", "--learning-rate", "1e-3",
        "--lora-r", "64", "--lora-alpha", "64",
    ],
    "dpo": ["--data", PAIRS, "--val-set-size", "16", "--micro-batch-size", "1", "--learning-rate", "1e-4"],
    "ebft": [
        "--mode", "strided", "--data", TEXT, "--max-rows", "48", "--sequence-len", "64", "--stride", "16", "--val-set-size", "3",
        "--micro-batch-size", "2", "--learning-rate", "2e-4", "--ce-coef", "0.1", "--lora-r", "64", "--lora-alpha", "64",
    ],
    "grpo": [
        "--data", CHATS, "--reward-funcs", "digits", "--num-generations", "8", "--max-completion-length", "16", "--micro-batch-size", "2",
        "--learning-rate", "5e-4",
    ],
}  # fmt: skip
# The weights of this model are numbers of 4 bits already (Q4_1), which nf4 rounds again: held-out loss 1.569 instead of 1.269. An adapter
# of rank 16 that starts at nothing heals six sevenths of that in 40 steps (0.822 against 0.780); one of 64 that starts by QERA has the loss
# of the base before training (1.337 against 1.352) and 2.7 % more after it (0.809 against 0.788), by LoftQ 2.8 %; EBFT 4.417 and 4.438.
QERA = ["--lora-init", "qera", "--lora-init-rows", "48"]
STARTS = {"sft": QERA, "ebft": QERA}
MEASURES = {"sft": "eval/loss", "dpo": "eval/loss", "ebft": "eval/ebft/ce_loss", "grpo": "reward"}


def measured(folder: Path, method: str, quant: str) -> list[float]:
    """The held-out losses of a run, or its rewards by step."""
    start = STARTS.get(method, []) if quant != "none" else []
    options = [*COMMON, *RUNS[method], *start, "--quant", quant, "--output-dir", str(folder)]
    line = [sys.executable, "-m", "treetune.cli.main", method, *options]
    done = subprocess.run(line, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    records = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record[MEASURES[method]] for record in records if MEASURES[method] in record]


@pytest.mark.slow
@pytest.mark.parametrize("method", RUNS)
def test_four_bits_learn_as_the_base_does(tmp_path, method):
    small, plain = (measured(tmp_path / quant, method, quant) for quant in ("nf4", "none"))
    if method == "grpo":
        assert all(statistics.mean(rewards[-5:]) > statistics.mean(rewards[:5]) + 0.3 for rewards in (small, plain)), (small, plain)
        return
    assert small[-1] < small[0] and plain[-1] < plain[0], (small, plain)
    assert small[-1] <= 1.03 * plain[-1], (small, plain)
