import pytest
import torch

from treetune.core import grad, tree


def _params(dtype=torch.float64):
    gen = torch.Generator().manual_seed(0)
    shapes = [{"w": (5, 5), "b": (5,)}] * 2
    layers = tree.map(lambda shape: torch.randn(shape, generator=gen, dtype=dtype), shapes)
    return {"layers": layers, "unused": torch.ones(3, dtype=dtype)}


def _layer(x, layer):
    return torch.tanh(x @ layer["w"].T + layer["b"])


def _loss(params, x, policy=None):
    for layer in params["layers"]:
        x = grad.remat(_layer, policy)(x, layer)
    return x.square().sum(), {"seen": x.shape[0]}


def test_equals_autograd_and_passes_aux_through():
    params, x = _params(), torch.linspace(-1, 1, 15, dtype=torch.float64).view(3, 5)
    (value, aux), grads = grad.value_and_grad(_loss)(params, x)
    leaves = tree.map(lambda leaf: leaf.clone().requires_grad_(), params)
    expected, _ = _loss(leaves, x)
    expected.backward()
    assert torch.equal(value, expected.detach()) and not value.requires_grad and aux == {"seen": 3}
    for (path, got), leaf in zip(tree.items(grads), tree.leaves(leaves), strict=True):
        assert torch.equal(got, torch.zeros_like(leaf) if path == "unused" else leaf.grad), path
    assert not any(leaf.requires_grad for leaf in tree.leaves(params)), "the parameters themselves stay untracked"


def test_rematerialisation_changes_memory_and_not_gradients():
    params, x = _params(), torch.randn(7, 5, dtype=torch.float64)
    kept = {}
    for policy in (None, "full"):
        count = 0

        def pack(tensor):
            nonlocal count
            count += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value, _ = _loss(tree.map(lambda leaf: leaf.requires_grad_(), _params()), x, policy)
        kept[policy] = count
    plain, again = (grad.value_and_grad(_loss)(params, x, policy)[1] for policy in (None, "full"))
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(plain), tree.leaves(again), strict=True))
    assert kept["full"] < kept[None]
    with pytest.raises(ValueError, match="unknown rematerialisation policy 'half'"):
        grad.remat(_layer, "half")


def test_works_where_gradients_are_switched_off():
    with torch.no_grad():
        _, grads = grad.value_and_grad(_loss)(_params(), torch.ones(2, 5, dtype=torch.float64))
    assert all(leaf.abs().sum() > 0 for path, leaf in tree.items(grads) if path != "unused")


def test_a_value_that_uses_no_leaf_has_zero_gradients():
    (value, _), grads = grad.value_and_grad(lambda params: (torch.tensor(2.0), None))(_params())
    assert value == 2 and all((leaf == 0).all() for leaf in tree.leaves(grads))


@pytest.mark.parametrize(
    "fn",
    [
        lambda p: (p["a"] + p["b"]).sum(),  # one expanded gradient for both leaves
        lambda p: ((p["a"] + p["b"]) * torch.arange(6.0).view(2, 3)).sum(),  # one dense gradient for both leaves
        lambda p: (p["a"].T @ p["b"]).square().sum(),  # a transposed gradient
    ],
)
def test_gradients_own_contiguous_memory(fn):
    params = {"a": torch.ones(2, 3), "b": torch.full((2, 3), 2.0)}
    _, grads = grad.value_and_grad(lambda p: (fn(p), None))(params)
    expected = tree.map(torch.clone, grads)
    assert all(leaf.is_contiguous() for leaf in tree.leaves(grads))
    torch._foreach_mul_(tree.leaves(grads), 3.0)  # as clipping does
    assert all(torch.equal(got, 3 * want) for got, want in zip(tree.leaves(grads), tree.leaves(expected), strict=True))
