"""Advantages against worked numbers, loops over exact fractions, and what must hold for every estimator."""

import importlib.util
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treetune.losses import advantage

spec = importlib.util.spec_from_file_location("oracle_advantage", Path(__file__).parents[1] / "oracle" / "advantage.py")
oracle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oracle)

NAN = math.nan
WITHIN = {  # compare with the group's own completions
    "centered": (advantage.centered, oracle.centered),
    "group_scaled": (advantage.group_scaled, oracle.group_scaled),
    "group_scaled ddof 0": (partial(advantage.group_scaled, eps=1e-8, ddof=0), partial(oracle.group_scaled, eps=1e-8, ddof=0)),
    "batch_scaled": (advantage.batch_scaled, oracle.batch_scaled),
    "batch_scaled ddof 0": (partial(advantage.batch_scaled, eps=1e-3, ddof=0), partial(oracle.batch_scaled, eps=1e-3, ddof=0)),
    "rloo": (advantage.rloo, oracle.rloo),
    "rloo_normalized": (advantage.rloo_normalized, oracle.rloo_normalized),
}
ACROSS = {
    "batch_centered": (advantage.batch_centered, oracle.batch_centered),
    "reinforce": (advantage.reinforce, oracle.reinforce),
}
EVERY = WITHIN | ACROSS
WEIGHTS = [1.0, -0.5, 2.0]


def _gdpo(rewards):
    """On three functions made of one reward, so that estimators of [P, G] and this one share tests."""
    columns = torch.stack([rewards, rewards**2, 0 * rewards + 1], dim=-1)
    return advantage.gdpo(columns, _d(WEIGHTS))


def _d(x):
    return torch.tensor(x, dtype=torch.float64)


def _near(got, want, tol=1e-9):
    want = _d(want)
    assert got.shape == want.shape and got.dtype == torch.float64
    assert (got - want).abs().max().item() <= tol, (got, want)


# Multiples of 1/8 are exact, so that equal rewards are equal; a fifth of the entries abstains.
REWARD = st.one_of(*[st.integers(-24, 24).map(lambda n: n / 8)] * 4, st.just(NAN))


@st.composite
def batches(draw):
    count, size = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    return [[draw(REWARD) for _ in range(size)] for _ in range(count)]


@st.composite
def several(draw):
    count, size = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    return [[[draw(REWARD) for _ in WEIGHTS] for _ in range(size)] for _ in range(count)]


def test_worked_numbers_of_one_reward():
    """EX-16: the contract's digits come of a float32 eps; the closed forms are exact."""
    rewards = _d([[1, 0, 0, 1], [1, 1, 1, 1]])
    signs = _d([[1, -1, -1, 1], [0, 0, 0, 0]])
    _near(advantage.group_scaled(rewards), (0.5 / (math.sqrt(1 / 3) + 1e-4) * signs).tolist())
    _near(advantage.group_scaled(rewards), (0.8658754169 * signs).tolist(), 1e-6)
    whole = math.sqrt((6 * 0.25**2 + 2 * 0.75**2) / 7)
    assert whole == pytest.approx(0.46291006, abs=1e-7)
    _near(advantage.batch_scaled(rewards), (0.5 / (whole + 1e-4) * signs).tolist())
    _near(advantage.batch_scaled(rewards), (1.0798901427 * signs).tolist(), 1e-6)
    _near(advantage.centered(rewards), (0.5 * signs).tolist(), 0)
    _near(advantage.group_scaled(_d([[1, 0]])), [[0.7070067953, -0.7070067953]], 1e-6)
    _near(advantage.group_scaled(_d([[1e-4, 0]])), [[0.2928932188, -0.2928932188]])


def test_worked_numbers_with_a_reward_that_abstains():
    """EX-17, and register 3: counting nan as 0 would give 0.865875 to all."""
    _near(advantage.group_scaled(_d([[1, NAN, 0, 1]])), [[0.5772502865, 0, -1.1545005730, 0.5772502865]])
    _near(advantage.group_scaled(_d([[1, NAN, NAN, NAN]])), [[0, 0, 0, 0]], 0)
    _near(advantage.rloo(_d([[1, NAN, 0, 1]])), [[0.5, 0, -1, 0.5]], 1e-12)


