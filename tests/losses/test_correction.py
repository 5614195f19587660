"""Corrections for another sampling policy against worked numbers, loops in Python floats, and what they may not do."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap

from treetune.core import step
from treetune.losses import correction

spec = importlib.util.spec_from_file_location("oracle_advantage", Path(__file__).parents[1] / "oracle" / "advantage.py")
oracle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oracle)

NAN, INF = math.nan, math.inf
WEIGHTS = {
    "token truncate": correction.token_truncate,
    "token mask": correction.token_mask,
    "sequence truncate": correction.sequence_truncate,
    "sequence mask": correction.sequence_mask,
}


def _d(x):
    return torch.tensor(x, dtype=torch.float64)


# EX-23 on the five scored tokens of fixture G of the loss contract.
OLD, SAMPLER = _d([-1, -0.5, -2, -0.3, -1.2]), _d([-1.1, -2, -2, -0.3, -1])
LENS = torch.tensor([3, 2])
SEQ = torch.repeat_interleave(torch.arange(2), LENS)
LOGP, G_OLD, ADVANTAGE = _d([-1, -0.5, -2, -0.3, -1.2]), _d([-1.2, -0.5, -1.5, -0.6, -1]), _d([1, 1, 1, -0.5, -0.5])


def _clipped():
    """The policy term of fixture G, -min(r A, clip(r) A), written out."""
    r = (LOGP - G_OLD).exp()
    return -torch.minimum(r * ADVANTAGE, r.clamp(0.8, 1.2) * ADVANTAGE)


@st.composite
def streams(draw):
    """Sequences of (old, sampler) log-probs, some without tokens, a tenth of the tokens not scored by the sampler."""
    logp = st.floats(-6, 0)
    other = st.one_of(*[st.floats(-1.5, 1.5)] * 9, st.just(NAN))
    rows = draw(st.lists(st.lists(st.tuples(logp, other), max_size=6), min_size=1, max_size=5))
    return [[(old, old - gap) for old, gap in row] for row in rows]


def _packed(rows, which):
    lens = torch.tensor([len(row) for row in rows])
    return _d([token[which] for row in rows for token in row]), torch.repeat_interleave(torch.arange(len(rows)), lens), lens


def test_worked_weights():
    """EX-23, and registers 1 and 2: what is masked is 0, not 1 / cap, and nothing has a floor that was not asked for."""
    want = {
        "token truncate": [1.10517, 3, 1, 1, 0.81873],
        "token mask": [1.10517, 0, 1, 1, 0.81873],
        "sequence truncate": [3, 3, 3, 0.81873, 0.81873],
        "sequence mask": [0, 0, 0, 0.81873, 0.81873],
    }
    for name, fn in WEIGHTS.items():
        assert fn(OLD, SAMPLER, SEQ, LENS).tolist() == pytest.approx(want[name], abs=5e-6), name
    found = correction.token_truncate(OLD, SAMPLER, SEQ, LENS)
    assert found.tolist() == pytest.approx([math.exp(0.1), 3, 1, 1, math.exp(-0.2)], abs=1e-9)
    unscored = torch.where(torch.arange(5) == 1, NAN, SAMPLER)
    assert correction.token_truncate(OLD, unscored, SEQ, LENS).tolist() == pytest.approx([math.exp(0.1), 1, 1, 1, math.exp(-0.2)], abs=1e-9)
    small = correction.token_truncate(_d([-3]), _d([-1]), torch.zeros(1, dtype=torch.int64), torch.tensor([1]))
    assert small.item() == pytest.approx(0.13534, abs=5e-6)


def test_worked_loss_with_weights():
    """9.1: a token ratio multiplied into dapo on fixture G."""
    isr = _d([1, 2, 0, 0.5, 1])
    assert (_clipped() * isr).sum().item() / 5 == pytest.approx(-0.4906339843, abs=1e-9)
    rebuilt = correction.token_mask(isr.log().nan_to_num(neginf=-9), torch.zeros(5).double(), SEQ, LENS, low=1e-3)
    assert (_clipped() * rebuilt).sum().item() / 5 == pytest.approx(-0.4906339843, abs=1e-9)


def test_the_length_trap_and_the_way_out():
    """A bias of 0.0012 per token over 1000 tokens drops the whole sequence by default, and not by its mean."""
    old, lens = torch.zeros(1000).double(), torch.tensor([1000])
    args = (old, old - 0.0012, torch.zeros(1000, dtype=torch.int64), lens)
    assert correction.sequence_mask(*args, high=None)[0].item() == pytest.approx(3.32, abs=5e-3)
    assert not correction.sequence_mask(*args).any()
    assert correction.sequence_mask(*args, mean=True).tolist() == pytest.approx([math.exp(0.0012)] * 1000, abs=1e-9)
    assert correction.sequence_truncate(*args, mean=True)[0].item() == pytest.approx(math.exp(0.0012), abs=1e-9)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("bounds", [(None, 3.0), (0.5, 2.0), (0.5, None)])
@settings(deadline=None, derandomize=True, max_examples=40)
@given(rows=streams(), mean=st.booleans())
def test_weights_are_the_same_as_loops(name, bounds, rows, mean):
    level, how = name.split()
    mean = mean and level == "sequence"
    old, seq, lens = _packed(rows, 0)
    got = WEIGHTS[name](old, _packed(rows, 1)[0], seq, lens, low=bounds[0], high=bounds[1], mean=mean)
    want = [w for row in rows for w in oracle.importance([t[0] for t in row], [t[1] for t in row], level, how, *bounds, mean)]
    assert got.tolist() == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("name", WEIGHTS)
def test_bounds_are_inclusive_and_none_is_no_bound(name):
    args = (torch.zeros(2).double(), _d([0.0, -0.25]), torch.arange(2), torch.ones(2, dtype=torch.int64))
    inside = math.exp(0.25)
    for bounds in ({"high": inside}, {"low": 1.0, "high": None}, {"low": 1.0, "high": inside}):
        assert WEIGHTS[name](*args, **bounds).tolist() == [1.0, inside], bounds
    low, high = (1.2, 1.1) if name.endswith("truncate") else (0.0, 0.0)
    assert WEIGHTS[name](*args, low=1.2, high=None).tolist() == pytest.approx([low, inside])
    assert WEIGHTS[name](*args, high=1.1).tolist() == pytest.approx([1.0, high])


def test_a_mask_without_bounds_is_the_plain_ratio():
    got = correction.token_mask(OLD, SAMPLER, SEQ, LENS, high=None)
    assert torch.equal(got, (OLD - SAMPLER).exp())


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_is_refused(name):
    fn, args = WEIGHTS[name], (OLD, SAMPLER, SEQ, LENS)
    for bounds in ({"low": 3.0}, {"low": 4.0}, {"low": -1.0}, {"high": 0.0}, {"high": NAN}):
        with pytest.raises(ValueError, match="low"):
            fn(*args, **bounds)
    if name.endswith("truncate"):
        with pytest.raises(ValueError, match="both None"):
            fn(*args, low=None, high=None)
    if name.startswith("token"):
        with pytest.raises(ValueError, match="mean=True"):
            fn(*args, mean=True)


@pytest.mark.parametrize("name", WEIGHTS)
def test_equal_policies_and_unscored_tokens_weigh_1(name):
    assert WEIGHTS[name](OLD, OLD, SEQ, LENS).tolist() == [1.0] * 5
    assert WEIGHTS[name](OLD, torch.full_like(OLD, NAN), SEQ, LENS).tolist() == [1.0] * 5


@pytest.mark.parametrize("name", WEIGHTS)
def test_ratios_that_overflow_are_bounded(name):
    old, sampler = torch.tensor([-1.0, -1.0, -300.0]), torch.tensor([-300.0, -INF, -1.0])
    got = WEIGHTS[name](old, sampler, torch.arange(3), torch.ones(3, dtype=torch.int64))
    assert got.tolist() == ([3.0, 3.0, 0.0] if name.endswith("truncate") else [0.0, 0.0, 0.0])


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_nan_of_the_trainer_shows_in_its_sequence_only(name):
    old = torch.where(torch.arange(5) == 1, NAN, OLD)
    found = WEIGHTS[name](old, SAMPLER, SEQ, LENS).isnan().tolist()
    assert found == ([False, True, False, False, False] if name.startswith("token") else [True] * 3 + [False] * 2)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_constants(name):
    old, sampler = OLD.clone().requires_grad_(), SAMPLER.clone().requires_grad_()
    got = WEIGHTS[name](old, sampler, SEQ, LENS)
    assert not got.requires_grad
    x = LOGP.clone().requires_grad_()
    (slope,) = torch.autograd.grad((x * WEIGHTS[name](x, sampler, SEQ, LENS)).sum(), x)
    assert torch.equal(slope, WEIGHTS[name](LOGP, SAMPLER, SEQ, LENS))
    assert torch.autograd.gradcheck(lambda x: x * WEIGHTS[name](OLD, SAMPLER, SEQ, LENS), (x,))


@pytest.mark.parametrize("name", WEIGHTS)
def test_per_example_gradients(name):
    gen = torch.Generator().manual_seed(4)
    x, old, sampler = (-torch.rand(3, 5, generator=gen, dtype=torch.float64) for _ in range(3))
    advantage = torch.randn(3, 5, generator=gen, dtype=torch.float64)

    def loss(x, old, sampler, advantage):
        kept = correction.off_policy_mask(x, sampler, advantage, SEQ, LENS, threshold=0.05)
        return torch.where(kept, x.exp() * WEIGHTS[name](old, sampler, SEQ, LENS, high=1.3), 0.0).sum()

    got = vmap(grad(loss))(x, old, sampler, advantage)
    want = torch.stack([grad(loss)(*row) for row in zip(x, old, sampler, advantage, strict=True)])
    assert torch.allclose(got, want, rtol=0, atol=1e-14) and (want == 0).any() and want.any()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", [*WEIGHTS, "off_policy_mask"])
@settings(deadline=None, derandomize=True, max_examples=30)
@given(rows=streams(), seed=st.integers(0, 99))
def test_order_and_cut_do_not_matter(name, rows, seed):
    """Sequences in another order, and one by one."""
    gen = np.random.default_rng(seed)
    advantages = gen.standard_normal(len(rows))

    def run(order):
        some = [rows[i] for i in order]
        old, seq, lens = _packed(some, 0)
        sampler, signal = _packed(some, 1)[0], _d(advantages[list(order)].tolist())[seq]
        if name == "off_policy_mask":
            return correction.off_policy_mask(old, sampler, signal, seq, lens, threshold=0.1).split(lens.tolist())
        return WEIGHTS[name](old, sampler, seq, lens).split(lens.tolist())

    order = gen.permutation(len(rows)).tolist()
    whole, moved = run(range(len(rows))), run(order)
    for place, i in enumerate(order):
        assert torch.equal(moved[place], whole[i]) and torch.equal(run([i])[0], whole[i])


def test_worked_off_policy_mask():
    """EX-24: the second sequence of fixture G has drifted by 0.2, and its advantage is negative."""
    sampler = _d([-1, -0.5, -2, -0.1, -1])
    for threshold, value in ((0.15, -0.5613061319), (0.2 + 1e-12, -0.3444471759), (0.3, -0.3444471759)):
        keep = correction.off_policy_mask(LOGP, sampler, ADVANTAGE, SEQ, LENS, threshold=threshold)
        assert keep.dtype == torch.bool and keep[:3].all()
        assert torch.where(keep, _clipped(), 0.0).sum().item() / 5 == pytest.approx(value, abs=1e-9)
    assert correction.off_policy_mask(LOGP, sampler, -ADVANTAGE, SEQ, LENS, threshold=0.15).all()
    likelier = correction.off_policy_mask(LOGP, LOGP - 5, ADVANTAGE, SEQ, LENS, threshold=0.0)
    assert likelier.all(), "signed: a sequence that became more likely stays"


def test_a_token_that_the_sampler_could_not_score_does_not_drop_its_sequence():
    """EX-24, register 3."""
    sampler = _d([-1, -0.5, -2, NAN, -1])
    keep = correction.off_policy_mask(LOGP, sampler, ADVANTAGE, SEQ, LENS, threshold=0.15)
    assert keep.all() and torch.where(keep, _clipped(), 0.0).sum().item() / 5 == pytest.approx(-0.3444471759, abs=1e-9)


def test_off_policy_mask_at_its_bounds():
    one, row = torch.tensor([2]), torch.zeros(2, dtype=torch.int64)
    args = (_d([-1, -1]), _d([-0.5, -0.5]), _d([-1, -1]), row, one)
    assert correction.off_policy_mask(*args, threshold=0.5).all()  # inclusive
    assert not correction.off_policy_mask(*args, threshold=0.49).any()
    assert correction.off_policy_mask(*args[:2], _d([0, 0]), row, one, threshold=0.0).all()
    mixed = correction.off_policy_mask(*args[:2], _d([1, -1]), row, one, threshold=0.0)
    assert mixed.tolist() == [True, False]
    assert correction.off_policy_mask(_d([NAN, -1]), *args[1:], threshold=0.0).all(), "a nan of the policy must reach the loss"
    banned = correction.off_policy_mask(_d([-INF, -1]), *args[1:], threshold=9.0)
    assert not banned.any()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(rows=streams(), threshold=st.floats(-1, 1), seed=st.integers(0, 99))
def test_off_policy_mask_is_the_same_as_loops(rows, threshold, seed):
    old, seq, lens = _packed(rows, 0)
    signal = _d(np.random.default_rng(seed).choice([-1.0, 0.0, 1.0], len(rows)).tolist())[seq]
    got = correction.off_policy_mask(old, _packed(rows, 1)[0], signal, seq, lens, threshold=threshold)
    parts = [part.tolist() for part in signal.split(lens.tolist())]
    want = [
        keep
        for row, part in zip(rows, parts, strict=True)
        for keep in oracle.off_policy_keep([t[0] for t in row], [t[1] for t in row], part, threshold)
    ]
    assert got.tolist() == want


def test_off_policy_mask_is_constant():
    x = LOGP.clone().requires_grad_()
    keep = correction.off_policy_mask(x, _d([-1, -0.5, -2, -0.1, -1]), ADVANTAGE, SEQ, LENS, threshold=0.15)
    (slope,) = torch.autograd.grad(torch.where(keep, x, 0.0).sum(), x)
    assert slope.tolist() == [1, 1, 1, 0, 0]


ENTROPY = _d([0.1, 2, 1, 0.5, 3])


def test_worked_entropy_mask():
    """EX-25: the threshold 1.4 keeps two tokens, and the denominator stays."""
    least = correction.entropy_threshold(ENTROPY, quantile=0.4)
    assert least.ndim == 0 and least.item() == pytest.approx(1.4, abs=1e-9)
    keep = correction.entropy_mask(ENTROPY, least)
    assert ENTROPY[keep].tolist() == [2, 3]
    assert torch.where(keep, _clipped(), 0.0).sum().item() / 5 == pytest.approx(-0.1181269247, abs=1e-9)


def test_entropy_mask_at_its_bounds():
    def kept(x, quantile):
        return correction.entropy_mask(x, correction.entropy_threshold(x, quantile=quantile))

    assert kept(ENTROPY, 1.0).all() and ENTROPY[kept(ENTROPY, 0.0)].tolist() == [3]
    assert kept(_d([0.7] * 9), 0.2).all() and kept(_d([0.7]), 0.0).all() and kept(_d([]), 0.2).shape == (0,)
    assert correction.entropy_threshold(_d([]), quantile=0.2) == -INF
    assert kept(_d([1, NAN, 2]), 0.5)[1], "a nan must reach the loss"
    for bad in (-0.1, 1.1, NAN):
        with pytest.raises(ValueError, match="quantile"):
            correction.entropy_threshold(ENTROPY, quantile=bad)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=40), st.integers(0, 20).map(lambda n: n / 20), st.integers(0, 99))
def test_thresholds_are_the_same_as_loops(values, quantile, seed):
    least = correction.entropy_threshold(_d(values), quantile=quantile)
    assert least.item() == pytest.approx(oracle.upper_quantile(values, quantile), abs=1e-6 if 0 < quantile < 1 else 0)
    assert least.item() == pytest.approx(np.quantile(values, 1 - quantile), abs=1e-6)
    mixed = np.random.default_rng(seed).permutation(values).tolist()
    assert torch.equal(correction.entropy_threshold(_d(mixed), quantile=quantile), least)


@pytest.mark.parametrize("count", [6, 11, 101, 1001])
def test_rounding_of_the_rank_drops_no_token(count):
    """At a whole rank the threshold is a token's own entropy, which must be kept."""
    values = torch.arange(count).double() / 7
    for tenth in range(11):
        kept = correction.entropy_mask(values, correction.entropy_threshold(values, quantile=tenth / 10))
        assert kept.sum() == math.floor(tenth * (count - 1) / 10) + 1


