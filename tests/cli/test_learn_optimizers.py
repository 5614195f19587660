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


def losses(folder: Path, optimizer: str) -> list[float]:
    """The held-out losses of a run."""
    named = ["--optimizer", optimizer, "--learning-rate", "5e-4", "--output-dir", str(folder)]
    done = subprocess.run([sys.executable, "-m", "treetune.cli.main", "sft", *RUN, *named], capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    records = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["eval/loss"] for record in records if "eval/loss" in record]


@pytest.mark.slow
def test_eight_bits_learn_as_float32(tmp_path):
    small, plain = (losses(tmp_path / name, name) for name in ("adamw_8bit", "adamw"))
    assert plain[-1] < plain[0], plain
    assert small[-1] <= 1.01 * plain[-1], (small, plain)
