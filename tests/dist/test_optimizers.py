"""Optimisers on leaves of which each of two ranks holds a half: the numbers and checkpoints of one rank, or refused by name."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from treetune.core import ckpt, tree

WORKER = Path(__file__).with_name("optimizers_worker.py")
_spec = importlib.util.spec_from_file_location("optimizers_worker", WORKER)
assert _spec is not None and _spec.loader is not None
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)


@pytest.fixture(scope="module")
def halves(launch, tmp_path_factory):
    """The folder that two ranks filled."""
    folder = tmp_path_factory.mktemp("optimizers")
    launch(2, WORKER, folder, cwd=folder)
    return folder


@pytest.mark.more
@pytest.mark.parametrize("name", worker.ELEMENTWISE + worker.ROUNDED)
def test_halves_of_leaves_are_updated_as_whole_ones(halves, name):
    one = worker.train(name, worker.params(odd=False), lambda leaf: leaf)
    two, _ = ckpt.load(halves / name / "step_000004", one)
    for key in ("params", "opt", "extra"):
        for (path, leaf), other in zip(tree.items(getattr(one, key)), tree.leaves(getattr(two, key)), strict=True):
            _same(name, leaf, other, f"{key}.{path}")
    back = load_file(halves / f"{name}.safetensors")
    for path, leaf in tree.items({"params": one.params, "opt": one.opt}):
        _same(name, leaf, back[path], path)


def _same(name, leaf, other, path):
    """Bit for bit, but for torch's fused kernel, which rounds the end of a leaf, where no vector is full, in another way."""
    if name == "adamw":
        torch.testing.assert_close(leaf, other, rtol=1e-6, atol=1e-7, msg=lambda text: f"{path}: {text}")
    else:
        assert torch.equal(leaf, other), path


@pytest.mark.more
def test_what_cannot_be_split_is_refused_by_name_on_both_ranks(halves):
    first, second = (json.loads((halves / f"refused{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and set(first) == set(worker.REFUSED)
    assert "adamw_8bit keeps blocks of 256 numbers, and ranks hold parts of odd (65, 64)" in first["adamw_8bit"]
    assert "adamw_4bit keeps blocks of 128 numbers" in first["adamw_4bit"]
    assert all("needs whole matrices, and layers.0.w (64, 128) is split" in first[name] for name in worker.REFUSED[2:])
