"""Ratios of two policies: the worked numbers, loops in float64, gradients, and what may not happen."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch.func import grad, vmap

from treetune.losses import ratio

spec = importlib.util.spec_from_file_location("oracle_policy_gradient", Path(__file__).parents[1] / "oracle" / "policy_gradient.py")
oracle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oracle)

LEVELS = {"token": ratio.token, "sequence": ratio.sequence, "sequence_token": ratio.sequence_token, "sequence_sum": ratio.sequence_sum}
LENS = torch.tensor([3, 0, 1, 6, 2, 0])
SEQ = torch.arange(6).repeat_interleave(LENS)
LOGP = torch.tensor([-1, -0.5, -2, -0.3, -1.2], dtype=torch.float64)
OLD = torch.tensor([-1.2, -0.5, -1.5, -0.6, -1], dtype=torch.float64)
G_LENS = torch.tensor([3, 2])
G_SEQ = torch.tensor([0, 0, 0, 1, 1])


def drawn(seed=0, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(12, generator=gen, dtype=torch.float64)
    return logp.to(dtype), (logp + 0.4 * torch.randn(12, generator=gen, dtype=torch.float64)).to(dtype)


def rows(x):
    return [list(part) for part in x.split(LENS.tolist())]


def test_worked_numbers_of_the_fixture():
    expected = [1.221403, 1, 0.606531, 1.349859, 0.818731]
    assert ratio.token(LOGP, OLD, G_SEQ, G_LENS).tolist() == pytest.approx(expected, abs=5e-7)
    means = [math.exp(-0.1)] * 3 + [math.exp(0.05)] * 2
    for fn in (ratio.sequence, ratio.sequence_token):
        assert fn(LOGP, OLD, G_SEQ, G_LENS).tolist() == pytest.approx(means, abs=1e-14)
    sums = [math.exp(-0.3)] * 3 + [math.exp(0.1)] * 2
    assert ratio.sequence_sum(LOGP, OLD, G_SEQ, G_LENS).tolist() == pytest.approx(sums, abs=1e-14)


@pytest.mark.parametrize("level", LEVELS)
def test_value_and_gradient_are_those_of_loops(level):
    (ours, old), weight = drawn(), torch.linspace(-1, 2, 12, dtype=torch.float64)
    ours.requires_grad_()
    value = LEVELS[level](ours, old, SEQ, LENS)
    theirs = ours.detach().clone().requires_grad_()
    flat = torch.stack([x for row in oracle.ratios(level, rows(theirs), rows(old)) for x in row])
    torch.testing.assert_close(value, flat, rtol=1e-13, atol=0)
    got, want = (torch.autograd.grad((weight * x).sum(), leaf)[0] for x, leaf in ((value, ours), (flat, theirs)))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("level", [name for name in LEVELS if name != "sequence_token"])
def test_gradients_by_differences(level):
    logp, old = drawn(3)
    assert torch.autograd.gradcheck(lambda x: LEVELS[level](x, old, SEQ, LENS), logp.requires_grad_())


def test_a_token_of_its_own_moves_with_the_value_of_its_sequence():
    """Not a true derivative: d r_t / d l_t is r of the sequence, and 0 for the other tokens."""
    logp, old = drawn()
    logp.requires_grad_()
    value = ratio.sequence_token(logp, old, SEQ, LENS)
    torch.testing.assert_close(value, ratio.sequence(logp, old, SEQ, LENS), rtol=1e-14, atol=0)
    jacobian = torch.stack([torch.autograd.grad(x, logp, retain_graph=True)[0] for x in value])
    torch.testing.assert_close(jacobian, torch.diag(value.detach()), rtol=1e-14, atol=0)


@pytest.mark.parametrize("level", LEVELS)
def test_vmap_of_grad(level):
    stack, old = torch.stack([drawn(i)[0] for i in range(3)]), drawn(5)[1]
    total = lambda x: LEVELS[level](x, old, SEQ, LENS).square().sum()  # noqa: E731
    for row, found in zip(stack, vmap(grad(total))(stack), strict=True):
        leaf = row.clone().requires_grad_()
        torch.testing.assert_close(found, torch.autograd.grad(total(leaf), leaf)[0])


@pytest.mark.parametrize("level", LEVELS)
def test_the_policy_itself_gives_exactly_1_with_a_gradient(level):
    logp = drawn()[0].float().requires_grad_()
    value = LEVELS[level](logp, logp.detach(), SEQ, LENS)
    assert (value == 1).all()
    slope = torch.autograd.grad(value.sum(), logp)[0]
    expected = LENS[SEQ].float() if level == "sequence_sum" else torch.ones(12)
    torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("level", LEVELS)
def test_overflow_is_inf_unless_the_exponent_is_clamped(level):
    old = torch.full((12,), -100.0)
    logp = torch.zeros(12, requires_grad=True)
    assert (LEVELS[level](logp, old, SEQ, LENS) == torch.inf).all()
    value = LEVELS[level](logp, old, SEQ, LENS, clamp=20.0)
    assert value.tolist() == pytest.approx([math.exp(20)] * 12, rel=1e-6)
    assert (torch.autograd.grad(value.sum(), logp)[0] == 0).all()
    torch.testing.assert_close(LEVELS[level](*drawn(), SEQ, LENS, clamp=20.0), LEVELS[level](*drawn(), SEQ, LENS), rtol=0, atol=0)


@pytest.mark.parametrize("level", LEVELS)
def test_a_nan_reaches_its_own_sequence_only(level):
    logp, old = drawn()
    logp[5] = torch.nan
    bad = LEVELS[level](logp, old, SEQ, LENS).isnan()
    assert bad[5] and not bad[SEQ != 3].any() and bad.sum() == (6 if level.startswith("sequence") else 1)


@pytest.mark.parametrize("level", LEVELS)
def test_low_precision_is_widened_and_nothing_is_nothing(level):
    logp, old = drawn(dtype=torch.bfloat16)
    got = LEVELS[level](logp, old, SEQ, LENS)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), LEVELS[level](logp.double(), old.double(), SEQ, LENS), rtol=1e-5, atol=0)
    none, index = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    for lens in (index, torch.zeros(3, dtype=torch.int64)):
        assert LEVELS[level](none, none, index, lens).shape == (0,)
