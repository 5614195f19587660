"""`treetune sft --use-ray`: workers of Ray Train leave the adapter of one process. Needs Ray: pip install 'treetune[ray]'."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = pytest.mark.slow
spec = importlib.util.spec_from_file_location("torchrun_tests", Path(__file__).with_name("test_torchrun.py"))
runs = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = runs
spec.loader.exec_module(runs)
place, alone = runs.place, runs.alone


def started(place, output, *more) -> subprocess.CompletedProcess:
    env = runs.quiet_env() | {"RAY_AUTH_MODE": "disabled", "GLOO_SOCKET_IFNAME": "lo", "RAY_CHDIR_TO_TRIAL_DIR": "0", "HOME": str(place)}
    line = [sys.executable, *runs.COMMAND, *runs._args(place, place / output, 2, "--use-ray", "--nproc", "2", *more)]
    return subprocess.run(line, cwd=place, env=env, capture_output=True, text=True, timeout=900)


def test_two_workers_leave_the_adapter_of_one_process(place, alone):
    done = started(place, "workers")
    assert done.returncode == 0, done.stderr
    one, two = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (alone, place / "workers"))
    assert one.keys() == two.keys() and all((leaf - two[name]).abs().max() <= 1e-5 for name, leaf in one.items())
    assert runs._losses(place / "workers") == pytest.approx(runs._losses(alone), rel=1e-5)


def test_workers_start_again_from_the_newest_checkpoint(place, alone):
    """The first attempt ends behind step 2, in the user's own loss."""
    (place / "once.py").write_text(
        "import os\n\nseen = [0]\n\ndef mean(logp):\n    seen[0] += logp.requires_grad\n"
        "    if seen[0] > 5 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n        os._exit(3)\n    return -logp\n"
    )
    done = started(place, "again", "--loss", "once.py:mean", "--restarts", "1")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (place / "again" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "train/loss" in record] == [1, 2, 3, 4]
    assert runs._losses(place / "again") == pytest.approx(runs._losses(alone), rel=1e-5)


def test_bad_input_of_workers_ends_with_its_line(place):
    done = started(place, "bad", "--lora-target-modules", "q_porj")
    assert done.returncode == 2 and "'q_porj' matches no parameter" in done.stdout + done.stderr
    assert not os.path.exists(place / "bad")
