"""Policy losses: the worked numbers, loops in float64, gradients, and what may not happen."""

import importlib.util
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.func import grad, vmap

from treetune.losses import policy, ratio

spec = importlib.util.spec_from_file_location("oracle_policy_gradient", Path(__file__).parents[1] / "oracle" / "policy_gradient.py")
oracle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oracle)

F64 = torch.float64
LOGP = torch.tensor([-1, -0.5, -2, -0.3, -1.2], dtype=F64)
OLD = torch.tensor([-1.2, -0.5, -1.5, -0.6, -1], dtype=F64)
ADVANTAGE = torch.tensor([1, 1, 1, -0.5, -0.5], dtype=F64)
LENS, SEQ = torch.tensor([3, 2]), torch.tensor([0, 0, 0, 1, 1])

# (ours of (logp, old, A, seq, lens, weights), the oracle's function, its knobs)
TERMS = {
    "ppo": (lambda x, old, a, s, n, w: policy.ppo_clip((x - old).exp(), a), oracle.ppo_clip, {}),
    "ppo, uneven": (
        lambda x, old, a, s, n, w: policy.ppo_clip((x - old).exp(), a, epsilon=0.1, epsilon_high=0.3),
        oracle.ppo_clip, {"low": 0.1, "high": 0.3},
    ),
    "ppo, two-sided": (lambda x, old, a, s, n, w: policy.ppo_clip((x - old).exp(), a, delta=1.4), oracle.ppo_clip, {"delta": 1.4}),
    "cispo": (lambda x, old, a, s, n, w: policy.cispo((x - old).exp(), a, x, epsilon_high=1.2), oracle.cispo, {"cap": 1.2}),
    "sapo": (lambda x, old, a, s, n, w: policy.sapo((x - old).exp(), a), oracle.sapo, {}),
    "sapo, uneven": (
        lambda x, old, a, s, n, w: policy.sapo((x - old).exp(), a, tau_pos=0.7, tau_neg=2.0), oracle.sapo, {"pos": 0.7, "neg": 2.0},
    ),
    "vespo": (lambda x, old, a, s, n, w: policy.vespo(x - old, a, x, s, n), oracle.vespo, {}),
    "vespo, corrected": (lambda x, old, a, s, n, w: policy.vespo(x - old, a, x, s, n, w), oracle.vespo, {}),
    "gmpo": (lambda x, old, a, s, n, w: policy.gmpo(x - old, a, s, n, epsilon=0.05), oracle.gmpo, {"low": 0.05}),
    "gmpo, uneven": (
        lambda x, old, a, s, n, w: policy.gmpo(x - old, a, s, n, epsilon=0.1, epsilon_high=0.02), oracle.gmpo, {"low": 0.1, "high": 0.02},
    ),
    "reinforce": (lambda x, old, a, s, n, w: policy.reinforce(a, x), oracle.reinforce, {}),
}  # fmt: skip


def drawn(seed=0, dtype=F64):
    """(logp, old, A, seq, lens, correction) of six ragged completions, two of them empty and one without an advantage."""
    gen, lens = torch.Generator().manual_seed(seed), torch.tensor([3, 0, 1, 6, 2, 0])
    seq = torch.arange(6).repeat_interleave(lens)
    logp = -3 * torch.rand(12, generator=gen, dtype=F64)
    old = logp + 0.3 * torch.randn(12, generator=gen, dtype=F64)
    advantage = torch.tensor([1.5, 9, -0.7, -1.2, 0, 9], dtype=F64)[seq]
    weight = 2 * torch.rand(12, generator=gen, dtype=F64)
    weight[7] = 0
    return logp.to(dtype), old.to(dtype), advantage.to(dtype), seq, lens, weight.to(dtype)


def by_loops(name, logp, old, advantage, seq, lens, weight):
    _, term, knobs = TERMS[name]
    parts = [list(x.split(lens.tolist())) for x in (logp, old, advantage, weight)]
    out = []
    for ours, anchor, a, isr in zip(*parts, strict=True):
        if len(ours):
            rho = list(ours - anchor)
            isr = isr.tolist() if name == "vespo, corrected" else []
            out += term([x.exp() for x in rho], list(ours), rho, a[0].item(), isr, **knobs)
    return torch.stack(out)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TERMS)
