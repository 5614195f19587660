"""The managed server process: it comes up or says why not, and never leaves a process behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import pytest

from treetune.core.rollout import server as server_
from treetune.core.rollout.server import Server

FAKE = Path(__file__).with_name("fake_vllm.py")


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The temporary folder of these tests and of what they start."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)  # asked for again
    return folder


@pytest.fixture
def run(tmp_path):
    """run(*flags, **options) -> a Server of the stand-in; all are stopped at the end."""
    started = []

    def begin(*flags, **options):
        port = server_.free_port()
        command = [sys.executable, str(FAKE), "--port", str(port), *flags]
        found = Server(command, port=port, log=tmp_path / "server.log", **({"deadline_s": 20.0, "grace_s": 1.0} | options))
        started.append(found)
        return found

    yield begin
    for one in started:
        one.stop()


def gone(pid: int, within_s: float = 5.0) -> bool:
    """Whether a process ends within some seconds; a zombie that nobody reaps has ended."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def pids(file: Path) -> list[int]:
    return [int(one) for one in file.read_text().split()]


def test_a_server_comes_up_on_the_loopback_interface_and_stops(run):
    server = run()
    assert server.alive() and server.url == f"http://127.0.0.1:{server.port}"
    assert httpx.get(f"{server.url}/health").status_code == 200
    guard = server.process.pid
    assert os.getpgid(guard) == guard != os.getpgid(0)  # a group of its own
    server.stop()
    assert not server.alive() and gone(guard)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


def test_stopping_ends_workers_that_ignore_sigterm(run, tmp_path, temporary):
    server = run("--stubborn", str(tmp_path / "pids"))
    assert [path.name for path in temporary.glob("treetune-*/*")] == ["socket"]
    server.stop()
    assert all(gone(pid) for pid in pids(tmp_path / "pids"))
    assert list(temporary.iterdir()) == []


def test_a_killed_server_is_seen_and_can_be_restarted(run, tmp_path):
    server = run("--stubborn", str(tmp_path / "pids"))
    parent, worker = pids(tmp_path / "pids")
    os.kill(parent, signal.SIGKILL)
    assert gone(parent)
    end = time.monotonic() + 5.0
    while server.alive() and time.monotonic() < end:
        time.sleep(0.05)
    assert not server.alive()
    server.restart()
    assert server.alive() and httpx.get(f"{server.url}/health").status_code == 200
    assert gone(worker), "what the dead server left behind is ended too"


def test_a_server_that_ends_early_shows_its_error(run, temporary):
    with pytest.raises(RuntimeError, match="ended with code 3 before it was up; .*ValueError: no space for the key/value cache") as caught:
        run("--die")
    assert "\n" not in str(caught.value) and list(temporary.iterdir()) == []


def test_a_server_that_never_answers_is_given_up_and_ended(run, tmp_path):
    with pytest.raises(RuntimeError, match="not up after 1.5 s"):
        run("--hang", "--stubborn", str(tmp_path / "pids"), deadline_s=1.5, grace_s=0.5)
    assert all(gone(pid) for pid in pids(tmp_path / "pids"))


def test_a_taken_port_and_a_missing_program_are_refused(run, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1 port {port}"):
            Server([sys.executable], port=port, log=tmp_path / "log")
    with pytest.raises(ValueError, match="there is no program nowhere/python"):
        Server(["nowhere/python"], port=server_.free_port(), log=tmp_path / "log")


OWNER = """
import importlib, sys, time
from treetune.core.rollout.server import Server
port, fake, pids, log = int(sys.argv[1]), *sys.argv[2:]
server = Server([sys.executable, fake, "--port", str(port), "--stubborn", pids], port=port, log=log, grace_s=0.5)
print("up", flush=True)
time.sleep(300 if sys.stdin.read() == "" else 0)
"""


@pytest.mark.sampled(2)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, None])
def test_the_server_ends_with_its_owner_however_that_ends(how, tmp_path, temporary):
    port, files = server_.free_port(), tmp_path / "pids"
    command = [sys.executable, "-c", OWNER, str(port), str(FAKE), str(files), str(tmp_path / "log")]
    owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout.readline().strip() == "up"
        if how is None:
            owner.communicate("end", timeout=20)  # in the ordinary way, without a call of stop
        else:
            owner.send_signal(how)
        owner.wait(20)
        assert all(gone(pid, 8.0) for pid in pids(files))
        assert list(temporary.iterdir()) == []
    finally:
        owner.kill()
        owner.communicate()


def test_the_command_line_says_all_that_it_must(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    options = server_.ServerOptions("tiny", 81, max_lora_rank=9, max_model_len=128, enable_prefix_caching=False, enforce_eager=True)
    found = server_.command("python", tmp_path, options._replace(extra=["--swap-space", "1"]))
    text = " ".join(found)
    assert found[:3] == ["python", "-m", "vllm.entrypoints.openai.api_server"]
    for part in ("--host 127.0.0.1", "--port 81", "--served-model-name tiny", "--max-model-len 128", "--logprobs-mode processed_logprobs",
                 "--generation-config vllm", "--enable-lora --max-loras 2 --max-lora-rank 16", "--no-enable-prefix-caching",
                 "--enforce-eager", "--swap-space 1"):  # fmt: skip
        assert part in text
    assert "lora" not in " ".join(server_.command("python", tmp_path, server_.ServerOptions("tiny", 81)))
    with pytest.raises(ValueError, match="is not a model folder"):
        server_.command("python", tmp_path / "nothing", server_.ServerOptions("tiny", 81))


def test_ranks_go_up_to_what_vllm_offers():
    assert [server_.lora_rank(rank) for rank in (1, 8, 9, 64, 300, 512)] == [8, 8, 16, 64, 320, 512]
    with pytest.raises(ValueError, match="rank 513"):
        server_.lora_rank(513)
