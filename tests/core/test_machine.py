"""How much memory is free: what the system says, and what its container leaves."""

import subprocess
import sys
from pathlib import Path

import pytest

from treetune.core import machine


def test_free_memory_is_what_the_system_says(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CONTAINER", tmp_path)
    if not Path("/proc/meminfo").exists():
        assert machine.free_memory() == 0
        return
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < machine.free_memory() < total


@pytest.mark.parametrize(("limit", "used", "expected"), [("3000", "1000", 2000), ("1000", "3000", 0), ("max", "3000", None)])
def test_a_container_leaves_less(monkeypatch, tmp_path, limit, used, expected):
    monkeypatch.setattr(machine, "CONTAINER", tmp_path)
    if machine.free_memory() == 0:
        pytest.skip("this system does not say what is free")
    (tmp_path / "memory.max").write_text(limit)
    (tmp_path / "memory.current").write_text(used)
    free = machine.free_memory()
    assert free == expected if expected is not None else free > 2**20


@pytest.mark.more
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident set of Linux")
def test_large_buffers_do_not_stay_with_the_process():
    """Buffers of 16 MiB, each freed after a small one was taken behind it, as dense copies of quantised weights are."""
    script = """
import ctypes, sys
from treetune.core import machine
if sys.argv[1] == "map":
    machine.map_large_buffers()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def own():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) // 1024
before, large = own(), []
for size in (16 << 20,) * 6:
    libc.free(libc.malloc(size))
    large.append(libc.malloc(size))
    ctypes.memset(large[-1], 1, size)
    libc.malloc(65536)
for buffer in large:
    libc.free(buffer)
print(own() - before)
"""
    lines = ([sys.executable, "-c", script, how] for how in ("map", "as it is"))
    mapped, as_it_is = (int(subprocess.run(line, capture_output=True, text=True, check=True).stdout) for line in lines)
    assert mapped < 8 < as_it_is, (mapped, as_it_is)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere CUDA's allocator has no such segments")
@pytest.mark.parametrize("given", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": ""}])
def test_segments_are_joined_unless_the_user_has_a_say(monkeypatch, given):
    environment = dict(given)
    monkeypatch.setattr(machine.os, "environ", environment)
    machine.join_segments()
    assert environment == (given or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
