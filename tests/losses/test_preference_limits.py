"""Losses of pairs and of judged completions where log-probs are infinite or far apart: limits by 60 digits, never nan."""

import importlib.util
import itertools
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from treetune.losses import kto, preference, reference_free, sft
from treetune.losses.preference import Pairs

spec = importlib.util.spec_from_file_location("oracle_limits", Path(__file__).parents[1] / "oracle" / "limits.py")
oracle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oracle)

INF, F64 = math.inf, torch.float64
B = oracle.mpf("0.1")
lsig, sig, log, log1p, expm1, exp = oracle.lsig, oracle.sig, oracle.log, oracle.log1p, oracle.expm1, oracle.exp


def smoothed(h, eps):
    return -(1 - eps) * lsig(h) - eps * lsig(-h)


def exo(h, eps):
    return sig(h) * (lsig(h) - log1p(-eps)) + sig(-h) * (lsig(-h) - log(eps))


def discopop(h, tau):
    return (1 - sig(h / tau)) * -lsig(h) + exp(lsig(h / tau) - h)


# losses of u_c - u_r by h = beta (u_c - u_r)
MARGINS = {
    "dpo": (preference.dpo, lambda h: -lsig(h)),
    "hinge": (preference.hinge, lambda h: max(0, 1 - h)),
    "cdpo, 0": (preference.cdpo, lambda h: smoothed(h, 0)),
    "cdpo": (partial(preference.cdpo, label_smoothing=0.1), lambda h: smoothed(h, oracle.mpf(0.1))),
    "robust, 0": (preference.robust, lambda h: -lsig(h)),
    "robust": (
        partial(preference.robust, label_smoothing=0.1),
        lambda h: (oracle.mpf(0.1) * lsig(-h) - (1 - oracle.mpf(0.1)) * lsig(h)) / (1 - 2 * oracle.mpf(0.1)),
    ),
    "exo": (preference.exo, lambda h: exo(h, oracle.mpf(0.001))),
    "exo, .2": (partial(preference.exo, label_smoothing=0.2), lambda h: exo(h, oracle.mpf(0.2))),
    "discopop": (preference.discopop, lambda h: discopop(h, oracle.mpf(0.05))),
    "discopop, 2": (partial(preference.discopop, tau=2.0), lambda h: discopop(h, 2)),
    "aot, 0": (preference.aot, lambda h: -lsig(h)),
    "aot": (partial(preference.aot, label_smoothing=0.1), lambda h: smoothed(h, oracle.mpf(0.1))),
    "aot_unpaired": (preference.aot_unpaired, lambda h: -lsig(h)),
    "dpo_norm": (preference.dpo_norm, lambda h: -lsig(h)),
    "ipo": (preference.ipo, lambda h: (h / B - 1 / (2 * B)) ** 2),
    "cpo, 0": (partial(reference_free.cpo, beta=0.1), lambda h: -lsig(h)),
    "cpo": (partial(reference_free.cpo, beta=0.1, label_smoothing=0.1), lambda h: smoothed(h, oracle.mpf(0.1))),
    "cpo_hinge": (partial(reference_free.cpo_hinge, beta=0.1), lambda h: max(0, 1 - h)),
    "cpo_ipo": (partial(reference_free.cpo_ipo, beta=0.1), lambda h: (h / B - 1 / (2 * B)) ** 2),
    "simpo": (partial(reference_free.simpo, beta=0.1, gamma=0.5), lambda h: -lsig(h - oracle.mpf(0.5))),
}
# losses of each side's own reward c = beta u_c, r = beta u_r
SIDES = {
    "nca": (preference.nca, lambda c, r: -lsig(c) - lsig(-c) / 2 - lsig(-r) / 2),
    "bco_pair": (preference.bco_pair, lambda c, r: -lsig(c) - lsig(-r)),
    "sppo_hard": (preference.sppo_hard, lambda c, r: (c / B - 1 / (2 * B)) ** 2 + (r / B + 1 / (2 * B)) ** 2),
    "apo_zero": (preference.apo_zero, lambda c, r: 1 - sig(c) + sig(r)),
    "apo_down": (preference.apo_down, lambda c, r: sig(c) + 1 - sig(c - r)),
}
SCORES = {
    "reverse_kl": preference.reverse_kl,
    "forward_kl": preference.forward_kl,
    "js": preference.js,
    "alpha": preference.alpha_divergence,
}
ONE = torch.ones(1, dtype=torch.int64)


