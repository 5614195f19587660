"""Moments in 8 bits learn as those in float32 do: the real model, 20 steps each, side by side."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "examples" / "data" / "gsm8k_train_sample.jsonl"
RUN = [
    "--data", str(DATA), "--max-rows", "60", "--val-set-size", "8", "--sequence-len", "192", "--micro-batch-size", "1",
    "--gradient-accumulation-steps", "1", "--dtype", "float32", "--max-steps", "20", "--seed", "1", "--sample-prompt", "",
]  # fmt: skip


RATES = {"adamw": "5e-4", "lion": "1e-4"}  # a step of lion is of one size in all weights, which takes a smaller rate


def losses(folder: Path, optimizer: str, rate: str) -> list[float]:
    """The held-out losses of a run."""
    named = ["--optimizer", optimizer, "--learning-rate", rate, "--output-dir", str(folder)]
    done = subprocess.run([sys.executable, "-m", "treetune.cli.main", "sft", *RUN, *named], capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    records = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["eval/loss"] for record in records if "eval/loss" in record]


@pytest.mark.slow
@pytest.mark.parametrize("name", RATES)
def test_eight_bits_learn_as_float32(name, tmp_path):
    small, plain = (losses(tmp_path / kind, kind, RATES[name]) for kind in (f"{name}_8bit", name))
    assert plain[-1] < plain[0], plain
    assert small[-1] <= 1.01 * plain[-1], (small, plain)
