"""The way of tokens to their experts and back, against a loop."""

import pytest
import torch

from treetune.ops import routing

SHAPES = [(13, 3, 5), (1, 1, 4), (6, 4, 4), (0, 2, 3)]  # tokens, experts of each, experts


def _draw(tokens, k, experts, width=4, dtype=torch.float64):
    gen = torch.Generator().manual_seed(tokens)
    chosen = torch.rand(tokens, experts, generator=gen).argsort(1)[:, :k]
    x, weights = (torch.randn(tokens, size, generator=gen, dtype=torch.float64).to(dtype).requires_grad_() for size in (width, k))
    return chosen, x, weights


@pytest.mark.parametrize("shape", SHAPES)
def test_the_permutation(shape):
    chosen, _, _ = _draw(*shape)
    order, inverse, ends = routing.route(chosen, shape[2])
    assert ends.dtype == torch.int32 and torch.equal(order[inverse], torch.arange(chosen.numel()))
    assert ends.tolist() == [int((chosen <= e).sum()) for e in range(shape[2])]
    for e in range(shape[2]):
        mine = order[ends[e - 1] if e else 0 : ends[e]]
        assert (chosen.flatten()[mine] == e).all() and torch.equal(mine, mine.sort().values)


@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back_equals_a_loop_over_tokens(shape):
    """Expert e multiplies by e + 1: each token gets the weighted sum of its experts' results, and so does each gradient."""
    chosen, x, weights = _draw(*shape)
    tokens, k, experts = shape
    rule = routing.route(chosen, experts)
    factor = torch.repeat_interleave(torch.arange(experts) + 1.0, rule.ends.diff(prepend=torch.zeros(1, dtype=torch.int32)))
    y = routing.combine(routing.dispatch(x, rule, k) * factor[:, None], weights, rule)
    rows = [sum(((chosen[t, j] + 1.0) * weights[t, j] * x[t] for j in range(k)), torch.zeros(4)) for t in range(tokens)]
    want = torch.stack(rows) if rows else x * 1
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    up = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y)
    plain = torch.autograd.grad(want, [x, weights], up, allow_unused=True)
    for mine, theirs in zip(torch.autograd.grad(y, [x, weights], up), plain, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    chosen, x, weights = _draw(3, 2, 4)
    rule = routing.route(chosen, 4)
    assert torch.autograd.gradcheck(lambda x, w: routing.combine(routing.dispatch(x, rule, 2) * 3, w, rule), (x, weights))


def test_weights_stay_float32_beside_bfloat16():
    chosen, x, weights = _draw(9, 2, 3)
    x, weights = x.detach().bfloat16().requires_grad_(), weights.detach().float().requires_grad_()
    rule = routing.route(chosen, 3)
    y = routing.combine(routing.dispatch(x, rule, 2), weights, rule)
    d_x, d_weights = torch.autograd.grad(y.float().sum(), [x, weights])
    assert (y.dtype, d_x.dtype, d_weights.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    torch.testing.assert_close(d_weights, x.float().sum(1, keepdim=True).expand(9, 2), rtol=1e-6, atol=1e-6)


def test_two_runs_agree_bit_for_bit(poison):
    chosen, x, weights = _draw(50, 3, 7, dtype=torch.float32)

    def run():
        rule = routing.route(chosen, 7)
        y = routing.combine(routing.dispatch(x, rule, 3).sin(), weights, rule)
        return [y, *torch.autograd.grad(y.square().sum(), [x, weights])]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