def test_worked_numbers_of_several_rewards():
    """EX-18 and EX-18b."""
    first, w = _d([[[1, 1], [0, 0]], [[0, 1], [1, 1]]]), _d([1, 0.5])
    _near(advantage.gdpo(first, w), [[1.0189514040, -1.0189514040], [-0.6793009360, 0.6793009360]], 1e-6)
    summed = advantage.group_scaled(advantage.combined(first, w))
    _near(summed, [[0.7070401208, -0.7070401208], [-0.7070067953, 0.7070067953]], 1e-6)
    second = _d([[[1, 0], [0, 0]], [[0, 2], [0.5, 2]]])
    _near(advantage.gdpo(second, w), [[0.8659805300, -0.8659805300], [-0.8658580964, 0.8658580964]], 1e-6)
    alone = torch.cat([advantage.gdpo(second[:1], w), advantage.gdpo(second[1:], w)])
    assert alone.abs().tolist() == [[pytest.approx(0.70704, abs=2e-4)] * 2] * 2  # register 4: another estimator, group by group


def test_worked_numbers_of_leave_one_out():
    rewards = _d([[1, 0, 0, 1]])
    signs = _d([[1, -1, -1, 1]])
    _near(advantage.rloo(rewards), (2 / 3 * signs).tolist(), 1e-12)
    _near(advantage.rloo(rewards), (4 / 3 * (rewards - 0.5)).tolist(), 1e-12)
    _near(advantage.rloo_normalized(rewards), (2 / 3 / (4 / 3 / math.sqrt(3) + 1e-4) * signs).tolist())
    _near(advantage.rloo_normalized(rewards), (0.8659129055 * signs).tolist(), 1e-6)
    shaped = advantage.penalized(_d([[1, 0]]), _d([[0.5, -0.5]]), beta=0.05)
    _near(advantage.rloo(shaped), [[0.95, -0.95]])


def test_population_deviation_is_a_parameter():
    """Register 21: the same rewards as another trainer scales them."""
    found = advantage.group_scaled(_d([[1, 0, 0, 1]]), eps=1e-8, ddof=0)
    _near(found, [[0.99999998, -0.99999998, -0.99999998, 0.99999998]], 1e-9)


def test_worked_numbers_of_generalized_advantages():
    """EX-27: gamma 1, lambda 0.95."""
    found, returns = advantage.gae(_d([0.1, 0, 1]), _d([0.5, 0.4, 0.2]), gamma=1.0, lam=0.95)
    _near(found, [0.532, 0.56, 0.8])
    _near(returns, [1.032, 0.96, 1.0])


def test_whitening_removes_the_mean():
    """Register 22: a trainer that shifts the mean back in gives 2.07418 for the first."""
    found = advantage.whiten(_d([1, 2, 3, 6]))
    _near(found, [-0.92582, -0.46291, 0, 1.38873], 1e-5)
    _near(found, [(x - 3) / math.sqrt(14 / 3 + 1e-8) for x in (1, 2, 3, 6)])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", EVERY)
@settings(deadline=None, derandomize=True, max_examples=60)
@given(rewards=batches())
def test_the_same_as_loops_over_fractions(name, rewards):
    ours, theirs = EVERY[name]
    _near(ours(_d(rewards)), theirs(rewards), 1e-7 if "ddof 0" in name else 1e-9)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(rewards=several())
def test_several_rewards_are_the_same_as_loops(rewards):
    w = _d(WEIGHTS)
    got, want = advantage.combined(_d(rewards), w), _d(oracle.combined(rewards, WEIGHTS))
    assert torch.equal(got.isnan(), want.isnan()) and torch.allclose(got, want, rtol=0, atol=1e-12, equal_nan=True)
    # sums of functions that cancel are rounding, divided by a deviation of rounding plus eps: 1e-15 / 1e-4
    _near(advantage.gdpo(_d(rewards), w), oracle.gdpo(rewards, WEIGHTS), 1e-9)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.floats(-3, 3), max_size=12), st.floats(0, 1), st.floats(0, 1))