def test_value_and_gradient_are_those_of_loops(name, seed):
    data = drawn(seed)
    ours, theirs = (data[0].clone().requires_grad_() for _ in range(2))
    value, want = TERMS[name][0](ours, *data[1:]), by_loops(name, theirs, *data[1:])
    torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-13)
    weight = torch.linspace(-1, 2, 12, dtype=F64)
    got, expected = (torch.autograd.grad((weight * x).sum(), leaf)[0] for x, leaf in ((value, ours), (want, theirs)))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["ppo", "ppo, uneven", "ppo, two-sided", "sapo", "gmpo", "gmpo, uneven", "reinforce"])
def test_gradients_by_differences(name):
    """The others hold a factor constant, so that theirs is no derivative of the value."""
    logp, *rest = drawn(1)
    assert torch.autograd.gradcheck(lambda x: TERMS[name][0](x, *rest), logp.requires_grad_())


@pytest.mark.parametrize("name", TERMS)
def test_vmap_of_grad(name):
    stack, rest = torch.stack([drawn(i)[0] for i in range(3)]), drawn(5)[1:]
    total = lambda x: TERMS[name][0](x, *rest).square().sum()  # noqa: E731
    for row, found in zip(stack, vmap(grad(total))(stack), strict=True):
        leaf = row.clone().requires_grad_()
        torch.testing.assert_close(found, torch.autograd.grad(total(leaf), leaf)[0])


@pytest.mark.parametrize("name", TERMS)
def test_a_nan_log_prob_is_seen_and_stays_in_its_sequence(name):
    logp, *rest = drawn()
    for at, own in ((0, logp), (1, rest[0])):
        if at and name == "reinforce":
            continue
        own = own.clone()
        own[5] = torch.nan
        value = TERMS[name][0](own, *rest) if not at else TERMS[name][0](logp, own, *rest[1:])
        assert value[5].isnan() and value[rest[2] != 3].isfinite().all()


@pytest.mark.parametrize("name", TERMS)
def test_low_precision_is_widened(name):
    data = drawn(2, torch.bfloat16)
    low = TERMS[name][0](data[0].float(), *(x.float() if x.is_floating_point() else x for x in data[1:]))
    high = TERMS[name][0](data[0].double(), *(x.double() if x.is_floating_point() else x for x in data[1:]))
    torch.testing.assert_close(low.double(), high, rtol=1e-5, atol=1e-7)
    one, a = data[0].exp(), data[2]
    assert policy.ppo_clip(one, a).dtype == policy.sapo(one, a).dtype == policy.reinforce(a, one).dtype == torch.float32
    assert policy.cispo(one, a, one, epsilon_high=2.0).dtype == policy.vespo(one, a, one, *data[3:5]).dtype == torch.float32


@pytest.mark.parametrize("name", TERMS)
def test_no_advantage_no_loss_and_nothing_of_nothing(name):
    logp, old, advantage, seq, lens, weight = drawn()
    logp.requires_grad_()
    value = TERMS[name][0](logp, old, 0 * advantage, seq, lens, weight)
    assert (value == 0).all() and (torch.autograd.grad(value.sum(), logp)[0] == 0).all()
    none, index = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    for lens in (index, torch.zeros(2, dtype=torch.int64)):
        assert TERMS[name][0](none, none, none, index, lens, none).shape == (0,)


def test_two_sided_clipping_bounds_bad_completions_alone():
    """A = [1, -2] on the fixture: a token mean of .3061296923, or .2861861693 with delta 1.3."""
    a = torch.tensor([1, 1, 1, -2, -2], dtype=F64)
    r = (LOGP - OLD).exp()
    assert policy.ppo_clip(r, a).mean().item() == pytest.approx(0.3061296923, abs=1e-10)
    assert policy.ppo_clip(r, a, delta=1.3).mean().item() == pytest.approx(0.2861861693, abs=1e-10)
    assert torch.equal(policy.ppo_clip(r, a.abs(), delta=1.3), policy.ppo_clip(r, a.abs()))
    with pytest.raises(ValueError, match="delta=1.2: expected more than 1 \\+ epsilon_high = 1.2"):
        policy.ppo_clip(r, a, delta=1.2)


