"""How much memory is free: what the system says, and what its container leaves."""

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
