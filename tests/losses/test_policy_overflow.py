"""Policy losses where ratios overflow, log-probs are infinite, tokens are left out: limits by 60 digits, slopes exactly 0, never nan."""

import importlib.util
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.func import grad, vmap

from treetune.losses import correction, divergence, policy, ratio, reduce


def module(folder, name):
    spec = importlib.util.spec_from_file_location(f"edge_{name}", Path(__file__).parents[1] / folder / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


oracle, rollouts = module("oracle", "limits"), module("losses", "rollouts")
INF, NAN, F64 = math.inf, math.nan, torch.float64
ONE, ZERO = torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
GAPS = (-INF, -1e3, -89.0, -1.0, 0.0, 1.0, 89.0, 1e3, INF)
ADVANTAGES = (1.0, -1.0, 0.0, 1e-30, -1e-30)
LEVELS = {"token": ratio.token, "sequence": ratio.sequence, "sequence_token": ratio.sequence_token, "sequence_sum": ratio.sequence_sum}


def clipped(rho, a, *, low=0.2, high=0.2, delta=None):
    r, cut = oracle.exp(rho), lambda x, lo, hi: min(max(x, lo), hi)
    free = r if delta is None else min(r, delta)
    return -min(free * a, cut(r, 1 - low, 1 + high) * a)


def soft(rho, a):
    tau = 1.0 if a > 0 else 1.05
    return -4 / oracle.mpf(tau) * oracle.sig(tau * (oracle.exp(rho) - 1)) * a


def cut_geometric(rho, a):
    near = min(max(rho, -0.4), 0.4)
    return -oracle.exp(min(rho, near) if a > 0 else max(rho, near)) * a


# of (x, old, A): ours, and the formula of (log-ratio, A); the weight of cispo has no gradient, so that its slope is -w A
TERMS = {
    "ppo": (lambda x, old, a: policy.ppo_clip(ratio.token(x, old, ZERO, ONE), a), clipped),
    "two-sided": (lambda x, old, a: policy.ppo_clip(ratio.token(x, old, ZERO, ONE), a, delta=4.0), partial(clipped, delta=4.0)),
    "uneven": (
        lambda x, old, a: policy.ppo_clip(ratio.token(x, old, ZERO, ONE), a, epsilon=0.1, epsilon_high=0.3),
        partial(clipped, low=0.1, high=0.3),
    ),
    "sapo": (lambda x, old, a: policy.sapo(ratio.token(x, old, ZERO, ONE), a), soft),
    "gmpo": (lambda x, old, a: policy.gmpo(ratio.log_ratio(x, old), a, ZERO, ONE), cut_geometric),
} | {
    f"gspo, {level}": (lambda x, old, a, fn=fn: policy.ppo_clip(fn(x, old, ZERO, ONE), a), clipped) for level, fn in LEVELS.items()
}  # fmt: skip


def at(gap, dtype=F64):
    """(logp, old) of this log-ratio: infinite ones have one side at -inf, as a token that is banned for one policy."""
    if math.isinf(gap):
        logp, old = (-INF, -1.0) if gap < 0 else (-1.0, -INF)
    else:
        logp, old = gap - 1.0, -1.0
    return torch.tensor([logp], dtype=dtype), torch.tensor([old], dtype=dtype)


def run(term, gap, a, dtype=F64):
    logp, old = at(gap, dtype)
    logp.requires_grad_()
    value = term(logp, old, torch.tensor([a], dtype=dtype))
    return value.item(), torch.autograd.grad(value.sum(), logp)[0].item()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", TERMS)
def test_values_are_limits_and_slopes_those_of_differences(name, dtype):
    term, formula = TERMS[name]
    top = math.log(torch.finfo(dtype).max)
    for gap in GAPS:
        for a in ADVANTAGES:
            value, slope = run(term, gap, a, dtype)
            want = 0.0 if a == 0 else oracle.limit(lambda x, a=a: formula(x, a), gap)
            # what is beyond the dtype is inf
            want = math.copysign(INF, want) if want and math.isfinite(want) and math.log(abs(want)) > top else want
            over = gap > top  # e^gap is inf before an advantage that is small brings it back
            assert value == pytest.approx(want, rel=1e-5) or (over and math.isinf(value) and value * a < 0), (gap, a, value, want)
            assert not math.isnan(slope), (gap, a)
            if math.isfinite(gap) and a and math.isfinite(want) and not over:
                h = oracle.mpf("1e-25")
                true = float((formula(oracle.mpf(gap) + h, a) - formula(oracle.mpf(gap) - h, a)) / (2 * h))
                assert slope == pytest.approx(true, rel=1e-4, abs=1e-7 * abs(a)), (gap, a)


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gap", [89.0, 710.0, 1e3, INF])
def test_a_clipped_token_has_no_gradient_however_far_it_has_gone(gap, dtype):
    for name in ("ppo", "two-sided", "uneven", *(f"gspo, {level}" for level in LEVELS)):
        value, slope = run(TERMS[name][0], gap, 2.0, dtype)
        assert value == pytest.approx(-2.6 if name == "uneven" else -2.4, rel=1e-6) and slope == 0, name
    value, slope = run(TERMS["two-sided"][0], gap, -2.0, dtype)
    assert value == 8 and slope == 0
    for a, most in ((2.0, -8.0), (-2.0, 8 / 1.05)):
        value, slope = run(TERMS["sapo"][0], gap, a, dtype)
        assert value == pytest.approx(most, rel=1e-6) and slope == 0
    assert run(TERMS["gmpo"][0], gap, 2.0, dtype) == (pytest.approx(-2 * math.exp(0.4)), 0)
    for name in TERMS:
        assert run(TERMS[name][0], gap, 0.0, dtype) == (0, 0), name
    if dtype in (torch.float32, torch.bfloat16, torch.float16) or gap > 709:
        assert run(TERMS["ppo"][0], gap, -2.0, dtype)[0] == INF, "what nothing bounds is inf"


def test_gradients_are_batched_as_well():
    gaps, a = torch.tensor([89.0, 1e3, 2.0, -1e3]), torch.tensor([1.0, 1.0, -1.0, 1.0])
    seq, lens = torch.arange(4), torch.ones(4, dtype=torch.int64)
    one = lambda x: policy.ppo_clip(ratio.token(x, torch.zeros(4), seq, lens), a, delta=5.0).sum()  # noqa: E731
    found = vmap(grad(one))(torch.stack([gaps, -gaps]))
    assert found.isfinite().all() and found[0].tolist() == [0, 0, 0, 0] and found[0, 0] == 0
    soft_one = lambda x: policy.sapo(ratio.token(x, torch.zeros(4), seq, lens), a).sum()  # noqa: E731
    assert vmap(grad(soft_one))(torch.stack([gaps, 2 * gaps])).isfinite().all()


@pytest.mark.parametrize("a", ADVANTAGES)
@pytest.mark.parametrize("old", [-1.0, -INF])
def test_a_banned_token_weighs_nothing_in_cispo_and_vespo(old, a):
    x, anchor, gain = torch.tensor([-INF], requires_grad=True), torch.tensor([old]), torch.tensor([a])
    for value in (
        policy.cispo(ratio.token(x, anchor, ZERO, ONE), gain, x, epsilon_high=5.0),
        policy.vespo(ratio.log_ratio(x, anchor), gain, x, ZERO, ONE),
        policy.reinforce(gain, x),
    ):
        assert not value.isnan() and not torch.autograd.grad(value.sum(), x)[0].isnan()
        assert value == 0 if a == 0 else True
    if old == -1:
        assert policy.cispo(ratio.token(x, anchor, ZERO, ONE), gain, x, epsilon_high=5.0) == 0
    assert policy.reinforce(gain, x).item() == (0 if a == 0 else a * INF)
    far = policy.a_star(x, anchor, gain, ZERO, ONE)
    assert not far.isnan() and (far == INF) == (old == -1)


@pytest.mark.parametrize("level", LEVELS)
def test_a_ruled_out_token_rules_out_its_sequence_and_no_other(level):
    logp = torch.tensor([-INF, -1.0, -2.0, -1.0, -0.5], requires_grad=True)
    old = torch.tensor([-1.0, -INF, -2.0, -1.0, -0.5])
    seq, lens = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([3, 2])
    found = LEVELS[level](logp, old, seq, lens)
    assert found[3:].tolist() == [1, 1] and not found.isnan().any()
    assert found[:3].tolist() == ([0, INF, 1] if level == "token" else [0, 0, 0])
    loss = policy.ppo_clip(found, torch.tensor([1.0, 1, 1, 1, 1])).sum()
    assert torch.autograd.grad(loss, logp)[0][:2].tolist() == [0, 0]


def test_neither_side_has_moved_where_both_rule_a_token_out():
    logp = torch.tensor([-INF, -1.0], requires_grad=True)
    old, seq, lens = torch.tensor([-INF, -1.5]), torch.tensor([0, 0]), torch.tensor([2])
    for level, fn in LEVELS.items():
        value = policy.ppo_clip(fn(logp, old, seq, lens), torch.tensor([1.0, -1.0]))
        assert value.isfinite().all() and torch.autograd.grad(value.sum(), logp)[0].isfinite().all(), level
    for fn in (divergence.k1, divergence.k2, divergence.k3, partial(divergence.k3, clamp=20.0)):
        value = fn(logp, old)
        assert value[0] == 0 and torch.autograd.grad(value.sum(), logp)[0][0] == 0


# --- divergences

FORMULAS = {
    "k1": (divergence.k1, lambda d: d),
    "k2": (divergence.k2, lambda d: d * d / 2),
    "k3": (divergence.k3, lambda d: oracle.expm1(-d) + d),
}


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", FORMULAS)
def test_divergences_are_limits(name, dtype):
    ours, formula = FORMULAS[name]
    for d in (-INF, -1e3, -89.0, -3.0, 0.0, 3.0, 89.0, 1e3, INF):
        logp, ref = at(d, dtype)
        logp.requires_grad_()
        value = ours(logp, ref)
        want = oracle.limit(formula, d)
        fits = want == 0 or math.isinf(want) or math.log(abs(want)) < math.log(torch.finfo(dtype).max)
        assert value.item() == (pytest.approx(want, rel=1e-5) if fits else math.copysign(INF, want)), d
        for kept in (True, False):
            slope = torch.autograd.grad(torch.where(torch.tensor(kept), value, 0.0).sum(), logp, retain_graph=True)[0]
            assert not slope.isnan() and (kept or slope == 0)


@pytest.mark.parametrize(
    ("logp", "ref", "old", "value", "slope"),
    [
        (-INF, -1.0, -1.0, 1.0, 0.0), (-200.0, -1.0, -3.0, math.exp(2), 0.0), (-100.0, -10.0, -95.0, math.exp(85), -90 * math.exp(-5)),
        (-INF, -INF, -1.0, 0.0, 0.0), (-1.0, -1.5, -1.25, math.exp(0.25) * (math.exp(-0.5) - 0.5), 0.5 * math.exp(0.25)),
        (-1.0, -1.0, -INF, 0.0, 0.0), (-1.0, -2.0, -INF, INF, INF),
    ],
)  # fmt: skip
def test_a_corrected_divergence_of_an_unlikely_token_is_finite(logp, ref, old, value, slope):
    """r k3 tends to p_ref / p_old where p falls to 0, with a slope of r d; float32 has no e^99 on the way."""
    x = torch.tensor([logp], requires_grad=True)
    other, anchor = torch.tensor([ref]), torch.tensor([old])
    got = divergence.corrected_k3(x, other, anchor, ratio.token(x, anchor, ZERO, ONE))
    assert got.item() == pytest.approx(value, rel=1e-4)
    assert torch.autograd.grad(got.sum(), x)[0].item() == pytest.approx(slope, rel=1e-3, abs=1e-30)
    for fn in FORMULAS.values():
        plain = divergence.corrected(fn[0](x, other), ratio.token(x, anchor, ZERO, ONE))
        assert not plain.isnan() and not torch.autograd.grad(plain.sum(), x)[0].isnan()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_corrected_divergence_that_overflows_has_no_nan_slope(level, dtype):
    """r and k3 have slopes of opposite signs, both inf there: the slope that is left points where that of r k3 does."""
    far = torch.tensor([-INF, -1e3, -200.0, -91.0, -60.0, -1.0], dtype=dtype)
    logp, ref, old = (x.contiguous() for x in torch.cartesian_prod(far, far, far).T)
    seq = torch.arange(len(logp)) // (1 if level == "token" else 6)
    for kind in (divergence.k1, divergence.k2, divergence.k3, None):
        x = logp.clone().requires_grad_()
        weight = getattr(ratio, level)(x, old, seq, seq.bincount())
        value = divergence.corrected(kind(x, ref), weight) if kind else divergence.corrected_k3(x, ref, old, weight)
        (slope,) = torch.autograd.grad(value.sum(), x)
        assert not value.isnan().any() and not slope.isnan().any(), kind
        if kind is divergence.k3:
            over = (value == INF) & (slope != 0)
            assert over.any() and torch.equal(slope[over].sign(), (x - ref)[over].sign())


def test_the_objective_takes_the_form_that_does_not_overflow():
    rows = {"logp": [[-200.0, -1.0]], "old_logp": [[-3.0, -1.2]], "ref_logp": [[-1.0, -1.1]], "advantage": (0.0,)}
    single = rollouts.objective(rollouts.stand_in, rollouts.PPO, kl=divergence.k3, kl_coef=1.0)
    params, batch = rollouts.fixture(**rows)
    want = rollouts.run(single, params, batch)
    low = {key: x.detach().float().requires_grad_() for key, x in params.items()}
    narrow = {key: x.float() if x.is_floating_point() and key != "advantage" else x for key, x in batch.items()}
    got = rollouts.run(single, low, narrow)
    assert got[0].item() == pytest.approx(want[0].item(), rel=1e-5) and got[0].isfinite()
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-4, atol=1e-6)


