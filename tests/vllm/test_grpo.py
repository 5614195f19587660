"""`treetune grpo` against a real server that it starts itself: samples come from there, weights go there, and the mismatch is logged."""

import json
import os
import signal
import subprocess
import sys
import time
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
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # the server computes on the same cores
    done = subprocess.run([*line, "--output-dir", str(run)], capture_output=True, text=True, timeout=1800, env=alone)
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


@pytest.mark.parametrize("sharding", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_two_ranks_share_one_server(tmp_path, sharding):
    """Each samples by itself, what all of them train together; the first one gives the server the weights."""
    found = trained(tmp_path, "--max-steps", "3", "--nproc", "2", "--sharding", sharding)
    assert [record["sync/version"] for record in found] == [0, 1, 2]
    assert all(record["sync/logp_difference_mean"] < 1e-3 for record in found)
    assert all(record["sampling/sampling_logp_difference/max"] < 1e-3 for record in found)
    assert any(record["grad_norm"] > 0 for record in found)


def test_two_ranks_have_a_server_each(tmp_path):
    found = trained(tmp_path, "--max-steps", "3", "--nproc", "2", "--vllm-num-servers", "2")
    assert [record["sync/version"] for record in found] == [0, 1, 2]
    assert all(record["sync/logp_difference_mean"] < 1e-3 for record in found)
    assert all(record["sampling/sampling_logp_difference/max"] < 1e-3 for record in found)
    assert any(record["grad_norm"] > 0 for record in found)


def test_the_correction_repairs_a_server_one_sync_behind(tmp_path):
    """With a sync every second step the other steps are off-policy: ratios leave 1, and the metrics say so."""
    found = trained(tmp_path, "--max-steps", "4", "--vllm-sync-interval", "2")
    assert [record["rollout/staleness_max"] for record in found] == [0, 1, 0, 1]
    fresh, stale = ([found[i]["sampling/sampling_logp_difference/mean"] for i in at] for at in ((0, 2), (1, 3)))
    assert max(fresh) < 1e-3 < min(stale)


def servers_on(port: int) -> list[int]:
    """Process ids of vLLM servers on a port."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = place.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"vllm.entrypoints.openai.api_server" in words and str(port).encode() in words:
            found.append(int(place.parent.name))
    return found


@pytest.mark.slow
def test_a_server_killed_in_mid_run_is_started_again_and_the_run_goes_on(tmp_path):
    run, port = tmp_path / "run", servers.free_port()
    line = [sys.executable, "-m", "treetune.cli.main", *RUN, "--max-steps", "6", "--vllm-server-port", str(port), "--output-dir", str(run)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        end, metrics = time.monotonic() + 600, run / "metrics.jsonl"
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2) and time.monotonic() < end:
            time.sleep(0.2)
        killed = servers_on(port)
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        out, _ = process.communicate(timeout=900)
    assert killed and process.returncode == 0, out[-3000:]
    records = [json.loads(text) for text in metrics.read_text().splitlines()]
    assert [record["sync/version"] for record in records if "reward" in record] == [0, 1, 2, 3, 4, 5]
    assert not servers_on(port)


@pytest.mark.slow
def test_the_mean_reward_rises(tmp_path):
    found = [record["reward"] for record in trained(tmp_path, "--max-steps", "25")]
    assert sum(found[-5:]) / 5 > sum(found[:5]) / 5 + 0.3, found
