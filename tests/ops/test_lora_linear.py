import pytest
import torch

from treetune.ops.lora_linear import lora_linears, lora_linears_ref

OUTS = (5, 3, 6)
SCALE = 0.7


def _inputs(dtype=torch.float64, *, tokens=9, inner=4, ranks=(2, 3, 1), base=False, with_u=False):
    gen = torch.Generator().manual_seed(0)

    def draw(*shape, grad=True):
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype).requires_grad_(grad)

    x, u = draw(tokens, inner), draw(tokens, inner) if with_u else None
    weights = [draw(out, inner, grad=base) for out in OUTS]
    adapters = [{"A": draw(rank, inner), "B": draw(out, rank)} for rank, out in zip(ranks, OUTS, strict=True)]
    return x, weights, adapters, u


def _leaves(x, weights, adapters, u):
    leaves = {"x": x, "u": u} | {f"w{i}": w for i, w in enumerate(weights)}
    leaves |= {f"{name}{i}": leaf for i, ab in enumerate(adapters) if ab for name, leaf in ab.items()}
    return {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}


def _gradients(fn, inputs, used=(0, 1, 2)):
    """Outputs, and the gradient of every leaf for one upstream gradient per used output."""
    x, weights, adapters, u = inputs
    outs = fn(x, weights, adapters, scale=SCALE, u=u)
    ups = [torch.linspace(-1, 2 + i, outs[i].numel(), dtype=torch.float64).view_as(outs[i]) for i in used]
    leaves = _leaves(*inputs)
    value = sum((outs[i].double() * up).sum() for i, up in zip(used, ups, strict=True))
    return outs, dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()), allow_unused=True), strict=True))


def _plain(x, weights, adapters, *, scale, u=None):
    """The formula with nothing where there is no adapter, through torch's own autograd."""
    u = x if u is None else u
    return [x @ w.T + (scale * (u @ (ab["B"] @ ab["A"]).T) if ab else 0.0) for w, ab in zip(weights, adapters, strict=True)]


@pytest.mark.parametrize("with_u", [False, True])
@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("which", [(0, 1, 2), (1,), (0, 2), ()])
def test_values_and_gradients_equal_the_formula(with_u, base, which):
    x, weights, adapters, u = _inputs(base=base, with_u=with_u)
    adapters = [ab if i in which else None for i, ab in enumerate(adapters)]
    inputs = (x, weights, adapters, u)
    for want_fn in (_plain, lora_linears_ref) if len(which) == 3 else (_plain,):
        outs, grads = _gradients(lora_linears, inputs)
        want, exact = _gradients(want_fn, inputs)
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(outs, want, strict=True))
        assert grads.keys() == exact.keys() and "x" in grads
        for name, leaf in exact.items():
            assert (leaf is None) == (grads[name] is None), name
            if leaf is not None:
                torch.testing.assert_close(grads[name], leaf, rtol=1e-11, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("with_u", [False, True])
def test_gradcheck(with_u):
    x, weights, adapters, u = _inputs(tokens=3, base=True, with_u=with_u)
    leaves = _leaves(x, weights, adapters, u)

    def fn(*values):
        found = dict(zip(leaves, values, strict=True))
        pairs = [{"A": found[f"A{i}"], "B": found[f"B{i}"]} for i in range(3)]
        return tuple(lora_linears(found["x"], [found[f"w{i}"] for i in range(3)], pairs, scale=SCALE, u=found.get("u")))

    assert torch.autograd.gradcheck(fn, tuple(leaves.values()))


def test_an_output_that_nobody_uses():
    inputs = _inputs(base=True)
    _, grads = _gradients(lora_linears, inputs, used=(1,))
    _, exact = _gradients(_plain, inputs, used=(1,))
    for name, leaf in exact.items():
        torch.testing.assert_close(grads[name], torch.zeros_like(grads[name]) if leaf is None else leaf, rtol=1e-11, atol=1e-12)


def test_a_frozen_input_costs_no_gradient():
    """The first layer of a frozen embedding: only the adapters learn."""
    x, weights, adapters, _ = _inputs()
    grads = _gradients(lora_linears, (x.detach(), weights, adapters, None))[1]
    exact = _gradients(_plain, (x.detach(), weights, adapters, None))[1]
    assert set(grads) == {f"{name}{i}" for name in "AB" for i in range(3)}
    assert all(torch.allclose(grads[name], exact[name], rtol=1e-11, atol=1e-12) for name in exact)


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_and_one_token(tokens):
    outs, grads = _gradients(lora_linears, _inputs(tokens=tokens, base=True))
    assert [tuple(y.shape) for y in outs] == [(tokens, out) for out in OUTS]
    assert all(torch.isfinite(leaf).all() for leaf in grads.values())


@pytest.mark.parametrize("with_u", [False, True])
def test_bfloat16_is_as_exact_as_separate_products(with_u, relative_error):
    """Adapters stay float32 leaves and get float32 gradients; errors against float64 are those of the plain formula in bfloat16."""
    x, weights, adapters, u = _inputs(tokens=64, inner=48, ranks=(8, 8, 8), with_u=with_u, base=True)
    exact_outs, exact = _gradients(_plain, (x, weights, adapters, u))
    low = [leaf if leaf is None else leaf.detach().bfloat16().requires_grad_() for leaf in (x, u)]
    pairs = [{name: leaf.detach().float().requires_grad_() for name, leaf in ab.items()} for ab in adapters]
    inputs = (low[0], [w.detach().bfloat16().requires_grad_() for w in weights], pairs, low[1])

    def cast(x, weights, adapters, *, scale, u=None):
        return _plain(x, weights, [{k: v.to(x.dtype) for k, v in ab.items()} for ab in adapters], scale=scale, u=u)

    outs, grads = _gradients(lora_linears, inputs)
    plain_outs, plain = _gradients(cast, inputs)
    assert all(y.dtype == torch.bfloat16 for y in outs) and all(grads[f"{n}{i}"].dtype == torch.float32 for n in "AB" for i in range(3))
    pairs_of = [(got, low, want) for got, low, want in zip(outs, plain_outs, exact_outs, strict=True)]
    pairs_of += [(grads[name], plain[name], exact[name]) for name in exact]
    for got, separate, want in pairs_of:
        assert relative_error(got, want) <= 1.5 * relative_error(separate, want) + 1e-3


@pytest.mark.parametrize("with_u", [False, True])
def test_nothing_of_the_size_of_an_output_is_saved(with_u):
    """Saved: the input (and u), the rank-r product, and the leaves themselves."""
    x, weights, adapters, u = _inputs(tokens=50, with_u=with_u)
    known = {leaf.data_ptr() for leaf in (x, u, *weights, *(leaf for ab in adapters for leaf in ab.values())) if leaf is not None}
    kept = []

    def pack(tensor):
        if tensor.data_ptr() not in known:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outs = lora_linears(x, weights, adapters, scale=SCALE, u=u)
    assert kept == [(50, 2 + 3 + 1)] and len(outs) == 3


def test_a_second_derivative_is_refused_rather_than_wrong():
    x, weights, adapters, _ = _inputs(base=True)
    value = lora_linears(x, weights, adapters, scale=SCALE)[0].square().sum()
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()