# --- corrections

WEIGHTS = (correction.token_truncate, correction.token_mask, correction.sequence_truncate, correction.sequence_mask)


@pytest.mark.parametrize("fn", WEIGHTS)
def test_corrections_of_infinite_log_probs(fn):
    old = torch.tensor([-1.0, -INF, -INF, -1.0, -INF, -1.0, -2.0])
    sampler = torch.tensor([-INF, -1.0, -INF, NAN, NAN, -INF, -1.0])
    seq, lens = torch.arange(7), torch.ones(7, dtype=torch.int64)
    found = fn(old, sampler, seq, lens)
    bound = 3.0 if "truncate" in fn.__name__ else 0.0
    assert found.tolist() == pytest.approx([bound, 0, 1, 1, 1, bound, math.exp(-1)])
    together = fn(old, sampler, torch.tensor([0, 0, 1, 1, 1, 2, 2]), torch.tensor([2, 3, 2]))
    assert not together.isnan().any()
    if "sequence" in fn.__name__:
        assert together[:2].tolist() == [0, 0], "a token that is ruled out rules its sequence out"
    keep = correction.off_policy_mask(old, sampler, -torch.ones(7), seq, lens, threshold=1.0)
    assert keep.tolist() == [True, False, True, True, True, True, True]


# --- what is left out

