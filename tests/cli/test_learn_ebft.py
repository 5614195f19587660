"""Energy-based fine-tuning on the real model and real text: rollouts of held-out text must come nearer to it, at no cost in likelihood."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "examples" / "data"
STRIDED = [
    "--mode", "strided", "--data", str(DATA / "shakespeare_sample.jsonl"), "--max-rows", "48", "--sequence-len", "128",
    "--val-set-size", "4", "--max-steps", "10", "--micro-batch-size", "2", "--gradient-accumulation-steps", "2",
    "--learning-rate", "2e-4", "--ce-coef", "0.03", "--sample-prompt", "", "--seed", "1",
]  # fmt: skip


def evaluations(tmp_path, *options: str) -> list[dict]:
    """The evaluations of a run, first and last among them."""
    run = tmp_path / "run"
    line = [sys.executable, "-m", "treetune.cli.main", "ebft", *options, "--output-dir", str(run)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    records = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "eval/loss" in record]


@pytest.mark.slow
def test_strided_rollouts_come_nearer_to_held_out_text(tmp_path):
    held = evaluations(tmp_path, *STRIDED)
    first, last = held[0], held[-1]
    assert last["eval/ebft/cfm_loss"] < first["eval/ebft/cfm_loss"], (first, last)
    assert last["eval/ebft/ce_loss"] <= first["eval/ebft/ce_loss"], (first, last)
