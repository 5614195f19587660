"""`treetune grpo` against a real server that it starts itself: samples come from there, weights go there, and the mismatch is logged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from treetune.core.rollout import server as servers

pytestmark = pytest.mark.vllm
PROMPTS = str(Path(__file__).parents[2] / "examples" / "data" / "gsm8k_train_sample.jsonl")
RUN = [
    "grpo", "--data", PROMPTS, "--reward-funcs", "digits", "--num-generations", "8", "--max-completion-length", "16",
    "--micro-batch-size", "2", "--gradient-accumulation-steps", "1", "--seed", "1", "--sample-prompt", "", "--learning-rate", "5e-4",
    "--use-vllm", "--vllm-mode", "managed", "--vllm-max-model-len", "1024",
]  # fmt: skip


def trained(tmp_path, *options: str) -> list[dict]:
    """Records of the steps of a run."""
    run = tmp_path / "run"
    line = [sys.executable, "-m", "treetune.cli.main", *RUN, *options, "--vllm-server-port", str(servers.free_port())]
    done = subprocess.run([*line, "--output-dir", str(run)], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr + done.stdout[-2000:]
    records = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "reward" in record]


def test_an_adapter_trains_on_what_the_server_writes(tmp_path):
    found = trained(tmp_path, "--max-steps", "4")
    assert [record["sync/version"] for record in found] == [0, 1, 2, 3], "every step samples from the weights of the one before"
    assert all(record["sync/logp_difference_mean"] < 1e-3 for record in found)
    assert all(record["sampling/sampling_logp_difference/max"] < 1e-3 for record in found), "the samples are the trainer's own policy's"
    assert all(0.99 < record["sampling/importance_sampling_ratio/mean"] < 1.01 for record in found)
    assert any(record["grad_norm"] > 0 for record in found)


def test_the_correction_repairs_a_server_one_sync_behind(tmp_path):
    """With a sync every second step the other steps are off-policy: ratios leave 1, and the metrics say so."""
    found = trained(tmp_path, "--max-steps", "4", "--vllm-sync-interval", "2")
    assert [record["rollout/staleness_max"] for record in found] == [0, 1, 0, 1]
    fresh, stale = ([found[i]["sampling/sampling_logp_difference/mean"] for i in at] for at in ((0, 2), (1, 3)))
    assert max(fresh) < 1e-3 < min(stale)


@pytest.mark.slow
def test_the_mean_reward_rises(tmp_path):
    found = [record["reward"] for record in trained(tmp_path, "--max-steps", "40")]
    assert sum(found[-5:]) / 5 > sum(found[:5]) / 5 + 0.3, found