BAD = (NAN, INF, -INF, 500.0, -500.0)
OUT = {"correction": [[1.0, 0.0, 2.0], [1.0, 1.0]], "entropy_keep": [[1.0, 0.0, 1.0], [1.0, 1.0]]}
FORMS = {
    "ppo": rollouts.PPO, "two-sided": partial(rollouts.PPO, delta=3.0), "cispo": rollouts.CISPO, "sapo": policy.sapo,
    "reinforce": policy.reinforce, "a term of one's own": lambda ratio, advantage, logp: -(ratio.square() * advantage * logp.square()),
}  # fmt: skip


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("which", OUT)
@pytest.mark.parametrize("name", FORMS)
def test_a_token_that_is_left_out_adds_exactly_0(name, which, sign):
    made = rollouts.objective(rollouts.stand_in, FORMS[name])
    rows = {"logp": rollouts.LOGP, "old_logp": rollouts.OLD, which: OUT[which], "advantage": (sign, -sign)}
    want = None
    for column in (None, "logp", "old_logp"):
        for bad in BAD if column else (None,):
            mine = {key: [list(row) for row in value] if isinstance(value, list) else value for key, value in rows.items()}
            if column:
                mine[column][0][1] = bad
            params, batch = rollouts.fixture(**mine)
            batch |= {"entropy_keep": batch["entropy_keep"].bool()} if which == "entropy_keep" else {}
            loss, slope, _ = rollouts.run(made, params, batch)
            want = (loss, slope) if want is None else want
            assert torch.equal(loss, want[0]) and torch.equal(slope, want[1]) and slope[1] == 0, (column, bad)


