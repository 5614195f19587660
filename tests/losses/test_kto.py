"""Unpaired losses against worked numbers and a loop in Python floats."""

import math
import random
from functools import partial

import pytest
import torch
from torch.func import grad, vmap

from treetune.losses import kto

BETA = 0.1
Z0 = torch.tensor(0.3, dtype=torch.float64)
LOSSES = {
    "kto": lambda s, ref, good: kto.kto(s, ref, good, Z0),
    "kto weighted": lambda s, ref, good: kto.kto(s, ref, good, Z0, desirable_weight=1.3, undesirable_weight=0.7),
    "apo_zero": kto.apo_zero_unpaired,
    "apo_zero weighted": partial(kto.apo_zero_unpaired, beta=0.4, desirable_weight=0.5, undesirable_weight=1.05),
    "bco": lambda s, ref, good: kto.bco(s, ref, good, torch.tensor(-0.2, dtype=torch.float64)),
}


def sig(x):
    return 1 / (1 + math.exp(-x))


ORACLES = {  # of u and the class
    "kto": lambda u, good: 1 - sig(BETA * (u - 0.3)) if good else 1 - sig(BETA * (0.3 - u)),
    "kto weighted": lambda u, good: 1.3 * (1 - sig(BETA * (u - 0.3))) if good else 0.7 * (1 - sig(BETA * (0.3 - u))),
    "apo_zero": lambda u, good: 1 - sig(BETA * u) if good else sig(BETA * u),
    "apo_zero weighted": lambda u, good: 0.5 * (1 - sig(0.4 * u)) if good else 1.05 * sig(0.4 * u),
    "bco": lambda u, good: -math.log(sig(BETA * u + 0.2)) if good else -math.log(sig(-(BETA * u + 0.2))),
}


def _d(x):
    return torch.tensor(x, dtype=torch.float64)


EX_12 = _d([-1.5, -2, -0.5]), _d([-2, -1.5, -0.75]), torch.tensor([True, False, True])


def _random(count=20, seed=0):
    gen = random.Random(seed)
    ref = [-gen.random() * 30 for _ in range(count)]
    return _d([x + gen.gauss(0, 5) for x in ref]), _d(ref), torch.tensor([gen.random() < 0.5 for _ in range(count)], dtype=torch.bool)


def test_worked_numbers():
    """EX-12."""
    s, ref, good = EX_12
    z = kto.baseline(_d([-2, -3, -1.5]), _d([-2.5, -3.25, -1.25]))
    assert z.ndim == 0 and z.item() == pytest.approx(1 / 6, abs=1e-9)
    assert kto.kto(s, ref, good, z).mean().item() == pytest.approx(0.4909745401, abs=1e-9)
    assert kto.kto(s, ref, good, z, undesirable_weight=1.5).mean().item() == pytest.approx(0.5715311240, abs=1e-9)
    floor = kto.baseline(_d([-2, -3, -1.5]), _d([-1, -2, -1]))
    assert floor == 0 and kto.kto(s, ref, good, floor).mean().item() == pytest.approx(0.4895851775, abs=1e-9)
    assert kto.apo_zero_unpaired(s, ref, good).mean().item() == pytest.approx(0.4895851775, abs=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_loop_oracle(name):
    s, ref, good = _random()
    want = [ORACLES[name](a - b, c) for a, b, c in zip(s.tolist(), ref.tolist(), good.tolist(), strict=True)]
    assert LOSSES[name](s, ref, good).tolist() == pytest.approx(want, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("classes", ["mixed", "desirable", "undesirable"])
def test_any_batch_size_and_all_of_one_class(count, classes):
    """Odd batches and missing classes made nan, or matched pairs, in peers."""
    s, ref, good = _random(count, seed=count)
    good = good if classes == "mixed" else torch.full((count,), classes == "desirable")
    s_kl, ref_kl, _ = _random(count, seed=count + 10)
    differences = [a - b for a, b in zip(s_kl.tolist(), ref_kl.tolist(), strict=True)]
    z = kto.baseline(s_kl, ref_kl)
    z0 = max(0.0, sum(differences) / count)
    assert z.item() == pytest.approx(z0, rel=1e-12)
    want = [sig(BETA * (z0 - u) * (1 if c else -1)) for u, c in zip((s - ref).tolist(), good.tolist(), strict=True)]
    assert kto.kto(s, ref, good, z).tolist() == pytest.approx(want, rel=1e-12)


def test_the_baseline_carries_no_gradient_and_needs_no_rows():
    s = _d([-2.0, -3.0]).requires_grad_()
    assert not kto.baseline(s, _d([-2.5, -3.5])).requires_grad
    assert kto.baseline(_d([]), _d([])) == 0


def test_a_baseline_of_the_whole_step_makes_micro_batches_equal():
    """One from each micro-batch does not: the mean under max(0, .) depends on the split."""
    s, ref, good = _random(6)
    s_kl, ref_kl = _d([-1, -2, -3, -1, -1, -1]), _d([-3, -3, -3, 0, 0, 0])
    whole = kto.kto(s, ref, good, kto.baseline(s_kl, ref_kl))
    cuts = slice(0, 3), slice(3, 6)
    shared = torch.cat([kto.kto(s[i], ref[i], good[i], kto.baseline(s_kl, ref_kl)) for i in cuts])
    torch.testing.assert_close(shared, whole, rtol=0, atol=0)
    alone = torch.cat([kto.kto(s[i], ref[i], good[i], kto.baseline(s_kl[i], ref_kl[i])) for i in cuts])
    assert (alone - whole).abs().max() > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_a_nan_row_is_never_swallowed(name):
    """A mean that leaves nan out shows a healthy loss while the gradient is nan."""
    s, ref, good = EX_12
    for broken in ((s.clone(), ref), (s, ref.clone())):
        where = 0 if broken[0] is not s else 1
        broken[where][1] = math.nan
        value = LOSSES[name](*broken, good)
        assert value.isnan().tolist() == [False, True, False] and value.mean().isnan()
    assert kto.baseline(_d([-1.0, math.nan]), _d([-1.0, -1.0])).isnan()
    assert kto.kto(s, ref, good, _d(math.nan)).isnan().all()
    assert kto.bco(s, ref, good, _d(math.nan)).isnan().all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_by_autograd_and_by_vmap(name):
    s, ref, good = _random(8)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, ref, good), s.clone().requires_grad_())
    stack = torch.stack([s, s + 1, s - 3])
    found = vmap(grad(lambda x: LOSSES[name](x, ref, good).square().sum()))(stack)
    for row, got in zip(stack, found, strict=True):
        leaf = row.clone().requires_grad_()
        (want,) = torch.autograd.grad(LOSSES[name](leaf, ref, good).square().sum(), leaf)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", LOSSES)
