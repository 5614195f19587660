"""`treetune ebft` in structured mode against a real server: replies come from there, features are the trainer's own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from treetune.core.rollout import server as servers

pytestmark = pytest.mark.vllm
ROWS = str(Path(__file__).parents[2] / "examples" / "data" / "humaneval_sample.jsonl")


def test_replies_of_a_server_are_compared_while_the_next_are_sampled(tmp_path):
    line = [
        sys.executable, "-m", "treetune.cli.main", "ebft", "--data", ROWS, "--num-generations", "4", "--max-completion-length", "16",
        "--micro-batch-size", "2", "--gradient-accumulation-steps", "1", "--max-steps", "3", "--learning-rate", "1e-3", "--ce-coef", "0.03",
        "--val-set-size", "0", "--sample-prompt", "", "--async-prefetch", "--use-vllm", "--vllm-mode", "managed",
        "--vllm-max-model-len", "1024", "--vllm-server-port", str(servers.free_port()), "--output-dir", str(tmp_path / "run"),
    ]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr + done.stdout[-2000:]
    found = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in found] == [1, 2, 3]
    assert all(-2 <= record["ebft/alignment"] <= 2 and record["ebft/cfm_loss"] >= 0 for record in found)
    assert all(record["ebft/ce_loss"] > 0 and record["grad_norm"] > 0 for record in found)
    assert found[0]["sampling/sampling_logp_difference/max"] < 1e-3, "the first replies are of the policy that trains"
    assert found[-1]["rollout/staleness_max"] == 1, "the later ones of the step before"