@pytest.mark.parametrize(("r", "slope"), [(1.0, -1.0), (1.2, -1.2), (1.3, 0.0), (0.5, -0.5)])
def test_gradient_at_the_corners_of_the_band(r, slope):
    """At r = 1 both branches agree; the band is closed, so its edge still has the gradient -A r."""
    x = torch.tensor([r], dtype=F64).log().requires_grad_()
    value = policy.ppo_clip(x.exp() if r != 1.2 else torch.tensor([1.2], dtype=F64) * (x - x.detach()).exp(), torch.ones(1, dtype=F64))
    assert torch.autograd.grad(value.sum(), x)[0].item() == pytest.approx(slope, abs=1e-12)


def test_gradient_of_an_unchanged_policy_is_minus_the_advantage():
    a = torch.tensor([2.0, -0.5, 0.0], dtype=F64)
    seq, lens = torch.arange(3), torch.ones(3, dtype=torch.int64)
    for term in (
        lambda x, r: policy.ppo_clip(r, a),
        lambda x, r: policy.cispo(r, a, x, epsilon_high=5.0),
        lambda x, r: policy.sapo(r, a),
        lambda x, r: policy.vespo(x - x.detach(), a, x, seq, lens),
        lambda x, r: policy.gmpo(x - x.detach(), a, seq, lens),
        lambda x, r: policy.reinforce(a, x),
    ):
        x = torch.tensor([-1.0, -0.2, -3.0], dtype=F64).requires_grad_()
        slope = torch.autograd.grad(term(x, ratio.token(x, x.detach(), seq, lens)).sum(), x)[0]
        torch.testing.assert_close(slope, -a, rtol=1e-14, atol=0)


@pytest.mark.parametrize("cap", [0.2, 0.28, 0.99])
def test_a_cap_below_1_is_a_band_by_mistake(cap):
    with pytest.raises(ValueError, match="largest ratio itself"):
        policy.cispo(LOGP.exp(), ADVANTAGE, LOGP, epsilon_high=cap)


def test_cispo_has_no_default_cap():
    with pytest.raises(TypeError, match="epsilon_high"):
        policy.cispo(LOGP.exp(), ADVANTAGE, LOGP)


def test_vespo_weights_of_the_fixture():
    phi = policy.vespo_weight(LOGP - OLD, ADVANTAGE, SEQ, LENS)
    assert phi[torch.tensor([0, 3])].mean().item() == pytest.approx(1.1440412611, abs=1e-10)
    assert (phi[:3] == phi[0]).all() and (phi[3:] == phi[3]).all()
    isr = torch.tensor([1, 2, 0.5, 0.5, 1], dtype=F64)
    weighed = policy.vespo_weight(LOGP - OLD, ADVANTAGE, SEQ, LENS, isr)
    assert weighed[torch.tensor([0, 3])].mean().item() == pytest.approx(0.8035781753, abs=1e-10)
    dropped = policy.vespo_weight(LOGP - OLD, ADVANTAGE, SEQ, LENS, torch.tensor([1, 0, 1, 1, 1], dtype=F64))
    assert dropped[0] < 1e-12 and dropped[3] == phi[3]
    even, good, bad = (policy.vespo_weight(LOGP - OLD, a * torch.ones(5, dtype=F64), SEQ, LENS) for a in (0, 1, -1))
    assert torch.equal(even, good) and not torch.equal(even, bad)


def test_vespo_weight_is_finite_wherever_log_probs_are():
    gaps = torch.tensor([-1e4, -30, 0, 30, 1e4])
    for a in (1.0, -1.0, 0.0):
        phi = policy.vespo_weight(gaps, torch.full((5,), a), torch.arange(5), torch.ones(5, dtype=torch.int64))
        assert phi.isfinite().all() and (phi >= 0).all() and phi[2] == 1
    huge = policy.vespo_weight(gaps, torch.ones(5), torch.arange(5), torch.ones(5, dtype=torch.int64), k=(30.0, 3.0), rate=(0.1, 2.0))
    assert (huge[3:] == 0).all()


