"""Pair losses without a reference against worked numbers and a loop in Python floats."""

import math
import random
from functools import partial

import pytest
import torch
from torch.func import grad, vmap

from treetune.losses import reference_free
from treetune.losses.preference import Pairs

LOSSES = {
    "cpo": partial(reference_free.cpo, beta=0.1),
    "cpo smoothed": partial(reference_free.cpo, beta=0.1, label_smoothing=0.1),
    "cpo_hinge": partial(reference_free.cpo_hinge, beta=0.1),
    "cpo_ipo": partial(reference_free.cpo_ipo, beta=0.1),
    "simpo": partial(reference_free.simpo, beta=2.0, gamma=0.5),
    "alphapo": partial(reference_free.alphapo, beta=2.0, gamma=0.5, alpha=0.25),
    "alphapo below 0": partial(reference_free.alphapo, beta=2.0, gamma=0.5, alpha=-0.5),
    "odds_ratio": reference_free.odds_ratio,
    "orpo": partial(reference_free.orpo, beta=0.1),
    "tpo": partial(reference_free.tpo, beta=0.01, gamma=0.3),
}
FALLING = [name for name in LOSSES if name != "odds_ratio"]


def sig(x):
    return 1 / (1 + math.exp(-x))


def log_odds(mean):
    p = math.exp(min(mean, -1e-12))
    return math.log(p / -math.expm1(min(mean, -1e-12)))


def alpha_margin(a, b, alpha):
    return (1 - math.exp(a) ** -alpha) / alpha - (1 - math.exp(b) ** -alpha) / alpha


SUMS = {  # of S_c - S_r
    "cpo": lambda d: -math.log(sig(0.1 * d)),
    "cpo smoothed": lambda d: -0.9 * math.log(sig(0.1 * d)) - 0.1 * math.log(sig(-0.1 * d)),
    "cpo_hinge": lambda d: max(0, 1 - 0.1 * d),
}
MEANS = {  # of A_c, A_r
    "cpo_ipo": lambda a, b: (a - b - 5) ** 2,
    "simpo": lambda a, b: -math.log(sig(2 * (a - b) - 0.5)),
    "alphapo": lambda a, b: -math.log(sig(2 * alpha_margin(a, b, 0.25) - 0.5)),
    "alphapo below 0": lambda a, b: -math.log(sig(2 * alpha_margin(a, b, -0.5) - 0.5)),
    "odds_ratio": lambda a, b: log_odds(a) - log_odds(b),
    "orpo": lambda a, b: -0.1 * math.log(sig(log_odds(a) - log_odds(b))),
    "tpo": lambda a, b: -math.log(sig(0.01 * (a - b) - 0.3)),
}


def oracle(name, rows):
    if name in SUMS:
        return [SUMS[name](a - b) for a, b, _, _ in rows]
    return [MEANS[name](a / max(n, 1), b / max(m, 1)) for a, b, n, m in rows]


def _rows(count=25, seed=0, empty=True):
    gen = random.Random(seed)
    lens = [[gen.choice([0, 1, 2, 7, 40][not empty :]) for _ in range(2)] for _ in range(count)]
    return [(-(0.05 + 3 * gen.random()) * n, -(0.05 + 3 * gen.random()) * m, n, m) for n, m in lens]


def _pairs(rows, dtype=torch.float64):
    a, b, n, m = zip(*rows, strict=True) if rows else [()] * 4
    sums = torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype)
    return Pairs(*sums, None, None, torch.tensor(n, dtype=torch.int64), torch.tensor(m, dtype=torch.int64))


def _leaf(pairs):
    return pairs._replace(chosen=pairs.chosen.clone().requires_grad_(), rejected=pairs.rejected.clone().requires_grad_())


def _mean(name, pairs):
    return LOSSES[name](pairs).mean().item()


def test_worked_numbers():
    """EX-13 and EX-14."""
    sums = _pairs([(-1.75, -2.5, 3, 2), (-2.5, -2.0, 2, 3)])
    assert _mean("cpo", sums) == pytest.approx(0.6874048944, abs=1e-9)
    means = _pairs([(-0.5, -0.75, 1, 1), (-1.0, -0.8, 1, 1)])
    assert _mean("cpo_hinge", means) == pytest.approx(0.9975, abs=1e-9)
    assert _mean("cpo_ipo", means) == pytest.approx(24.80125, abs=1e-9)
    assert _mean("simpo", means) == pytest.approx(0.9671505276, abs=1e-9)
    assert _mean("alphapo", means) == pytest.approx(0.9828473349, abs=1e-9)
    assert _mean("orpo", means) == pytest.approx(0.0667119697, abs=1e-6)  # these three are float32 numbers
    assert reference_free.orpo(means, beta=1.0).mean().item() == pytest.approx(0.66711968, abs=1e-6)
    assert _mean("odds_ratio", means) == pytest.approx(0.10272807, abs=1e-6)


