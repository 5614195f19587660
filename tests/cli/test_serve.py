"""`treetune serve` with a stand-in for vLLM: it comes up, says where, ends with all its processes, and refuses what cannot work."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from treetune.cli.commands import serve
from treetune.cli.options.model import ModelName
from treetune.cli.options.serve import Serve
from treetune.core import owned
from treetune.core.rollout import server as servers
from treetune.core.run.errors import BadInput

FAKE = Path(__file__).parents[1] / "core" / "rollout" / "fake_vllm.py"
CODE = "import sys; from treetune.cli import parse; from treetune.core.run import errors; from treetune.cli.commands import serve\n" \
    "from treetune.cli.options import serve as serve_options\n" \
    "config, given = parse.parse('serve', serve_options.Serve, sys.argv[1:])\n" \
    "try: sys.exit(serve.run(config, given))\n" \
    "except (errors.BadInput, errors.RunFailed) as error: sys.exit(f'{type(error).__name__}: {error}')"  # fmt: skip


@pytest.fixture
def scene(tmp_path, monkeypatch):
    """A model folder, and a program that takes vLLM's command line and runs the stand-in; its extra flags are in the file `flags`."""
    monkeypatch.setenv("TREETUNE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TREETUNE_VLLM_PYTHON", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"number": 0.0}))
    (tmp_path / "flags").write_text("")
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nshift 2\necho "$@" > asked\nexec {sys.executable} {FAKE} $(cat flags) "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def begin(scene: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-c", CODE, "--model", str(scene / "model"), "--python", str(scene / "python"), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=scene)


@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_it_serves_until_it_is_told_to_stop_and_answers_no_more(scene, how):
    port = servers.free_port()
    log = ("--log", str(scene / "logs" / "vllm.log")) if how is signal.SIGTERM else ()
    running = begin(scene, "--port", str(port), "--max-model-len", "77", "--max-lora-rank", "9", "--vllm-args=--swap-space=1", *log)
    try:
        lines = []
        while not lines or "serving" not in lines[-1]:
            lines.append(running.stdout.readline())
            assert lines[-1], running.stderr.read()
        assert f"http://127.0.0.1:{port}" in lines[-1]
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        asked = (scene / "asked").read_text()
        for part in (f"--model {scene / 'model'}", "--host 127.0.0.1", "--max-model-len 77", "--max-lora-rank 16", "--swap-space=1",
                     "--logprobs-mode processed_logprobs"):  # fmt: skip
            assert part in asked
        running.send_signal(how)
        out, err = running.communicate(timeout=40)
        assert running.returncode == 0 and "stopping the server" in out and err == ""
        assert not log or (scene / "logs" / "vllm.log").read_text().startswith(owned.LOG)
    finally:
        running.kill()
        running.communicate()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/health")


def test_a_server_that_does_not_come_up_is_one_line_with_its_error(scene):
    (scene / "flags").write_text("--die")
    running = begin(scene, "--port", str(servers.free_port()))
    _, err = running.communicate(timeout=60)
    assert (
        running.returncode == 1 and err.startswith("RunFailed: the server ended with code 3") and "no space for the key/value cache" in err
    )
    assert len(err.splitlines()) == 1


def test_a_server_that_dies_later_ends_the_command(scene):
    port = servers.free_port()
    (scene / "flags").write_text(f"--stubborn {scene / 'pids'}")
    running = begin(scene, "--port", str(port))
    try:
        while "serving" not in (line := running.stdout.readline()):
            assert line, running.stderr.read()
        os.kill(int((scene / "pids").read_text().split()[0]), signal.SIGKILL)
        _, err = running.communicate(timeout=40)
        assert running.returncode == 1 and err.startswith("RunFailed: the server ended")
    finally:
        running.kill()
        running.communicate()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(model=ModelName("nowhere/at/all")), "nowhere/at/all is not a folder"),
        (dict(port=0), "port must be 1 to 65535, got 0"),
        (dict(tensor_parallel_size=0), "tensor_parallel_size must be at least 1, got 0"),
        (dict(gpu_memory_utilization=1.5), "gpu_memory_utilization must be above 0 and at most 1"),
        (dict(max_lora_rank=1000), "vLLM takes adapters of rank 1 to 512"),
        (dict(adapter="nowhere"), "adapter_config.json"),
        (dict(python="nowhere/python"), "there is no program nowhere/python"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(scene, options, message, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    config = Serve(**({"model": ModelName(str(scene / "model")), "python": str(scene / "python"), "port": servers.free_port()} | options))
    with pytest.raises(BadInput, match=message):
        serve.run(config, frozenset())
    assert not (scene / "asked").exists()


def test_where_vllm_is_looked_for(scene, monkeypatch):
    monkeypatch.setattr(servers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="make vllm-env"):
        servers.find_python(None)
    (scene / ".vllm-venv" / "bin").mkdir(parents=True)
    (scene / ".vllm-venv" / "bin" / "python").write_text("")
    assert servers.find_python(None) == str(scene / ".vllm-venv" / "bin" / "python")
    monkeypatch.setenv("TREETUNE_VLLM_PYTHON", sys.executable)
    assert servers.find_python(None) == sys.executable
    assert servers.find_python(str(scene / "python")) == str(scene / "python")


def test_an_adapter_is_served_beside_the_model_and_its_rank_counts(scene):
    (scene / "mine").mkdir()
    (scene / "mine" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 100, "lora_alpha": 8}))
    found = serve.build_command(Serve(model=ModelName("m"), adapter=str(scene / "mine"), max_lora_rank=8), "python", scene / "model")
    assert found[found.index("--max-lora-rank") + 1] == "128"
    assert found[found.index("--lora-modules") + 1] == f"mine={scene / 'mine'}"
    plain = serve.build_command(Serve(model=ModelName("m"), max_lora_rank=0, enable_prefix_caching=False), "python", scene / "model")
    assert "--enable-lora" not in plain and "--no-enable-prefix-caching" in plain
