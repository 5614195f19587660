"""Ranks killed at every phase of a run: the others end and the rank is named, and all that follow leave the bits of a run nobody killed."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from treetune.core import ckpt


def _beside(name: str):
    spec = importlib.util.spec_from_file_location(f"kills_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


deaths, online = _beside("deaths"), _beside("test_online")
place = online.place

# One after another, with a restart after each but the last. Checkpoints are made at steps 2, 4, 6.
POINTS = {
    "while it reads the model": "treetune.core.partition:Partition.joined:6:1",
    "while it samples": "treetune.models.decode:_advance:30:0",
    "while it reads a checkpoint": "treetune.core.ckpt_parts:Reader.read:9:1",
    "in a backward pass": "treetune.core.messages:Sum.wait:9:0",
    "while it updates weights": "treetune.core.optim:_laid_out:20:1",
}


def command(place, name: str, *more) -> list[str]:
    args = online.arguments(place, place / name, 2, *more, "--nproc", 2, "--sharding", "full")
    args[args.index("--max-steps") + 1] = "6"
    return [sys.executable, "-m", "treetune.cli.main", *args]


def ended(place, line: list[str], **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(line, cwd=place, env=online.scene.quiet_env() | more, capture_output=True, text=True, timeout=600)


def numbers(run) -> list[dict]:
    """What a run has recorded, without what clocks say."""
    return [{key: value for key, value in one.items() if not any(word in key for word in online.CLOCK)} for one in online.records(run)]


@pytest.mark.slow
def test_ranks_killed_at_any_point_leave_the_bits_of_a_run_nobody_killed(place):
    run, folder = place / "killed", place / "deaths"
    line = command(place, "killed", "--restarts", len(POINTS) - 1)
    done = ended(place, line, **deaths.install(folder, list(POINTS.values()), run))
    end = time.time()
    assert done.returncode == 1, done.stderr
    notes = deaths.log(folder)
    died, started = ([one for one in notes if one["event"] == event] for event in ("dies", "starts"))
    assert [one["rank"] for one in died] == [int(point[-1]) for point in POINTS.values()], done.stderr
    for number, one in enumerate(died):
        how = f"rank {one['rank']} (process {one['pid']}) was killed by SIGKILL, as the system does where memory runs out"
        last = number + 1 == len(POINTS)
        then = "the other ranks were stopped" if last else f"all ranks start again (restart {number + 1} of {len(POINTS) - 1})"
        assert f"{how}; {then}\n" in done.stderr
        # The next ranks start when the ones before are gone.
        after = [other["time"] for other in started if other["start"] == number + 1] or [end]
        assert max(after) - one["time"] < 60
    assert all(not one["alive"] for one in started) and not any(Path(f"/proc/{one['pid']}").exists() for one in notes)
    assert [one["checkpoints"] for one in died] == [[], ["step_000002"], ["step_000002"], *[["step_000002", "step_000004"]] * 2]
    assert ckpt.newest_sound(run / "checkpoints") == (run / "checkpoints" / "step_000004", [])
    continued, whole = ended(place, [*line, "--resume", "auto"]), ended(place, command(place, "whole"))
    assert continued.returncode == whole.returncode == 0, continued.stderr + whole.stderr
    one, other = (load_file(place / name / "adapter" / "adapter_model.safetensors") for name in ("killed", "whole"))
    assert one.keys() == other.keys() and all(torch.equal(leaf, other[name]) for name, leaf in one.items())
    assert numbers(run) == numbers(place / "whole")


FAULTS = """
import os

def own(logp):
    if os.environ["RANK"] == "1" and logp.requires_grad:
        raise RuntimeError("no such word")
    return -logp

def reward(completions):
    if os.environ["RANK"] == "1":
        raise RuntimeError("no such service")
    return [len(one) for one in completions]
"""


@pytest.mark.slow
@pytest.mark.parametrize(("method", "said"), [("sft", "no such word"), ("grpo", "no such service")])
def test_users_code_that_fails_on_one_rank_ends_all_and_says_so(place, method, said):
    (place / "faults.py").write_text(FAULTS)
    if method == "sft":
        (place / "text.jsonl").write_text("".join(f'{{"text": "Row {i} is red"}}\n' for i in range(12)))
        options = ["--max-steps", 3, "--sequence-len", 64, "--data", place / "text.jsonl", "--val-set-size", 0, "--device", "cpu"]
        own = ["sft", "--model", place / "model", "--output-dir", place / "own", "--loss", place / "faults.py:own", *options]
        line = [sys.executable, "-m", "treetune.cli.main", *map(str, own), "--nproc", "2", "--sharding", "full"]
    else:
        line = command(place, "service")
        line[line.index("--reward-funcs") + 1 : line.index("--reward-funcs") + 3] = [f"{place}/faults.py:reward"]
    began = time.monotonic()
    done = ended(place, line)
    assert done.returncode in (1, 2) and said in done.stderr, done.stderr
    assert time.monotonic() - began < 60