def test_generalized_advantages_are_the_same_as_sums(values, gamma, lam):
    rewards = [math.sin(3 * i) for i in range(len(values))]
    got, want = advantage.gae(_d(rewards), _d(values), gamma=gamma, lam=lam), oracle.gae(rewards, values, gamma, lam)
    for a, b in zip(got, want, strict=True):
        assert a.tolist() == pytest.approx(b, abs=1e-10)


def test_limits_of_generalized_advantages():
    rewards, values = _d([0.1, 0, 1]), _d([0.5, 0.4, 0.2])
    _near(advantage.gae(rewards, values, gamma=1.0, lam=1.0)[1], [1.1, 1.0, 1.0], 1e-12)  # returns are sums of rewards
    _near(advantage.gae(rewards, values, gamma=0.5, lam=0.0)[0], [0.1 + 0.2 - 0.5, 0.1 - 0.4, 0.8], 1e-12)


@pytest.mark.parametrize("name", WITHIN)
@settings(deadline=None, derandomize=True, max_examples=30)
@given(rewards=batches(), shift=st.integers(-80, 80).map(lambda n: n / 8))
def test_a_constant_on_all_rewards_changes_nothing(name, rewards, shift):
    fn = WITHIN[name][0]
    assert torch.allclose(fn(_d(rewards) + shift), fn(_d(rewards)), rtol=0, atol=1e-7 if "ddof 0" in name else 1e-9)


@pytest.mark.parametrize("name", ["centered", "group_scaled", "rloo", "batch_scaled", "rloo_normalized"])
def test_the_baseline_is_that_of_the_group(name):
    """Raising the rewards of one prompt changes the advantages of no other, save through a deviation that the batch shares."""
    rewards = _d([[1, 0, 0.5], [0.25, 1, 0], [3, 1, 2]])
    raised = rewards + _d([[0], [10], [0]])
    before, after = WITHIN[name][0](rewards), WITHIN[name][0](raised)
    if name == "batch_scaled":
        before, after = before / before[0, 0], after / after[0, 0]
    assert torch.allclose(before, after, rtol=0, atol=1e-9)


def test_the_baseline_of_the_batch_is_that_of_the_batch():
    rewards = _d([[1.0, 1.0], [0.0, 0.0]])
    assert torch.equal(advantage.group_scaled(rewards), torch.zeros(2, 2, dtype=torch.float64))
    _near(advantage.batch_centered(rewards), [[0.5 / (math.sqrt(1 / 3) + 1e-4)] * 2, [-0.5 / (math.sqrt(1 / 3) + 1e-4)] * 2])
    assert torch.equal(advantage.reinforce(rewards), rewards)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", [*EVERY, "gdpo"])
@settings(deadline=None, derandomize=True, max_examples=30)
@given(rewards=batches(), seed=st.integers(0, 99))
def test_order_of_completions_and_of_prompts_does_not_matter(name, rewards, seed):
    fn = _gdpo if name == "gdpo" else EVERY[name][0]
    gen, x = torch.Generator().manual_seed(seed), _d(rewards)
    across, down = torch.randperm(x.shape[1], generator=gen), torch.randperm(x.shape[0], generator=gen)
    assert torch.allclose(fn(x[down][:, across]), fn(x)[down][:, across], rtol=0, atol=1e-7 if "ddof 0" in name else 1e-9)


@pytest.mark.parametrize("name", [*EVERY, "gdpo"])
@settings(deadline=None, derandomize=True, max_examples=30)
@given(rewards=st.lists(REWARD, min_size=1, max_size=6))
def test_a_completion_without_a_reward_is_as_if_it_were_not_there(name, rewards):
    fn = _gdpo if name == "gdpo" else EVERY[name][0]
    known = [i for i, r in enumerate(rewards) if not math.isnan(r)]
    got = fn(_d([rewards]))
    assert got.isfinite().all() and (got[0, _d(rewards).isnan()] == 0).all()
    if known:
        tol = 1e-7 if "ddof 0" in name else 1e-9
        assert torch.allclose(got[:, known], fn(_d([[rewards[i] for i in known]])), rtol=0, atol=tol)