def test_more_tokens_than_a_quantile_of_torch_takes():
    count = 2**24 + 1
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(torch.zeros(count), 0.5)
    assert correction.entropy_threshold(torch.zeros(count), quantile=0.2) == 0


def test_entropy_has_no_gradient_and_narrow_ones_are_widened():
    x = ENTROPY.clone().requires_grad_()
    assert not correction.entropy_threshold(x, quantile=0.4).requires_grad
    narrow = ENTROPY.bfloat16()
    assert correction.entropy_threshold(narrow, quantile=0.4).dtype == torch.float32
    least = correction.entropy_threshold(narrow, quantile=0.4).item()
    assert least == pytest.approx(1.4, abs=1e-6)


def _reduced(*collected):
    return {name: value.item() for name, value in step.reduce_metrics(list(collected)).items()}


def test_worked_metrics():
    """EX-23."""
    per_token = _reduced(correction.stats(OLD, SAMPLER, correction.token_truncate(OLD, SAMPLER, SEQ, LENS), SEQ, LENS))
    name, ratio = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"
    assert per_token[f"{name}/mean"] == pytest.approx(0.36, abs=1e-6) and per_token[f"{name}/max"] == pytest.approx(1.5, abs=1e-9)
    got = [per_token[f"{ratio}/{which}"] for which in ("min", "mean", "max")]
    assert got == pytest.approx([0.81873, 1.38478, 3], abs=5e-6)
    masked = correction.sequence_mask(OLD, SAMPLER, SEQ, LENS)
    per_sequence = _reduced(correction.stats(OLD, SAMPLER, masked, SEQ, LENS, by_sequence=True))
    assert [per_sequence[f"{ratio}/{which}"] for which in ("min", "mean", "max")] == pytest.approx([0, 0.40937, 0.81873], abs=5e-6)


