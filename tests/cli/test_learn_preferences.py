"""Every preference and reward method on the real model and data: minutes of training must show on rows held out by prompt."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "examples" / "data"
PAIRS, JUDGED, STEPS = (str(DATA / f"gsm8k_{name}_sample.jsonl") for name in ("preference", "binary", "steps"))
COMMON = ["--max-steps", "12", "--val-set-size", "32", "--dtype", "bfloat16", "--micro-batch-size", "2", "--seed", "1"]
ANSWERS = ["--sample-prompt", ""]


def trained(tmp_path, command: str, *options: str) -> list[dict]:
    """The evaluations of a run, first and last among them."""
    run = tmp_path / "run"
    line = [sys.executable, "-m", "treetune.cli.main", command, *COMMON, *options, "--output-dir", str(run)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    records = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "eval/loss" in record]


# command, options, the metric, how high it may start, how high it must end; thresholds lie well inside what was measured
LEARNING = {
    "dpo": (["dpo", "--data", PAIRS, *ANSWERS, "--learning-rate", "2e-4"], "rewards/accuracies", 0.0, 0.6),
    "ipo": (["dpo", "--loss", "ipo", "--data", PAIRS, *ANSWERS, "--learning-rate", "2e-4"], "rewards/accuracies", 0.0, 0.6),
    "kto": (["kto", "--data", JUDGED, *ANSWERS, "--learning-rate", "4e-4"], "rewards/margins", 0.0, 0.02),
    "orpo": (["orpo", "--data", PAIRS, *ANSWERS, "--learning-rate", "4e-4"], "rewards/accuracies", 0.6, 0.6),
    "simpo": (["simpo", "--data", PAIRS, *ANSWERS, "--learning-rate", "2e-4"], "rewards/accuracies", 0.6, 0.6),
    "cpo": (["cpo", "--data", PAIRS, *ANSWERS, "--learning-rate", "2e-4"], "rewards/accuracies", 0.6, 0.6),
    "reward": (["reward", "--data", PAIRS, "--learning-rate", "2e-4"], "accuracy", 0.6, 0.65),
    "prm": (["prm", "--data", STEPS, "--learning-rate", "4e-4"], "accuracy", 0.6, 0.6),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNING)
def test_minutes_of_training_show_on_held_out_rows(tmp_path, name):
    options, metric, start, end = LEARNING[name]
    held = trained(tmp_path, *options)
    first, last = held[0][f"eval/{metric}"], held[-1][f"eval/{metric}"]
    assert first <= start and last >= end and last > first, (first, last)
    assert held[-1]["eval/loss"] < held[0]["eval/loss"]