@pytest.mark.parametrize("name", [*WITHIN, "gdpo"])
@pytest.mark.parametrize("value", [0.7, 1 / 3, 1e-30, -1e6, 0.1 + 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_flat_group_is_exactly_0(name, value, dtype):
    """Register 13: the mean of seven 0.7 in float32 is another number, and 6e-4 came of it."""
    fn = _gdpo if name == "gdpo" else WITHIN[name][0]
    flat = torch.full((7,), value, dtype=dtype)
    found = fn(torch.stack([flat, flat]))
    assert torch.equal(found, torch.zeros(2, 7, dtype=torch.float64))
    some = torch.where(torch.arange(7) == 3, NAN, flat)
    mixed = fn(torch.stack([flat, torch.arange(7).to(dtype), some]))
    assert not mixed[0].any() and mixed[1].any() and not mixed[2].any()


def test_seven_equal_float32_rewards():
    rewards = torch.full((1, 7), 0.7, dtype=torch.float32)
    assert rewards.mean() != rewards[0, 0] or rewards.std() > 0, "the trap has gone, so this shows nothing"
    for fn in (advantage.group_scaled, advantage.batch_scaled, advantage.batch_centered, advantage.rloo, advantage.centered):
        assert torch.equal(fn(rewards), torch.zeros(1, 7, dtype=torch.float64))
    assert advantage.zero_std(rewards) == 1


@settings(deadline=None, derandomize=True, max_examples=40)
@given(rewards=st.lists(st.floats(-2, 2), min_size=3, max_size=3), size=st.integers(2, 17))
def test_equal_rows_of_several_rewards_are_flat_after_their_sum(rewards, size):
    """Whatever order a kernel adds in, all rows of a batch are added alike."""
    every = _d([[rewards] * size] * 3)
    assert advantage.flat(advantage.combined(every, _d([0.1, 0.7, 1 / 3]))).all()


@pytest.mark.parametrize("name", [*WITHIN, "gdpo", "batch_centered"])
@pytest.mark.parametrize("rewards", [[[0.3]], [[NAN]], [[NAN, NAN, NAN]], [[NAN, 2.0, NAN]], [[0.3], [NAN]]])
def test_one_scorable_completion_has_no_advantage(name, rewards):
    fn = _gdpo if name == "gdpo" else EVERY[name][0]
    assert torch.equal(fn(_d(rewards)), torch.zeros_like(_d(rewards)))


def test_a_function_that_is_constant_or_abstains_adds_nothing():
    """To the sum; the mean of three 0.1 is not 0.1, which must not show."""
    base = _d([[[1], [0], [0]], [[0], [1], [1]]])
    constant, silent, lone = torch.full_like(base, 0.1), torch.full_like(base, NAN), torch.full_like(base, NAN)
    lone[0, 1] = 5.0
    alone = advantage.gdpo(base, _d([1.0]))
    assert torch.equal(advantage.gdpo(torch.cat([base, constant, silent, lone], -1), _d([1.0, 3, 3, 3])), alone)
    assert alone.any()


def test_weights_matter_and_a_row_without_an_opinion_has_no_reward():
    rewards = _d([[[1, 2], [NAN, 2], [1, NAN], [NAN, NAN]]])
    got = advantage.combined(rewards, _d([1, 0.5]))
    assert got[0, :3].tolist() == [2.0, 1.0, 1.0] and got[0, 3].isnan()
    assert advantage.combined(rewards, _d([0.0, 0.5]))[0, :3].tolist() == [1.0, 1.0, 0.0]


def test_share_of_groups_without_a_signal():
    """Register 14: half the groups of EX-16 are flat, and scaling by the batch does not change that."""
    rewards = _d([[1, 0, 0, 1], [1, 1, 1, 1]])
    assert advantage.flat(rewards).tolist() == [False, True]
    assert advantage.zero_std(rewards) == 0.5 and advantage.zero_std(rewards).ndim == 0
    more = _d([[1, NAN, 1], [NAN, 2, NAN], [NAN, NAN, NAN], [1, NAN, 2], [0.0, -0.0, 0.0]])
    assert advantage.flat(more).tolist() == [True, True, True, False, True]
    assert advantage.zero_std(more) == 0.8
    assert advantage.zero_std(torch.zeros(0, 4)).isnan()


def test_rewards_are_clipped_before_the_penalty():
    rewards, kl = _d([[7.0, -7.0, 0.5, NAN]]), _d([[2.0, -2.0, 0.0, 1.0]])
    got = advantage.penalized(rewards, kl, beta=0.1, low=-1.0, high=5.0)
    assert got[0, :3].tolist() == pytest.approx([4.8, -0.8, 0.5], abs=1e-12) and got[0, 3].isnan()
    assert advantage.penalized(rewards, kl, beta=0.0)[0, :3].tolist() == [7.0, -7.0, 0.5]
    assert advantage.penalized(rewards, kl, beta=0.0, high=5.0)[0, :3].tolist() == [5.0, -7.0, 0.5]
    with pytest.raises(ValueError, match="with 1 nan"):
        advantage.penalized(rewards, _d([[NAN, 0, 0, 0]]), beta=0.1)
    with pytest.raises(ValueError, match=r"kl \(1, 3\)"):
        advantage.penalized(rewards, kl[:, :3], beta=0.1)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_nothing_in_nothing_out(name, shape):
    assert EVERY[name][0](torch.zeros(shape)).shape == shape
    assert advantage.gdpo(torch.zeros(*shape, 2), torch.ones(2)).shape == shape
    assert advantage.combined(torch.zeros(*shape, 2), torch.ones(2)).shape == shape


def test_no_tokens():
    assert [x.shape for x in advantage.gae(_d([]), _d([]), gamma=1.0, lam=0.95)] == [(0,), (0,)]
    assert advantage.whiten(_d([])).shape == (0,)


@pytest.mark.parametrize("value", [0.7, 0.1 + 0.2])
@pytest.mark.parametrize("count", [1, 7])
def test_equal_advantages_whiten_to_0(value, count):
    assert torch.equal(advantage.whiten(torch.full((count,), value)), torch.zeros(count, dtype=torch.float64))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.integers(-50, 50), min_size=2, max_size=20).filter(lambda x: len(set(x)) > 1), st.floats(-9, 9))
