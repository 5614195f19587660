"""Starting ranks on this machine, over gloo on the loopback device."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
TIMEOUT_S = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def quiet_env(**changes) -> dict:
    """One thread per rank; gloo finds its peers by address, not by the name of the machine."""
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    own["PYTHONFAULTHANDLER"] = "1"  # a rank that crashes says where
    return os.environ | own | {key: str(value) for key, value in changes.items()}


def _module(name: str):
    """A module that the ranks use too."""
    spec = importlib.util.spec_from_file_location(f"dist_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def scene():
    return _module("scene")


@pytest.fixture(scope="session")
def counting():
    return _module("counting")


@pytest.fixture(scope="session")
def saved_leaves():
    """saved_leaves(checkpoint) -> {path: whole leaf} of one process or of several, by what their index says."""

    def read(checkpoint: Path) -> dict[str, torch.Tensor]:
        if (checkpoint / "state.safetensors").exists():
            return load_file(checkpoint / "state.safetensors")
        index = json.loads((checkpoint / "state.index.json").read_text())
        files, out = [load_file(checkpoint / name) for name in index["files"]], {}
        for path, leaf in index["leaves"].items():
            out[path] = torch.empty(leaf["shape"], dtype=files[leaf["parts"][0][0]][path].dtype)
            for number, first, shape in leaf["parts"]:
                out[path][tuple(slice(begin, begin + size) for begin, size in zip(first, shape, strict=True))] = files[number][path]
        return out

    return read


@pytest.fixture(scope="session")
def launch():
    """launch(world, *command, cwd=...) -> errors: run a program on so many ranks, as torchrun would set them up, and wait for all of them.

    Each ends with `code`. The launcher itself takes as long to start as a rank.
    """

    def start(world: int, *command, cwd: Path, timeout: float = TIMEOUT_S, code: int = 0) -> list[str]:
        port, args = free_port(), [sys.executable, *map(str, command)]
        sets = [quiet_env(RANK=i, LOCAL_RANK=i, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for i in range(world)]
        ranks = [subprocess.Popen(args, cwd=cwd, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for env in sets]
        try:
            errors = [rank.communicate(timeout=timeout)[1] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert [rank.returncode for rank in ranks] == [code] * world, "\n".join(errors)
        return errors

    return start


@pytest.fixture(scope="session")
def torchrun():
    """torchrun(world, *command, cwd=...) -> CompletedProcess of the real launcher."""

    def start(world: int, *command, cwd: Path) -> subprocess.CompletedProcess:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world)]
        where = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
        args = [*launcher, *where, *(str(part) for part in command)]
        pipe = subprocess.PIPE
        # A session of its own, so that ranks that hang can be ended with their launcher.
        running = subprocess.Popen(args, cwd=cwd, env=quiet_env(), stdout=pipe, stderr=pipe, text=True, start_new_session=True)
        try:
            out, err = running.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(args, running.returncode, out, err)

    return start
