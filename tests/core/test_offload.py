import gc
import os
from pathlib import Path

import pytest
import torch

from treetune.core import grad, offload

WIDE = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", offload.PLACES)
@pytest.mark.parametrize(
    "tensor",
    [WIDE, WIDE.T, WIDE[:, :32], WIDE[3:, 5:], WIDE[:, None, :8].expand(40, 9, 8), WIDE.bfloat16(), WIDE > 0, WIDE[0, 0]],
    ids=["plain", "turned", "part", "corner", "expanded", "bfloat16", "bool", "number"],
)
def test_a_tensor_comes_back_with_its_strides(tensor, name):
    put, take = offload.place(name)
    again = take(put(tensor))
    assert torch.equal(again, tensor) and again.stride() == tensor.stride() and again.dtype == tensor.dtype


def files():
    return os.listdir(offload._folder(os.getpid()).name)


def test_files_go_when_the_graph_does():
    gc.collect()
    before = set(files())
    x = WIDE.clone().requires_grad_()
    y = grad.remat(lambda x: (x * x).exp().sum(), "none+disk")(x)
    assert len(set(files()) - before) >= 2
    assert torch.equal(torch.autograd.grad(y, x)[0], 2 * x.detach() * (x.detach() * x.detach()).exp())
    del y
    gc.collect()
    assert set(files()) == before


def test_without_gradients_nothing_is_written():
    before = set(files())
    with torch.no_grad():
        y = grad.remat(lambda x: (x * x).exp(), "full+disk")(WIDE)
    assert set(files()) == before and torch.equal(y, (WIDE * WIDE).exp())


def test_weights_stay_where_they_are():
    before, weight = set(files()), torch.ones(64, 64, requires_grad=True)
    y = grad.remat(lambda x, layer: x @ layer["w"], "none+disk")(WIDE, {"w": weight})
    assert len(set(files()) - before) == 1, "the input alone"
    y.sum().backward()
    assert weight.grad is not None


def test_a_place_that_is_none_is_refused():
    with pytest.raises(ValueError, match="offloaded to cpu or disk, got 'tape'"):
        offload.place("tape")
    with pytest.raises(ValueError, match=r"unknown rematerialisation policy 'full\+tape'"):
        grad.remat(abs, "full+tape")


def test_the_folder_is_in_the_temporary_one():
    assert Path(offload._folder(os.getpid()).name).name.startswith("treetune-activations-")
