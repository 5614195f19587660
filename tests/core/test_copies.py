"""Gradients of whole weights, handed on a layer at a time: here of one process, over no ranks. Several are in tests/dist."""

import gc
import weakref
from functools import partial

import pytest
import torch

from treetune.core import copies, grad, tree


def params():
    gen = torch.Generator().manual_seed(3)
    leaf = lambda *shape: torch.randn(shape, generator=gen)  # noqa: E731
    layers = [{"w": leaf(4, 4), "low": leaf(4, 4).bfloat16()} for _ in range(3)]
    return {"embed_tokens": leaf(5, 4), "layers": layers, "norm": leaf(4), "unused": leaf(2)}


def loss(params, x):
    for layer in params["layers"]:
        x = torch.tanh(x @ layer["w"] + x @ layer["low"].float())
    return (x * params["norm"] @ params["embed_tokens"].T).square().sum(), None


def gradients(collect, start):
    gradient, total = grad.value_and_grad(loss, collect), None
    for seed in range(2):
        _, total = gradient(start, torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)), into=total)
    return total


class Arrived:
    """A message between no ranks."""

    def wait(self) -> None:
        pass


@pytest.fixture
def summed(monkeypatch):
    """Totals that are sent as to other ranks, and come back as they are."""
    monkeypatch.setattr(copies, "_beyond", lambda leaf, mesh: ["data", "replicate"])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat, group, async_op=False: Arrived())
    return partial(copies._Summed, None)


def test_gradients_are_those_of_leaves_as_they_are(summed):
    start = params()
    one, other = gradients(None, start), gradients(summed, start)
    for (path, a), (_, b) in zip(tree.items(one), tree.items(other), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype == torch.float32, path
    assert not other["unused"].any() and other["layers"][0]["w"].any()


def test_layers_go_as_one_and_the_last_first():
    items = list(tree.items(params()))
    names = [[items[i][0] for i in group] for group in copies.groups(items, range(len(items)))]
    layers = [[f"layers.{i}.w", f"layers.{i}.low"] for i in (2, 1, 0)]
    assert names == [["unused"], ["norm"], *layers, ["embed_tokens"]]


@pytest.mark.parametrize("sent", [False, True])
def test_gradients_go_when_nobody_holds_them(sent, summed):
    collect = summed if sent else None
    gc.collect()
    gc.disable()
    try:
        refs = [weakref.ref(leaf) for leaf in tree.leaves(gradients(collect, params()))]
        assert all(ref() is None for ref in refs)
    finally:
        gc.enable()