def test_the_means_of_the_worked_numbers_are_sums_over_lengths():
    means, scaled = _pairs([(-0.5, -0.75, 1, 1), (-1.0, -0.8, 1, 1)]), _pairs([(-1.5, -1.5, 3, 2), (-2.0, -4.0, 2, 5)])
    for name in MEANS:
        torch.testing.assert_close(LOSSES[name](scaled), LOSSES[name](means), rtol=1e-12, atol=0)
    for name in SUMS:
        assert (LOSSES[name](scaled) - LOSSES[name](means)).abs().max() > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_loop_oracle(name):
    rows = _rows(empty=name not in ("odds_ratio", "orpo")) + [(0.0, -4.0, 0, 2)]
    assert LOSSES[name](_pairs(rows)).tolist() == pytest.approx(oracle(name, rows), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_references_are_not_read(name):
    pairs = _pairs(_rows())
    nan = torch.full_like(pairs.chosen, math.nan)
    torch.testing.assert_close(LOSSES[name](pairs._replace(ref_chosen=nan, ref_rejected=nan)), LOSSES[name](pairs), rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_by_autograd_and_by_vmap(name):
    pairs = _leaf(_pairs(_rows(6, seed=1, empty=False)))

    def loss(chosen, rejected):
        return LOSSES[name](pairs._replace(chosen=chosen, rejected=rejected))

    def total(sides):
        return loss(*sides).square().sum()

    assert torch.autograd.gradcheck(loss, (pairs.chosen, pairs.rejected))
    both = torch.stack([pairs.chosen.detach(), pairs.rejected.detach()])
    stack = torch.stack([both, both - 0.7, both.flip(0)])
    for row, found in zip(stack, vmap(grad(total))(stack), strict=True):
        leaf = row.clone().requires_grad_()
        torch.testing.assert_close(found, torch.autograd.grad(total(leaf), leaf)[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_sides(name, dtype):
    """All compare the two sides, so the gradient is exactly 0; the values are those at a margin of 0."""
    theta = torch.tensor([-3.0, -0.2, -50.0], dtype=dtype, requires_grad=True)
    pairs = Pairs(theta, theta, None, None, torch.tensor([2, 1, 9]), torch.tensor([2, 1, 9]))
    value = LOSSES[name](pairs)
    assert (torch.autograd.grad(value.sum(), theta)[0] == 0).all()
    margin = {"simpo": 0.5, "alphapo": 0.5, "alphapo below 0": 0.5, "tpo": 0.3}
    want = {"cpo_hinge": 1.0, "cpo_ipo": 25.0, "odds_ratio": 0.0, "orpo": 0.1 * math.log(2)}.get(name)
    want = math.log1p(math.exp(margin.get(name, 0.0))) if want is None else want
    assert value.tolist() == pytest.approx([want] * 3, rel=1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("name", FALLING)
def test_the_likelier_the_chosen_side_the_lower_the_loss(name):
    pairs = _leaf(_pairs([(a, b, n, m) for a, b, n, m in _rows(empty=False) if abs(a / n - b / m) < 4 and abs(a - b) < 9]))
    chosen, rejected = torch.autograd.grad(LOSSES[name](pairs).sum(), (pairs.chosen, pairs.rejected))
    assert len(chosen) > 5 and (chosen < 0).all() and (rejected > 0).all()


def test_swapping_the_sides():
    pairs = _pairs(_rows())
    swapped = Pairs(pairs.rejected, pairs.chosen, None, None, pairs.len_rejected, pairs.len_chosen)
    torch.testing.assert_close(reference_free.odds_ratio(swapped), -reference_free.odds_ratio(pairs), rtol=1e-12, atol=0)
    h = 0.1 * (pairs.chosen - pairs.rejected)
    torch.testing.assert_close(LOSSES["cpo"](swapped) - LOSSES["cpo"](pairs), h, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_pairs_and_sides_without_tokens(name, dtype):
    """An average over no tokens is 0 / 0 in peers, and the odds of probability 1 are infinite."""
    assert LOSSES[name](_pairs([], dtype)).shape == (0,)
    pairs = _leaf(_pairs([(0.0, -3.0, 0, 4), (-3.0, 0.0, 4, 0), (0.0, 0.0, 0, 0), (0.0, -0.0, 3, 3)], dtype))
    value = LOSSES[name](pairs)
    grads = torch.autograd.grad(value.sum(), (pairs.chosen, pairs.rejected))
    assert value.dtype == dtype and all(torch.isfinite(x).all() for x in (value, *grads))


def test_orpo_at_probability_1():
    """Nearly 0 where only the chosen side is certain, log 2 where both are."""
    value = reference_free.orpo(_pairs([(0.0, -1.0, 3, 3), (0.0, 0.0, 3, 3)], torch.float32), beta=1.0)
    assert value.tolist() == pytest.approx([0.0, math.log(2)], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odds_are_accurate_on_both_sides_of_a_half(dtype):
    rows = [(-x, -1.0, 1, 1) for x in (1e-6, 1e-3, 0.1, 0.69, 0.7, 3.0, 30.0, 300.0)]
    rows = [(float(torch.tensor(a, dtype=dtype)), *rest) for a, *rest in rows]
    found = reference_free.odds_ratio(_pairs(rows, dtype)).tolist()
    assert found == pytest.approx(oracle("odds_ratio", rows), rel=1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1mexp_keeps_its_digits_on_both_sides(dtype):
    x = torch.tensor([-1e-6, -0.5, -0.6931, -0.6932, -1.0, -40.0, -80.0], dtype=dtype, requires_grad=True)
    wide = x.detach().double()
    value = reference_free._log1mexp(x)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    want = [math.log(-math.expm1(v)) if v > -1 else math.log1p(-math.exp(v)) for v in wide.tolist()]
    assert value.tolist() == pytest.approx(want, rel=tolerance, abs=0)
    assert torch.autograd.grad(value.sum(), x)[0].tolist() == pytest.approx([1 / -math.expm1(-v) for v in wide.tolist()], rel=tolerance)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_means_are_finite(name, dtype):
    """e^(alpha 800) is infinite in a form by probabilities."""
    pairs = _leaf(_pairs([(a, b, 1, 1) for a in (-9e3, -800.0, -1e-9) for b in (-9e3, -800.0, -1e-9)], dtype))
    value = LOSSES[name](pairs)
    grads = torch.autograd.grad(value.sum(), (pairs.chosen, pairs.rejected))
    assert all(torch.isfinite(x).all() for x in (value, *grads))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("field", ["chosen", "rejected"])
def test_a_nan_is_never_swallowed_and_never_spreads(name, field):
    pairs = _pairs(_rows(3, seed=2))
    getattr(pairs, field)[1] = math.nan
    assert LOSSES[name](pairs).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_sums_are_computed_in_float32(name, dtype):
    low = _pairs(_rows(25, seed=3, empty=False), dtype)
    found = LOSSES[name](low)
    assert found.dtype == torch.float32
    want = LOSSES[name](low._replace(chosen=low.chosen.double(), rejected=low.rejected.double()))
    # A log odds ratio is a difference of numbers near 1: its rounding is absolute.
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6 if name == "odds_ratio" else 1e-30)


@pytest.mark.parametrize("name", LOSSES)
def test_a_pair_does_not_depend_on_the_others(name):
    rows = _rows(5, seed=4)
    assert LOSSES[name](_pairs(rows)).tolist() == pytest.approx([LOSSES[name](_pairs([row])).item() for row in rows], rel=1e-14)


def test_limits():
    pairs = _pairs(_rows())
    torch.testing.assert_close(reference_free.alphapo(pairs, beta=2.0, gamma=0.5, alpha=0.0), LOSSES["simpo"](pairs), rtol=0, atol=0)
    near = reference_free.alphapo(pairs, beta=2.0, gamma=0.5, alpha=1e-9)
    torch.testing.assert_close(near, LOSSES["simpo"](pairs), rtol=1e-7, atol=0)
    free = reference_free.simpo(pairs, beta=2.0, gamma=0.0)
    assert (LOSSES["simpo"](pairs) > free).all(), "the margin is asked for"
    torch.testing.assert_close(LOSSES["tpo"](pairs), reference_free.simpo(pairs, beta=0.01, gamma=0.3), rtol=0, atol=0)
    torch.testing.assert_close(reference_free.orpo(pairs, beta=0.4), 4 * LOSSES["orpo"](pairs), rtol=1e-12, atol=0)


def test_label_smoothing_out_of_range():
    for eps in (-0.1, 0.5, math.nan):
        with pytest.raises(ValueError, match=f"label_smoothing={eps}: expected"):
            reference_free.cpo(_pairs(_rows()), beta=0.1, label_smoothing=eps)