def test_gmpo_of_the_fixture():
    for epsilon, expected in ((0.4, -0.1896009349), (0.1, -0.1612939300)):
        x = policy.gmpo(LOGP - OLD, ADVANTAGE, SEQ, LENS, epsilon=epsilon)
        assert ((x[0] + x[3]) / 2).item() == pytest.approx(expected, abs=1e-10)
        assert (x[:3] == x[0]).all() and (x[3:] == x[3]).all()


def test_ppo_with_its_value_loss():
    """Policy -.3444471759, value .155, together with vf_coef .1 -.3289471759."""
    old, new = torch.tensor([0.5, 0.4, 0.2, 0.1, 0.1], dtype=F64), torch.tensor([0.8, 0.4, 0.1, 0.2, 0.5], dtype=F64)
    returns = torch.tensor([1, 1, 1, 0, 0], dtype=F64)
    value = policy.value_clip(new, old, returns).mean()
    loss = policy.ppo_clip((LOGP - OLD).exp(), ADVANTAGE).mean()
    assert value.item() == pytest.approx(0.155, abs=1e-12)
    assert loss.item() == pytest.approx(-0.3444471759, abs=1e-10)
    assert (loss + 0.1 * value).item() == pytest.approx(-0.3289471759, abs=1e-10)


def test_value_loss_by_loops_and_differences():
    gen = torch.Generator().manual_seed(3)
    value, old, returns = torch.randn(3, 40, generator=gen, dtype=F64)
    expected = []
    for v, o, r in zip(value.tolist(), old.tolist(), returns.tolist(), strict=True):
        near = min(max(v, o - 0.3), o + 0.3)
        expected.append(0.5 * max((v - r) ** 2, (near - r) ** 2))
    assert policy.value_clip(value, old, returns, epsilon=0.3).tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.autograd.gradcheck(lambda v: policy.value_clip(v, old, returns, epsilon=0.3), value.requires_grad_())


def test_optimal_values_and_their_regression():
    rewards = torch.tensor([[1, 0, 0, 1], [0.3] * 4], dtype=F64)
    assert policy.a_star_value(rewards).tolist() == pytest.approx([0.7168904152, 0.3], abs=1e-10)
    ref, rows = LOGP - 0.1, drawn()
    x = policy.a_star(LOGP, ref, ADVANTAGE, SEQ, LENS, beta=0.5)
    assert x.tolist() == pytest.approx([(0.5 * 0.3 - 1) ** 2] * 3 + [(0.5 * 0.2 + 0.5) ** 2] * 2)
    logp, old, a, seq, lens, _ = rows
    assert torch.autograd.gradcheck(lambda y: policy.a_star(y, old, a, seq, lens, beta=0.7), logp.requires_grad_())


def test_adaptive_entropy_follows_its_target():
    """The first step has no bonus, and so has each after an entropy above the target; the coefficient moves all the same."""
    state, told = policy.adaptive(0.01), []
    for entropy in (0.1, 0.2, 0.5, 0.1):
        told.append(policy.applied(state, target=0.2).item())
        state = policy.update(state, torch.tensor(entropy, dtype=F64), target=0.2, delta=0.005)
    assert told == pytest.approx([0, 0.015, 0.02, 0], abs=1e-15)
    assert state.coef.item() == pytest.approx(0.02, abs=1e-15) and state.last == 0.1


def test_adaptive_coefficient_stays_within_its_bounds():
    state = policy.adaptive(0.99)
    for _ in range(5):
        state = policy.update(state, torch.tensor(0.0), delta=0.005)
    assert state.coef == 1
    for _ in range(400):
        state = policy.update(state, torch.tensor(math.inf), delta=0.005, low=0.002)
    assert state.coef.item() == pytest.approx(0.002) and policy.applied(state) == 0


def test_options_can_be_bound_beforehand():
    bound = partial(policy.ppo_clip, epsilon=0.1, epsilon_high=0.3)
    r = (LOGP - OLD).exp()
    assert torch.equal(bound(r, ADVANTAGE), policy.ppo_clip(r, ADVANTAGE, epsilon=0.1, epsilon_high=0.3))
    assert not torch.equal(bound(r, ADVANTAGE), policy.ppo_clip(r, ADVANTAGE))