def pair(chosen, rejected, dtype=F64, ref=(0.0, 0.0)):
    rows = [torch.tensor([x], dtype=dtype) for x in (chosen, rejected, *ref)]
    return Pairs(rows[0].requires_grad_(), rows[1].requires_grad_(), rows[2], rows[3], ONE, ONE)


def slopes(value, made):
    return [
        x.item()
        for x in torch.autograd.grad(
            value.sum(), (made.chosen, made.rejected), retain_graph=True, materialize_grads=True, allow_unused=True
        )
    ]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", MARGINS)
def test_margins_have_their_limits(name, dtype):
    ours, formula = MARGINS[name]
    for u in (-INF, -1e5, -1e3, -30.0, 0.0, 30.0, 1e3, 1e5, INF):
        made = pair(u, 0.0, dtype) if u <= 0 else pair(0.0, -u, dtype)
        value = ours(made)
        want = oracle.limit(lambda x: formula(x * B), u)
        want = math.copysign(INF, want) if abs(want) > torch.finfo(dtype).max else want
        assert value.item() == pytest.approx(want, rel=2e-4, abs=1e-30), u
        assert not any(map(math.isnan, slopes(value, made))), u
        assert slopes(torch.where(torch.tensor([False]), value, 0.0), made) == [0, 0], "a pair that is left out"


@pytest.mark.parametrize("name", SIDES)
def test_sides_have_their_limits(name):
    ours, formula = SIDES[name]
    for c, r in itertools.product((-INF, -1e3, 0.0, 1e3, INF), repeat=2):
        if math.isinf(c) and math.isinf(r) and name == "apo_down" and c == r:
            continue  # which of the two falls faster is not known
        made = pair(c, r)
        value = ours(made)
        assert value.item() == pytest.approx(oracle.limit(lambda x, y: formula(x * B, y * B), c, r), rel=1e-9), (c, r)
        assert not any(map(math.isnan, slopes(value, made))), (c, r)


EVERY = (
    {name: row[0] for name, row in (MARGINS | SIDES).items()}
    | {
        f"{name} by {score}": partial(getattr(preference, name), score=fn)
        for name in ("dpo", "cdpo", "ipo", "hinge", "exo", "robust", "discopop", "dpo_norm")
        for score, fn in SCORES.items()
    }
    | {
        "alphapo": partial(reference_free.alphapo, beta=2.0, gamma=0.5, alpha=0.3),
        "alphapo, below": partial(reference_free.alphapo, beta=2.0, gamma=0.5, alpha=-0.3),
        "orpo": partial(reference_free.orpo, beta=0.1),
        "tpo": partial(reference_free.tpo, beta=0.1, gamma=0.5),
    }
)


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
@pytest.mark.parametrize("name", EVERY)
def test_no_combination_of_infinite_and_far_sums_is_nan(name, dtype):
    """Also both sides, or a side and its reference, at the same infinity: what cannot be compared has not moved."""
    sums, refs = (-INF, -1e3, -89.0, -2.0, 90.0), (-INF, -1.5, -1e3)
    rows = torch.tensor(list(itertools.product(sums, sums, refs, refs)), dtype=dtype).T
    ones = torch.ones(rows.shape[1], dtype=torch.int64)
    made = Pairs(rows[0].clone().requires_grad_(), rows[1].clone().requires_grad_(), rows[2], rows[3], ones, ones)
    value = EVERY[name](made, **({"group": torch.arange(len(ones))} if name.startswith("aot") else {}))
    grads = [torch.autograd.grad(x.sum(), (made.chosen, made.rejected), retain_graph=True, materialize_grads=True, allow_unused=True)
             for x in (value, torch.where(torch.zeros_like(value).bool(), value, 0.0))]  # fmt: skip
    bad = value.isnan() | grads[0][0].isnan() | grads[0][1].isnan()
    assert not bad.any(), rows.T[bad][0]
    assert not any(x.any() for x in grads[1]), "pairs that are left out"