@pytest.mark.parametrize("by_sequence", [False, True])
@settings(deadline=None, derandomize=True, max_examples=40)
@given(rows=streams(), cut=st.integers(0, 5))
def test_metrics_do_not_depend_on_the_split(by_sequence, rows, cut):
    """Weighted by their counts: means of means would weigh a short micro-batch like a long one."""
    fn = correction.sequence_truncate if by_sequence else correction.token_truncate

    def found(some):
        old, seq, lens = _packed(some, 0)
        sampler = _packed(some, 1)[0]
        return correction.stats(old, sampler, fn(old, sampler, seq, lens), seq, lens, by_sequence=by_sequence)

    parts = [some for some in (rows[:cut], rows[cut:]) if some]
    whole, split = _reduced(found(rows)), _reduced(*[found(some) for some in parts])
    for name, value in whole.items():
        assert split[name] == pytest.approx(value, abs=1e-5, nan_ok=True), name


def test_metrics_leave_out_what_was_not_scored_and_sequences_without_tokens():
    lens = torch.tensor([0, 2, 0, 1])
    seq = torch.repeat_interleave(torch.arange(4), lens)
    old, sampler = _d([-1, -1, -2]), _d([-1.5, NAN, -2.25])
    weight = correction.sequence_truncate(old, sampler, seq, lens)
    got = _reduced(correction.stats(old, sampler, weight, seq, lens, by_sequence=True))
    name, ratio = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"
    assert got[f"{name}/mean"] == pytest.approx(0.375) and got[f"{name}/max"] == 0.5
    assert got[f"{ratio}/mean"] == pytest.approx((math.exp(0.5) + math.exp(0.25)) / 2, abs=1e-6)
    nothing = _reduced(correction.stats(_d([]), _d([]), _d([]), seq[:0], torch.tensor([0, 0]), by_sequence=True))
    assert all(math.isnan(value) for value in nothing.values()) and {f"{name}/max", f"{ratio}/min", f"{ratio}/max"} <= nothing.keys()
    broken = _reduced(correction.stats(_d([NAN, -1, -2]), sampler, weight, seq, lens))
    assert math.isnan(broken[f"{name}/mean"]), "a nan of the trainer shows"


@pytest.mark.parametrize("name", WEIGHTS)
def test_no_tokens(name):
    lens = torch.tensor([0, 0])
    none = torch.zeros(0, dtype=torch.int64)
    assert WEIGHTS[name](_d([]), _d([]), none, lens).shape == (0,)
    assert correction.off_policy_mask(_d([]), _d([]), _d([]), none, lens, threshold=0.1).shape == (0,)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32(name, dtype):
    gen = torch.Generator().manual_seed(5)
    old, sampler = ((-torch.rand(64, generator=gen)).to(dtype) for _ in range(2))
    seq, lens = torch.arange(16).repeat_interleave(4), torch.full((16,), 4)
    got = WEIGHTS[name](old, sampler, seq, lens)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), WEIGHTS[name](old.double(), sampler.double(), seq, lens), rtol=1e-5, atol=0)
