"""Estimators of the divergence against worked numbers, what they are expected to be, and their gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap

from treetune.losses import divergence

ESTIMATORS = {"k1": divergence.k1, "k2": divergence.k2, "k3": divergence.k3}
ORACLES = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(-d) - 1 + d}


def _d(x):
    return torch.tensor(x, dtype=torch.float64)


# Fixture G of the loss contract, its five scored tokens.
LOGP = _d([-1, -0.5, -2, -0.3, -1.2])
OLD = _d([-1.2, -0.5, -1.5, -0.6, -1])
REF = _d([-1.1, -0.6, -1.8, -0.3, -1.5])
D = [0.1, 0.1, -0.2, 0, 0.3]


def test_worked_numbers():
    """EX-2."""
    assert divergence.k1(LOGP, REF).tolist() == pytest.approx(D, abs=1e-9)
    assert divergence.k2(LOGP, REF).tolist() == pytest.approx([0.005, 0.005, 0.02, 0, 0.045], abs=1e-9)
    k3 = divergence.k3(LOGP, REF)
    assert k3.tolist() == pytest.approx([0.00483742, 0.00483742, 0.02140276, 0, 0.04081822], abs=5e-9)
    assert k3.mean().item() == pytest.approx(0.0143791630, abs=1e-9)


def test_worked_gradients_of_the_mean():
    """EX-2: plain k3 is off; multiplied by the ratio its gradient on the policy's own samples is d / 5."""
    plain = grad(lambda x: divergence.k3(x, REF).mean())(LOGP)
    assert plain.tolist() == pytest.approx([0.019033, 0.019033, -0.044281, 0, 0.051836], abs=5e-7)

    def loss(x):
        return divergence.corrected(divergence.k3(x, REF), (x - LOGP).exp()).mean()

    assert loss(LOGP).item() == pytest.approx(0.0143791630, abs=1e-9)
    assert grad(loss)(LOGP).tolist() == pytest.approx([d / 5 for d in D], abs=1e-12)


def test_worked_metrics_of_both_kinds():
    """EX-21: register 20, the same config and another number with and without the correction."""
    k3 = divergence.k3(LOGP, REF)
    assert divergence.corrected(k3, (LOGP - OLD).exp()).mean().item() == pytest.approx(0.0114292831, abs=1e-9)
    assert k3.mean().item() == pytest.approx(0.0143791630, abs=1e-9)


@pytest.mark.parametrize("name", ESTIMATORS)
@settings(deadline=None, derandomize=True, max_examples=60)
@given(logp=st.lists(st.floats(-20, 0), min_size=1, max_size=6), shift=st.floats(-12, 12))
def test_the_same_as_loops(name, logp, shift):
    x, ref = _d(logp), _d(logp) - shift
    want = [ORACLES[name](a - b) for a, b in zip(x.tolist(), ref.tolist(), strict=True)]
    assert ESTIMATORS[name](x, ref).tolist() == pytest.approx(want, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_gradcheck(name):
    gen = torch.Generator().manual_seed(0)
    x, ref, old = (-3 * torch.rand(9, generator=gen, dtype=torch.float64) for _ in range(3))
    args = (x.requires_grad_(), ref.requires_grad_())
    assert torch.autograd.gradcheck(ESTIMATORS[name], args)
    assert torch.autograd.gradcheck(lambda a, b: ESTIMATORS[name](a, b, clamp=0.5), args)
    assert torch.autograd.gradcheck(lambda a, b: divergence.corrected(ESTIMATORS[name](a, b), (a - old).exp()), args)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("clamp", [None, 0.5])
def test_per_example_gradients(name, clamp):
    gen = torch.Generator().manual_seed(1)
    x, ref = (-3 * torch.rand(4, 6, generator=gen, dtype=torch.float64) for _ in range(2))

    def loss(a, b):
        return divergence.corrected(ESTIMATORS[name](a, b, clamp=clamp), (a - a.detach()).exp()).sum()

    assert torch.equal(vmap(grad(loss))(x, ref), torch.stack([grad(loss)(a, b) for a, b in zip(x, ref, strict=True)]))


def test_expectations_under_the_policy():
    """Exact sums over a vocabulary of five: k1 and k3 are unbiased, k2 is not, and which gradients are the divergence's."""
    gen = torch.Generator().manual_seed(2)
    z, ref = torch.randn(5, generator=gen, dtype=torch.float64), torch.randn(5, generator=gen, dtype=torch.float64).log_softmax(0)
    p = z.softmax(0)
    kl = (p * (p.log() - ref)).sum().item()
    means = {name: (p * fn(p.log(), ref)).sum().item() for name, fn in ESTIMATORS.items()}
    assert means["k1"] == pytest.approx(kl, abs=1e-12) and means["k3"] == pytest.approx(kl, abs=1e-12)
    assert abs(means["k2"] - kl) > 1e-3

    def true(z):
        return (z.softmax(0) * (z.log_softmax(0) - ref)).sum()

    def sampled(fn):  # the loss of each word, weighted by how often it is drawn
        return grad(lambda z: (p * fn(z.log_softmax(0))).sum())(z)

    want = grad(true)(z)
    assert torch.allclose(sampled(lambda logp: divergence.k2(logp, ref)), want, rtol=0, atol=1e-12)
    right = sampled(lambda logp: divergence.corrected(divergence.k3(logp, ref), (logp - p.log()).exp()))
    assert torch.allclose(right, want, rtol=0, atol=1e-12)
    assert sampled(lambda logp: divergence.k1(logp, ref)).abs().max() < 1e-12
    assert (sampled(lambda logp: divergence.k3(logp, ref)) - want).abs().max() > 1e-3
    reverse = grad(lambda z: (ref.exp() * (ref - z.log_softmax(0))).sum())(z)  # what it is instead: KL(reference || policy)
    assert torch.allclose(sampled(lambda logp: divergence.k3(logp, ref)), reverse, rtol=0, atol=1e-12)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=6))