def test_a_pair_with_a_nan_is_never_hidden():
    for name, loss in EVERY.items():
        assert loss(pair(math.nan, -1.0)).isnan(), name
        assert loss(pair(-1.0, math.nan)).isnan(), name


def test_the_four_that_were_nan():
    lost, won = pair(-INF, 0.0), pair(0.0, -INF)
    assert preference.cdpo(won) == 0 and reference_free.cpo(won, beta=0.1) == 0
    assert preference.exo(won).item() == pytest.approx(-math.log(1 - 1e-3)) and preference.exo(lost).item() == pytest.approx(
        -math.log(1e-3)
    )
    assert preference.discopop(lost) == INF


def test_a_forward_divergence_far_behind_has_no_gradient():
    """s_r falls to -e^100, the pair is won for good: 0 times inf in float32."""
    made = pair(0.0, -100.0, torch.float32)
    value = preference.dpo(made, score=preference.forward_kl)
    assert value == 0 and slopes(value, made) == [0, 0]


@pytest.mark.parametrize("good", [True, False])
@pytest.mark.parametrize("name", ["kto", "apo", "bco"])
def test_judged_completions_have_their_limits(name, good):
    zero = torch.zeros((), dtype=F64)
    losses = {
        "kto": lambda x, ref, flag: kto.kto(x, ref, flag, zero),
        "apo": kto.apo_zero_unpaired,
        "bco": lambda x, ref, flag: kto.bco(x, ref, flag, zero),
    }
    sign = 1 if good else -1
    for u in (-INF, -1e4, 0.0, 1e4, INF):
        x, flag = torch.tensor([u], dtype=F64, requires_grad=True), torch.tensor([good])
        value = losses[name](x, torch.zeros(1, dtype=F64), flag)
        want = oracle.limit(lambda y: -lsig(sign * y * B) if name == "bco" else 1 - sig(sign * y * B), u)
        assert value.item() == pytest.approx(want, rel=1e-9, abs=1e-30) and not torch.autograd.grad(value.sum(), x)[0].isnan()
    both = losses[name](torch.tensor([-INF], dtype=F64), torch.tensor([-INF], dtype=F64), torch.tensor([good]))
    assert both.item() == pytest.approx(math.log(2) if name == "bco" else 0.5)
    assert kto.baseline(torch.tensor([-INF, 2.0]), torch.tensor([-INF, 1.0])) == 0.5


def test_one_banned_token_does_not_stay_in_the_running_mean():
    state = kto.Running(torch.tensor(0.5, dtype=F64), torch.tensor(4))
    kept = kto.merge(state, torch.tensor(-INF), torch.tensor(2))
    assert kept.mean == 0.5 and kept.count == 4
    none = kto.merge(state, torch.tensor(math.nan), torch.tensor(0))
    assert none.mean == 0.5 and none.count == 4
    assert kto.merge(state, torch.tensor(math.nan), torch.tensor(1)).mean.isnan(), "a nan that was counted shows"


def test_supervised_tokens_of_weight_0_add_0():
    """EAFT at entropy 0, DFT and smoothing at -inf: the factor wins."""
    x = torch.tensor([-INF, -INF, -1.0], requires_grad=True)
    value = sft.eaft(x, torch.tensor([0.0, -1e-9, 0.0]))
    assert value.tolist() == [0, 0, 0] and torch.autograd.grad(value.sum(), x)[0].tolist() == [0, 0, 0]
    assert sft.eaft(x, torch.tensor([0.5, 0.5, 0.5]))[0] == INF and sft.eaft(x, torch.tensor([0.0] * 3), alpha=0.5).tolist() == [0, 0, 0]
    value = sft.dft(x)
    assert value[:2].tolist() == [0, 0] and torch.autograd.grad(value.sum(), x)[0][:2].tolist() == [0, 0]
    value = sft.smoothed(x, torch.zeros(3), torch.full((3,), -2.0), label_smoothing=1.0)
    assert value.tolist() == [2, 2, 2] and torch.autograd.grad(value.sum(), x)[0].tolist() == [0, 0, 0]
    assert sft.smoothed(x, torch.zeros(3), torch.full((3,), -2.0), label_smoothing=0.1)[0] == INF