@pytest.mark.parametrize("level", ["sequence", "sequence_token", "sequence_sum"])
@pytest.mark.parametrize("which", OUT)
def test_left_out_tokens_of_sequence_ratios_never_give_nan(level, which):
    made = rollouts.objective(rollouts.stand_in, rollouts.PPO, ratio=LEVELS[level], reduction=rollouts.SEQUENCES)
    for column in ("logp", "old_logp"):
        for bad in (NAN, INF, -INF):
            rows = {"logp": rollouts.LOGP, "old_logp": rollouts.OLD, which: OUT[which]}
            rows[column] = [list(row) for row in rows[column]]
            rows[column][0][1] = bad
            params, batch = rollouts.fixture(**rows)
            batch |= {"entropy_keep": batch["entropy_keep"].bool()} if which == "entropy_keep" else {}
            loss, slope, _ = rollouts.run(made, params, batch)
            assert loss.isfinite() and slope.isfinite().all() and slope[1] == 0


@pytest.mark.parametrize("bad", [NAN, INF, 1e3])
def test_a_sequence_that_left_the_policy_adds_exactly_0(bad):
    for term, options in ((rollouts.PPO, {}), (policy.gmpo, {}), (policy.vespo, {}), (rollouts.CISPO, {"ratio": ratio.sequence_sum})):
        made = rollouts.objective(rollouts.stand_in, term, opsm_threshold=0.15, **options)
        rows = {"logp": rollouts.LOGP, "old_logp": [[-1.2, -0.5, -1.5], [-0.6, -1 if math.isnan(bad) else -1.2 - bad]]}
        rows["sampler_logp"] = [[-1.0, -0.5, -2.0], [5.0, 0.0]]
        loss, slope, _ = rollouts.run(made, *rollouts.fixture(**rows))
        assert loss.isfinite() and slope.isfinite().all() and slope[3:].tolist() == [0, 0]


def test_a_nan_that_counts_is_never_hidden():
    for name, term in FORMS.items():
        made = rollouts.objective(rollouts.stand_in, term)
        params, batch = rollouts.fixture(logp=[[-1.0, NAN, -2.0], [-0.3, -1.2]], correction=[[1.0, 1.0, 0.0], [1.0, 1.0]])
        assert rollouts.run(made, params, batch)[0].isnan(), name


def test_reductions_leave_out_tokens_of_weight_0():
    x = torch.tensor([NAN, INF, 2.0], requires_grad=True)
    top, bottom = reduce.by_token(x, torch.tensor([0, 0, 0]), torch.tensor([3]), weight=torch.tensor([0.0, 0.0, 2.0]))
    assert top == 4 and bottom == 2 and torch.autograd.grad(top, x)[0].tolist() == [0, 0, 2]
