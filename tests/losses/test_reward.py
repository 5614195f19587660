"""Losses of reward models against worked numbers and a loop in Python floats."""

import math

import pytest
import torch
from torch.func import grad, vmap

from treetune.losses import reward

LOSSES = {
    "bradley_terry": reward.bradley_terry,
    "margin": lambda c, r: reward.bradley_terry(c, r, margin=0.3),
    "margins": lambda c, r: reward.bradley_terry(c, r, margin=torch.linspace(0, 1, len(c), dtype=torch.float64)),
    "centring": reward.centring,
}
ORACLES = {  # of the scores, and the place of a pair among n
    "bradley_terry": lambda c, r, i, n: math.log(1 + math.exp(r - c)),
    "margin": lambda c, r, i, n: math.log(1 + math.exp(0.3 + r - c)),
    "margins": lambda c, r, i, n: math.log(1 + math.exp(i / (n - 1) + r - c)),
    "centring": lambda c, r, i, n: (c + r) ** 2,
}
EX_15 = torch.tensor([1, 0.5], dtype=torch.float64), torch.tensor([0.25, 0.75], dtype=torch.float64)


def _random(n=9, seed=0, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(n, generator=gen, dtype=torch.float64)).to(dtype) for _ in range(2)]


def _steps(n=7, classes=3, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(n, classes, generator=gen, dtype=torch.float64), torch.randint(0, classes, (n,), generator=gen)


def test_worked_numbers():
    """EX-15."""
    plain = reward.bradley_terry(*EX_15)
    assert plain.mean().item() == pytest.approx(0.6064052130, abs=1e-9)
    margin = torch.tensor([0.5, 0.0], dtype=torch.float64)
    assert reward.bradley_terry(*EX_15, margin=margin).mean().item() == pytest.approx(0.7009394199, abs=1e-9)
    assert (plain + 0.01 * reward.centring(*EX_15)).mean().item() == pytest.approx(0.6220302130, abs=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_loop_oracle(name):
    c, r = _random()
    want = [ORACLES[name](a, b, i, 9) for i, (a, b) in enumerate(zip(c.tolist(), r.tolist(), strict=True))]
    assert LOSSES[name](c, r).tolist() == pytest.approx(want, rel=1e-12)


def test_steps_equal_the_loop_oracle():
    logits, classes = _steps()
    rows = zip(logits.tolist(), classes.tolist(), strict=True)
    want = [-math.log(math.exp(z[y]) / sum(math.exp(v) for v in z)) for z, y in rows]
    assert reward.process_reward(logits, classes).tolist() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_by_autograd_and_by_vmap(name):
    c, r = _random()
    assert torch.autograd.gradcheck(LOSSES[name], (c.clone().requires_grad_(), r.clone().requires_grad_()))
    stack = torch.stack([torch.stack([c, r]), torch.stack([r, c])])
    found = vmap(grad(lambda x: LOSSES[name](*x).square().sum()))(stack)
    for row, got in zip(stack, found, strict=True):
        leaf = row.clone().requires_grad_()
        (want,) = torch.autograd.grad(LOSSES[name](*leaf).square().sum(), leaf)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


def test_step_gradients_by_autograd_and_by_vmap():
    logits, classes = _steps()
    assert torch.autograd.gradcheck(lambda z: reward.process_reward(z, classes), logits.clone().requires_grad_())
    found = vmap(grad(lambda z, y: reward.process_reward(z[None], y[None]).sum()))(logits, classes)
    want = torch.softmax(logits, -1) - torch.eye(3, dtype=torch.float64)[classes]
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-15)


def test_ranking():
    c, r = _random()
    right, wrong = reward.bradley_terry(torch.maximum(c, r), torch.minimum(c, r)), reward.bradley_terry(*EX_15[::-1])
    assert (right < math.log(2)).all() and wrong[0] > math.log(2)
    torch.testing.assert_close(reward.bradley_terry(r, c) - reward.bradley_terry(c, r), c - r, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(reward.bradley_terry(c + 7, r + 7), reward.bradley_terry(c, r), rtol=1e-9, atol=0)
    assert torch.equal(reward.centring(c, -c), torch.zeros_like(c)) and (reward.centring(c, c) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_scores(dtype):
    theta = torch.tensor([1.5, -200.0], dtype=dtype, requires_grad=True)
    value = reward.bradley_terry(theta, theta)
    assert value.tolist() == pytest.approx([math.log(2)] * 2) and value.dtype == dtype
    assert (torch.autograd.grad(value.sum(), theta)[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_low_precision_scores_are_widened_before_the_difference(name, dtype):
    c, r = _random(dtype=dtype)
    found = LOSSES[name](c, r)
    assert found.dtype == (torch.float64 if name == "margins" else torch.float32)
    torch.testing.assert_close(found.double(), LOSSES[name](c.double(), r.double()), rtol=1e-5, atol=1e-30)
    margin = torch.full_like(c, 0.5)
    assert reward.bradley_terry(c, r, margin=margin).dtype == torch.float32
    logits, classes = _steps()
    want = reward.process_reward(logits.to(dtype).double(), classes)
    torch.testing.assert_close(reward.process_reward(logits.to(dtype), classes).double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_empty_extreme_and_nan(name):
    assert LOSSES[name](torch.zeros(0), torch.zeros(0)).shape == (0,)
    c = torch.tensor([9e3, -9e3, 0.0], requires_grad=True)
    value = LOSSES[name](c, -c)
    assert torch.isfinite(value).all() and torch.isfinite(torch.autograd.grad(value.sum(), c)[0]).all()
    broken = torch.tensor([0.0, math.nan, 1.0])
    for pair in ((broken, torch.zeros(3)), (torch.zeros(3), broken)):
        assert LOSSES[name](*pair).isnan().tolist() == [False, True, False]


def test_steps_at_the_edges():
    assert reward.process_reward(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)).shape == (0,)
    logits = torch.tensor([[0.0, -math.inf, 1.0], [math.nan, 0.0, 0.0], [9e3, 0.0, -9e3]], requires_grad=True)
    value = reward.process_reward(logits, torch.tensor([0, 1, 2]))
    assert value[0].item() == pytest.approx(math.log(1 + math.e)) and value[1].isnan() and value[2] == 18e3
    banned = torch.autograd.grad(value[0], logits)[0]
    assert torch.isfinite(banned[0]).all() and banned[0, 1] == 0
    assert reward.process_reward(logits, torch.tensor([1, 1, 2]))[0] == math.inf