def test_whitened_numbers_have_mean_0_and_variance_1(x, shift):
    got = advantage.whiten(_d(x) + shift)
    assert got.mean().abs() < 1e-9
    assert got.var().item() == pytest.approx(1, abs=1e-6)


def test_a_nan_in_what_is_whitened_shows():
    assert advantage.whiten(_d([1, NAN, 2])).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_any_dtype_is_computed_in_float64_without_a_gradient(dtype):
    rewards = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 1]]).to(dtype)
    if dtype.is_floating_point:
        rewards.requires_grad_()
    for fn in (pair[0] for pair in EVERY.values()):
        got = fn(rewards)
        assert got.dtype == torch.float64 and not got.requires_grad
        assert torch.equal(got, fn(rewards.detach().double()))


def test_arguments_are_not_changed():
    rewards = _d([[1, NAN, 0, 1]])
    before = rewards.clone()
    for ours, _ in EVERY.values():
        ours(rewards)
    advantage.whiten(rewards)
    assert torch.equal(rewards.nan_to_num(9), before.nan_to_num(9))


def test_what_is_refused():
    good = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"\(2, 3, 1\).*combined"):
        advantage.group_scaled(good[..., None])
    with pytest.raises(ValueError, match=r"\(2, 3\).*each function"):
        advantage.gdpo(good, torch.ones(1))
    with pytest.raises(ValueError, match="weights.*2 reward functions"):
        advantage.combined(torch.zeros(2, 3, 2), torch.ones(3))
    with pytest.raises(ValueError, match="weights"):
        advantage.combined(torch.zeros(2, 3, 2), _d([1, NAN]))
    with pytest.raises(ValueError, match=r"\[0, 1\] is infinite"):
        advantage.centered(_d([[0, math.inf], [0, 0]]))
    with pytest.raises(ValueError, match="ddof=2"):
        advantage.group_scaled(good, ddof=2)
    with pytest.raises(ValueError, match="tokens"):
        advantage.gae(_d([1, 2]), _d([1]), gamma=1.0, lam=1.0)
