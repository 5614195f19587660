"""Files of weights are mapped into memory, and let go as they are read."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from treetune.core.param import Param
from treetune.models import hf_weights

STATUS = Path("/proc/self/status")
SIZE, COUNT = 1 << 22, 12


def mapped():
    """Bytes of mapped files of this process that are in memory."""
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith("RssFile"))


@pytest.mark.skipif(not STATUS.exists(), reason="what is in memory is read from /proc")
def test_a_folder_that_is_read_is_not_in_memory_beside_its_leaves(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_weights, "MAPPED", SIZE)
    save_file({f"w{i}": torch.full((SIZE // 4,), float(i)) for i in range(COUNT)}, tmp_path / "model.safetensors")
    before, seen = mapped(), []
    wanted = {f"w{i}": Param((SIZE // 4,)) for i in range(COUNT)}
    kept = hf_weights.read_tensors(tmp_path, wanted, keep=lambda key, leaf: seen.append(mapped()) or leaf)
    assert max(seen) - before < 4 * SIZE
    assert all((leaf == int(key[1:])).all() for key, leaf in kept.items()) and len(kept) == COUNT


def test_leaves_outlive_the_mapping_that_they_came_from(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_weights, "MAPPED", 0)
    numbers = {f"w{i}": torch.randn(100, generator=torch.Generator().manual_seed(i)) for i in range(5)}
    save_file(numbers, tmp_path / "model.safetensors")
    file = hf_weights._File(tmp_path / "model.safetensors")
    read = {key: file.get_tensor(key) for key in sorted(file.keys())}
    assert all(torch.equal(read[key], leaf) for key, leaf in numbers.items())