def test_k2_and_k3_are_never_below_0_and_are_0_on_equal_policies(d):
    x = _d([-1.0] * len(d))
    for fn in (divergence.k2, divergence.k3):
        # expm1 is good to an ulp, so what is left below 0 is rounding of d
        assert (fn(x, x - _d(d)) >= -1e-15).all() and not fn(x, x).any()
    for fn in ESTIMATORS.values():
        assert not fn(x, x).any()


def test_a_clamp_bounds_what_overflows_and_leaves_the_rest():
    x, ref = torch.tensor([-200.0, -1.0, -0.5]), torch.tensor([-1.0, -1.5, -5.0])
    assert divergence.k3(x, ref)[0] == math.inf
    got = divergence.k3(x, ref, clamp=20.0)
    assert got[0].item() == pytest.approx(math.exp(20) - 1 - 20, rel=1e-6)
    assert torch.equal(got[1:], divergence.k3(x, ref)[1:])
    assert divergence.k1(x, ref, clamp=20.0).tolist() == [-20.0, 0.5, 4.5]
    assert divergence.k2(x, ref, clamp=20.0).tolist() == [200.0, 0.125, 10.125]
    for fn in ESTIMATORS.values():
        slope = grad(lambda x, fn=fn: fn(x, ref, clamp=20.0).sum())(x)
        assert slope[0] == 0 and slope[1:].all()
    for bad in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="clamp"):
            divergence.k3(x, ref, clamp=bad)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_nan_shows_in_its_own_token_only(name):
    x, ref = _d([-1, math.nan, -2]).requires_grad_(), _d([-2, -1, -1])
    found = ESTIMATORS[name](x, ref)
    assert found.isnan().tolist() == [False, True, False]
    (slope,) = torch.autograd.grad(found[[0, 2]].sum(), x)
    assert slope[[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_no_tokens(name):
    empty = _d([]).requires_grad_()
    found = divergence.corrected(ESTIMATORS[name](empty, empty.detach()), empty)
    assert found.shape == (0,) and found.sum() == 0 and torch.autograd.grad(found.sum(), empty)[0].shape == (0,)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32(name, dtype):
    gen = torch.Generator().manual_seed(3)
    x, ref = ((-3 * torch.rand(64, generator=gen)).to(dtype) for _ in range(2))
    got, want = ESTIMATORS[name](x, ref), ESTIMATORS[name](x.double(), ref.double())
    assert got.dtype == torch.float32
    assert ((got - want).abs() <= 1e-5 * want.abs() + 1e-9).all()


def test_small_differences_keep_their_digits_in_float32():
    """1 - 1e-4 rounds to 24 bits: e^-d - 1 + d as written is off by more than its value."""
    x, ref = torch.tensor([-1.0]), torch.tensor([-1.0 - 2**-14])
    exact = math.expm1(-(2.0**-14)) + 2.0**-14
    assert divergence.k3(x, ref).item() == pytest.approx(exact, rel=5e-3)
    d = x - ref
    assert abs(((-d).exp() - 1 + d).item() - exact) > 0.5 * exact
