"""The main job on the real model and data: a minute of training must show on held-out rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_minute_of_the_quickstart_lowers_the_held_out_loss_by_a_tenth(tmp_path):
    run = tmp_path / "run"
    rows = str(ROOT / "examples" / "data" / "gsm8k_train_sample.jsonl")
    options = ["--data", rows, "--max-rows", "100", "--val-set-size", "10", "--max-steps", "10", "--learning-rate", "5e-4"]
    command = [sys.executable, "-m", "treetune.cli.main", "sft", *options, "--sample-tokens", "40", "--output-dir", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held = [record["eval/loss"] for record in records if "eval/loss" in record]
    assert held[-1] < 0.9 * held[0], held
    answers = [json.loads(line)["answer"] for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(answers) == 2 and answers[0] != answers[1]