def test_desirable_completions_rise_and_others_fall(name):
    s, ref, good = _random()
    (found,) = torch.autograd.grad(LOSSES[name](s.requires_grad_(), ref, good).sum(), s)
    assert (torch.where(good, -found, found) > 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_turning_both_the_class_and_the_log_ratio_is_the_same(name):
    """Where the two classes weigh the same and the baseline is 0."""
    zero = torch.zeros((), dtype=torch.float64)
    fns = {"kto": lambda *x: kto.kto(*x, zero), "apo_zero": kto.apo_zero_unpaired, "bco": lambda *x: kto.bco(*x, zero)}
    fn = fns[name.split()[0]]
    s, ref, good = _random()
    torch.testing.assert_close(fn(s, ref, good), fn(ref, s, ~good), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_sums_are_computed_in_float32(name, dtype):
    s, ref, good = _random()
    found = LOSSES[name](s.to(dtype), ref.to(dtype), good)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), LOSSES[name](s.to(dtype).double(), ref.to(dtype).double(), good), rtol=1e-5, atol=0)
    z = kto.baseline(s.to(dtype), ref.to(dtype))
    assert z.dtype == torch.float32 and z.item() == pytest.approx(
        kto.baseline(s.to(dtype).double(), ref.to(dtype).double()).item(), rel=1e-5
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_rows_and_extreme_rows(name, dtype):
    none = torch.zeros(0, dtype=dtype)
    assert LOSSES[name](none, none, none.bool()).shape == (0,)
    s = torch.tensor([-9e3, 0.0, 9e3] * 2, dtype=dtype, requires_grad=True)
    value = LOSSES[name](s, torch.zeros(6, dtype=dtype), torch.arange(6) < 3)
    assert value.dtype == dtype and torch.isfinite(value).all()
    assert torch.isfinite(torch.autograd.grad(value.sum(), s)[0]).all()


def test_kto_weights_keep_float64():
    """1.05 is not a float32 number: weights inside a `where` would be rounded to one."""
    found = kto.apo_zero_unpaired(_d([0.0]), _d([0.0]), torch.tensor([False]), undesirable_weight=1.05)
    assert found.item() == pytest.approx(0.525, abs=1e-15)


@pytest.mark.parametrize("cuts", [[7], [1, 1, 5], [3, 0, 4], [0, 7]])
def test_bco_state_is_the_mean_of_all_rewards_seen(cuts):
    rewards = _random(7)[0]
    running = kto.Running(torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64))
    for part in rewards.split(cuts):
        running = kto.update(running, part.requires_grad_())
    assert running.mean.item() == pytest.approx(sum(rewards.tolist()) / 7, rel=1e-12) and running.count == 7
    assert running.count.dtype == torch.int64 and not running.mean.requires_grad
    again = kto.update(running, rewards[:4].reshape(2, 2))
    assert again.mean.item() == pytest.approx((sum(rewards.tolist()) + sum(rewards[:4].tolist())) / 11, rel=1e-12)


def test_bco_state_keeps_its_dtype_and_shows_a_nan():
    running = kto.Running(torch.zeros(()), torch.zeros((), dtype=torch.int64))
    assert kto.update(running, torch.zeros(0)) == running
    after = kto.update(running, torch.tensor([1.0, 3.0], dtype=torch.bfloat16))
    assert after.mean.dtype == torch.float32 and after.mean == 2
    assert kto.update(after, torch.tensor([math.nan])).mean.isnan()


def test_bco_with_the_mean_reward_is_centred():
    """A shift of all log-ratios and of delta changes nothing."""
    s, ref, good = _random()
    plain = kto.bco(s, ref, good, _d(0.3))
    torch.testing.assert_close(kto.bco(s + 4, ref, good, _d(0.3 + BETA * 4)), plain, rtol=1e-12, atol=0)
