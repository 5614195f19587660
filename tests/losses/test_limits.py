"""Arithmetic of limits: values, gradients, and that no nan is made or hidden."""

import math

import pytest
import torch
from torch.func import grad, vmap

from treetune.losses import limits

INF, NAN = math.inf, math.nan
ONES = {
    "exp": (limits.exp, torch.exp), "expm1": (limits.expm1, torch.expm1),
    "excess": (limits.excess, lambda x: torch.expm1(x) - x), "square": (limits.square, torch.square),
    "logsigmoid": (limits.logsigmoid, torch.nn.functional.logsigmoid),
}  # fmt: skip


def t(*xs, dtype=torch.float64):
    return torch.tensor(xs, dtype=dtype)


def slope(fn, x, upstream=1.0):
    x = x.clone().requires_grad_()
    return torch.autograd.grad((fn(x) * upstream).sum(), x)[0]


@pytest.mark.parametrize("name", ONES)
def test_ordinary_numbers_are_those_of_torch(name):
    ours, theirs = ONES[name]
    x = torch.linspace(-30, 30, 41, dtype=torch.float64)
    assert torch.equal(ours(x), theirs(x))
    torch.testing.assert_close(slope(ours, x), slope(theirs, x), rtol=1e-14, atol=1e-14)
    small = torch.linspace(-2, 2, 9, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(ours, small) and torch.autograd.gradgradcheck(ours, small)
    rows = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stacked = vmap(grad(lambda row: ours(row).square().sum()))(rows)
    torch.testing.assert_close(stacked, slope(lambda row: theirs(row).square(), rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ONES)
def test_what_is_left_out_has_a_gradient_of_0_wherever_it_stands(name, dtype):
    ours, _ = ONES[name]
    x = t(-INF, -1e3, -89, 89, 1e3, INF, NAN, dtype=dtype)
    assert (slope(ours, x, 0.0) == 0)[:6].all()
    kept = torch.zeros_like(x, dtype=torch.bool)
    assert (slope(lambda y: torch.where(kept, ours(y), 0.0), x) == 0).all(), "a mask, also over nan"
    assert slope(ours, x)[6].isnan() and ours(x)[6].isnan()


def test_limits_of_values_and_slopes():
    x = t(-INF, INF)
    assert limits.exp(x).tolist() == [0, INF] and slope(limits.exp, x).tolist() == [0, INF]
    assert limits.expm1(x).tolist() == [-1, INF] and slope(limits.expm1, x).tolist() == [0, INF]
    assert limits.excess(x).tolist() == [INF, INF] and slope(limits.excess, x).tolist() == [-1, INF]
    assert slope(limits.excess, t(2.0), INF).tolist() == [INF], "no inf - inf of two paths"


@pytest.mark.parametrize(
    ("x", "y", "value"),
    [(-INF, -INF, 0), (INF, INF, 0), (INF, -INF, INF), (-INF, 2, -INF), (2, -INF, INF), (3, 1, 2), (NAN, 1, NAN), (-INF, NAN, NAN)],
)
def test_differences(x, y, value):
    got = limits.minus(t(x), t(y))
    assert got.isnan() if math.isnan(value) else got == value
    same = math.isinf(x) and x == y
    assert slope(lambda a: limits.minus(a, t(y)), t(x)) == (0 if same else 1)
    assert slope(lambda b: limits.minus(t(x), b), t(y)) == (0 if same else -1)


@pytest.mark.parametrize(
    ("x", "y", "value"), [(0, INF, 0), (0, -INF, 0), (INF, 0, 0), (2, INF, INF), (-2, INF, -INF), (0, NAN, NAN), (2, 3, 6), (0, 5, 0)]
)
def test_products(x, y, value):
    for first in (t(x), float(x)):
        got = limits.times(first, t(y))
        assert got.isnan() if math.isnan(value) else got == value
    if not math.isnan(value):
        assert not slope(lambda b: limits.times(t(x), b), t(y)).isnan() and not slope(lambda a: limits.times(a, t(y)), t(x)).isnan()


def test_products_and_differences_by_differences_and_batched():
    x, y = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(limits.times, (x, y)) and torch.autograd.gradcheck(limits.minus, (x, y))
    rows = torch.stack([x.detach(), t(0, INF, -INF, 1, 2, 3)])
    assert not vmap(grad(lambda a: limits.times(0.0, limits.minus(a, a.detach())).sum()))(rows).isnan().any()


def test_what_is_ruled_out_rules_out_a_sum():
    assert limits.capped(t(INF, -INF, 3)).sum() == -INF and limits.capped(t(INF, 3)).sum() == 1e30
    assert limits.capped(t(NAN)).isnan() and slope(limits.capped, t(-INF, 2)).tolist() == [1, 1]
