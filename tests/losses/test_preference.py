"""Pair losses against worked numbers, a loop in Python floats, and what must hold for all of them."""

import math
import random
from functools import partial

import pytest
import torch
from torch.func import grad, vmap

from treetune.losses import preference, reduce
from treetune.losses.preference import Pairs

# Fixture P of the loss contract: log-probs of chosen 0, rejected 0, chosen 1, rejected 1.
TOKENS = [[-0.5, -1.0, -0.25], [-1.0, -1.5], [-2.0, -0.5], [-0.75, -0.25, -1.0]]
ALPHA, ALPHA_2 = (partial(preference.alpha_divergence, alpha=a) for a in (0.5, 2.0))
LOSSES = {
    "dpo": preference.dpo,
    "dpo forward_kl": partial(preference.dpo, score=preference.forward_kl),
    "dpo js": partial(preference.dpo, score=preference.js),
    "dpo alpha": partial(preference.dpo, score=ALPHA),
    "cdpo": partial(preference.cdpo, label_smoothing=0.1),
    "cdpo alpha 2": partial(preference.cdpo, label_smoothing=0.1, score=ALPHA_2),
    "ipo": preference.ipo,
    "ipo js": partial(preference.ipo, score=preference.js),
    "hinge": preference.hinge,
    "hinge alpha": partial(preference.hinge, score=ALPHA),
    "exo": preference.exo,
    "exo js": partial(preference.exo, label_smoothing=0.2, score=preference.js),
    "nca": preference.nca,
    "robust": partial(preference.robust, label_smoothing=0.1),
    "robust js": partial(preference.robust, label_smoothing=0.3, score=preference.js),
    "bco_pair": preference.bco_pair,
    "sppo_hard": preference.sppo_hard,
    "aot": partial(preference.aot, label_smoothing=0.1),
    "aot_unpaired": partial(preference.aot_unpaired, label_smoothing=0.1),
    "apo_zero": preference.apo_zero,
    "apo_down": preference.apo_down,
    "discopop": preference.discopop,
    "discopop js": partial(preference.discopop, tau=0.5, score=preference.js),
    "dpo_norm": preference.dpo_norm,
    "dpo_norm alpha": partial(preference.dpo_norm, score=ALPHA),
}
RANKED = ("aot", "aot_unpaired")
ROW_BY_ROW = [name for name in LOSSES if name not in RANKED]
B = 0.1  # the default beta


def sig(x):
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def lsig(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def f_score(name):
    kl = {"forward_kl": lambda u: 1 - 1 / math.exp(u), "js": lambda u: math.log(2 * math.exp(u) / (math.exp(u) + 1))}
    power = {"alpha": lambda u: (math.exp(-u / 2) - 1) / -0.5, "alpha 2": lambda u: math.exp(u) - 1}
    return (kl | power | {"": lambda u: u})[name]


def smoothed(h, eps):
    return (1 - eps) * math.log(1 + math.exp(-h)) + eps * math.log(1 + math.exp(h))


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


BY_SCORE = {  # of s_c, s_r, n_c, n_r and the smoothing
    "dpo": lambda c, r, n, k, eps: -math.log(sig(B * (c - r))),
    "cdpo": lambda c, r, n, k, eps: smoothed(B * (c - r), 0.1),
    "ipo": lambda c, r, n, k, eps: (c / n - r / k - 5) ** 2,
    "hinge": lambda c, r, n, k, eps: max(0.0, 1 - B * (c - r)),
    "exo": lambda c, r, n, k, eps: kl((sig(B * (c - r)), sig(B * (r - c))), (1 - eps, eps)),
    "robust": lambda c, r, n, k, eps: ((1 - eps) * -lsig(B * (c - r)) + eps * lsig(B * (r - c))) / (1 - 2 * eps),
    "dpo_norm": lambda c, r, n, k, eps: -lsig(B * (c / n - r / k)),
}
BY_RATIO = {
    "nca": lambda c, r: -lsig(B * c) - (lsig(-B * c) + lsig(-B * r)) / 2,
    "bco_pair": lambda c, r: -lsig(B * c) - lsig(-B * r),
    "sppo_hard": lambda c, r: (c - 5) ** 2 + (r + 5) ** 2,
    "apo_zero": lambda c, r: 1 - sig(B * c) + sig(B * r),
    "apo_down": lambda c, r: sig(B * c) + 1 - sig(B * (c - r)),
}
EPS = {"exo": 1e-3, "exo js": 0.2, "robust": 0.1, "robust js": 0.3}


def _discopop(h, tau):
    return sig(-h / tau) * -lsig(h) + sig(h / tau) * math.exp(-h)


def _transport(x, y):
    """Row by row: x_i less the y with the same number of smaller ones, and of equal ones before it."""
    before = [sum((other, j) < (value, i) for j, other in enumerate(x)) for i, value in enumerate(x)]
    return [value - sorted(y)[rank] for value, rank in zip(x, before, strict=True)]


def oracle(name, rows):
    """The loss of each row (S_c, S_r, ref_c, ref_r, n_c, n_r) in Python floats."""
    kind, score = name.split()[0], f_score(" ".join(name.split()[1:]))
    if kind == "aot":
        return [smoothed(B * d, 0.1) for d in _transport([r[0] - r[1] for r in rows], [r[2] - r[3] for r in rows])]
    if kind == "aot_unpaired":
        return [smoothed(B * d, 0.1) for d in _transport([r[0] - r[2] for r in rows], [r[1] - r[3] for r in rows])]
    out = []
    for s_c, s_r, ref_c, ref_r, n_c, n_r in rows:
        c, r = s_c - ref_c, s_r - ref_r
        if kind in BY_RATIO:
            out.append(BY_RATIO[kind](c, r))
        elif kind == "discopop":
            out.append(_discopop(B * (score(c) - score(r)), 0.5 if name.endswith("js") else 0.05))
        else:
            out.append(BY_SCORE[kind](score(c), score(r), max(n_c, 1), max(n_r, 1), EPS.get(name)))
    return out


def _rows(count=25, seed=0, spread=1.5):
    """Random pairs; a side without tokens now and then."""
    gen, rows = random.Random(seed), []
    for _ in range(count):
        lens = [gen.choice([0, 1, 2, 7, 40]) for _ in range(2)]
        ref = [-gen.random() * 3 * n for n in lens]
        sums = [x + gen.gauss(0, spread) if n else 0.0 for x, n in zip(ref, lens, strict=True)]
        rows.append((*sums, *ref, *lens))
    return rows


def _pairs(rows, dtype=torch.float64):
    columns = list(zip(*rows, strict=True)) or [()] * 6
    sums = [torch.tensor(column, dtype=dtype) for column in columns[:4]]
    return Pairs(*sums, *(torch.tensor(column, dtype=torch.int64) for column in columns[4:]))


def _flat(tokens, dtype=torch.float64):
    lens = torch.tensor([len(row) for row in tokens], dtype=torch.int64)
    return torch.tensor([x for row in tokens for x in row], dtype=dtype), torch.repeat_interleave(torch.arange(len(lens)), lens), lens


def _ref(pairs):
    return pairs._replace(ref_chosen=torch.tensor([-2.0, -2.0]).double(), ref_rejected=torch.tensor([-2.0, -1.5]).double())


@pytest.fixture(scope="module")
def fixture_p():
    return _ref(preference.pairs(_flat(TOKENS)[0], None, *_flat(TOKENS)[1:]))


def _leaf(pairs):
    return pairs._replace(chosen=pairs.chosen.clone().requires_grad_(), rejected=pairs.rejected.clone().requires_grad_())


WORKED = [
    (preference.dpo, 0.6747486607),
    (preference.hinge, 0.9625),
    (preference.ipo, 23.8090277778),
    (preference.exo, 2.6968615334),
    (preference.nca, 1.3773685377),
    (partial(preference.robust, label_smoothing=0.1), 0.6700611607),
    (preference.bco_pair, 1.3680521238),
    (preference.sppo_hard, 46.65625),
    (preference.aot, 0.6747486607),
    (partial(preference.aot, label_smoothing=0.1), 0.6784986607),
    (partial(preference.cdpo, label_smoothing=0.1), 0.6784986607),  # on P the order of d is that of the pairs
    (preference.aot_unpaired, 0.6747486607),
    (preference.apo_zero, 0.9906264645),
    (preference.apo_down, 0.9875055311),
    (preference.discopop, 0.8624040017),
    (preference.dpo_norm, 0.6869709621),
    (partial(preference.dpo, score=preference.forward_kl), 0.6718719953),
    (partial(preference.dpo, score=preference.js), 0.6832928059),
    (partial(preference.dpo, score=ALPHA), 0.6734737095),
]


@pytest.mark.parametrize("fn, want", WORKED)
def test_worked_numbers(fixture_p, fn, want):
    assert fixture_p.chosen.tolist() == [-1.75, -2.5] and fixture_p.rejected.tolist() == [-2.5, -2.0]
    assert fn(fixture_p).mean().item() == pytest.approx(want, abs=1e-9)


def test_worked_scores():
    u = torch.tensor([0.25, -0.5], dtype=torch.float64)
    assert preference.reverse_kl(u).tolist() == [0.25, -0.5]
    assert preference.forward_kl(u).tolist() == pytest.approx([0.22119922, -0.64872127], abs=1e-8)
    assert preference.js(u).tolist() == pytest.approx([0.11720776, -0.28092980], abs=1e-8)
    assert preference.alpha_divergence(u).tolist() == pytest.approx([0.23500619, -0.56805083], abs=1e-8)


def test_worked_compositions(fixture_p):
    logp, seq, lens = _flat(TOKENS)
    cut = _ref(preference.pairs(logp, None, seq, lens, ld_alpha=0.5))  # the reference as given
    assert preference.dpo(cut).mean().item() == pytest.approx(0.6844067773, abs=1e-9)
    weight = preference.wpo_weight(logp, torch.full_like(logp, -0.3), seq, lens)
    assert (weight * preference.dpo(fixture_p)).mean().item() == pytest.approx(0.1884950882, abs=1e-9)
    one_sided = preference.wpo_weight(logp[:3], torch.full((3,), -0.3).double(), seq[:3], torch.tensor([3, 0]))
    assert one_sided.item() == pytest.approx(0.7532686565, abs=1e-8)
    mpo = preference.weighted(((preference.dpo, 0.8), (preference.bco_pair, 0.2)))(fixture_p).mean()
    chosen = torch.isin(seq, torch.tensor([0, 2]))
    top, bottom = reduce.by_token(-logp[chosen], seq[chosen], lens[::2])
    assert (top / bottom).item() == pytest.approx(0.85, abs=1e-9)
    assert (mpo + top / bottom).item() == pytest.approx(1.6634093533, abs=1e-9)


def _identical(u, dtype=torch.float64):
    side, one = torch.full((1,), -3.0 + u, dtype=dtype), torch.tensor([1])
    return Pairs(side, side, torch.full_like(side, -3.0), torch.full_like(side, -3.0), one, one)


IDENTICAL = {"dpo": 0.6931471806, "hinge": 1, "ipo": 25, "exo": 2.7612307571, "robust": 0.6931471806, "apo_zero": 1}
IDENTICAL |= {"discopop": 0.8465735903, "dpo_norm": 0.6931471806, "aot": 0.6931471806, "aot_unpaired": 0.6931471806}


@pytest.mark.parametrize("name", IDENTICAL)
@pytest.mark.parametrize("u", [0.0, 1.0])
def test_worked_numbers_of_identical_sides(name, u):
    tolerance = 1e-6 if name == "exo" else 1e-9  # its peer holds epsilon in float32
    assert LOSSES[name](_identical(u)).item() == pytest.approx(IDENTICAL[name], abs=tolerance)


@pytest.mark.parametrize("name, want", [("nca", 1.3862943611), ("bco_pair", 1.3862943611), ("sppo_hard", 50)])
def test_worked_numbers_of_identical_sides_on_the_reference(name, want):
    assert LOSSES[name](_identical(0.0)).item() == pytest.approx(want, abs=1e-9)
    assert LOSSES[name](_identical(1.0)).item() > want + 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_loop_oracle(name):
    rows = _rows()
    assert LOSSES[name](_pairs(rows)).tolist() == pytest.approx(oracle(name, rows), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_by_autograd_and_by_vmap(name):
    pairs = _leaf(_pairs(_rows(6, seed=1)))

    def loss(chosen, rejected):
        return LOSSES[name](pairs._replace(chosen=chosen, rejected=rejected))

    def total(sides):
        return loss(*sides).square().sum()

    assert torch.autograd.gradcheck(loss, (pairs.chosen, pairs.rejected))
    both = torch.stack([pairs.chosen.detach(), pairs.rejected.detach()])
    stack = torch.stack([both, both + 0.7, both.flip(0) - 1.3])
    for row, found in zip(stack, vmap(grad(total))(stack), strict=True):
        leaf = row.clone().requires_grad_()
        torch.testing.assert_close(found, torch.autograd.grad(total(leaf), leaf)[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_identical_sides(name, dtype):
    """Exactly 0 where the loss compares the sides, and not where it holds them to the reference."""
    one = _identical(1.0, dtype)
    theta = one.chosen.clone().requires_grad_()
    (found,) = torch.autograd.grad(LOSSES[name](one._replace(chosen=theta, rejected=theta)).sum(), theta)
    assert (found == 0).all() == (name not in ("nca", "bco_pair", "sppo_hard", "apo_down"))


@pytest.mark.parametrize("name", LOSSES)
def test_the_pair_in_the_right_order_costs_less(name):
    """h at least 1: near 0, discopop rises with h by design."""
    for c, r in ((8.0, -4.0), (14.0, 3.0), (-2.0, -13.0)):
        right, wrong = _pairs([(c - 20, r - 20, -20.0, -20.0, 1, 1)]), _pairs([(r - 20, c - 20, -20.0, -20.0, 1, 1)])
        assert LOSSES[name](right) < LOSSES[name](wrong)


def test_swapping_the_sides_of_dpo_adds_h():
    rows = _rows()
    h = torch.tensor([B * ((a - c) - (b - d)) for a, b, c, d, _, _ in rows], dtype=torch.float64)
    swapped = _pairs([(b, a, d, c, m, n) for a, b, c, d, n, m in rows])
    torch.testing.assert_close(preference.dpo(swapped) - preference.dpo(_pairs(rows)), h)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_pairs(name, dtype):
    pairs = _leaf(_pairs([], dtype))
    value = LOSSES[name](pairs)
    assert value.shape == (0,) and value.dtype == dtype and value.sum() == 0
    assert torch.autograd.grad(value.sum(), pairs.chosen)[0].shape == (0,)


@pytest.mark.parametrize("name", LOSSES)
def test_sides_without_tokens_are_finite(name):
    """The averages of peers are 0 / 0 there."""
    pairs = _leaf(_pairs([(0.0, -3.0, 0.0, -2.5, 0, 4), (-3.0, 0.0, -2.5, 0.0, 4, 0), (0.0, 0.0, 0.0, 0.0, 0, 0)]))
    value = LOSSES[name](pairs)
    grads = torch.autograd.grad(value.sum(), (pairs.chosen, pairs.rejected))
    assert all(torch.isfinite(x).all() for x in (value, *grads))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("field", Pairs._fields[:4])
def test_a_nan_is_never_swallowed_and_never_spreads(name, field):
    rows = _rows(4, seed=2)
    broken = [list(row) for row in rows]
    broken[1][Pairs._fields.index(field)] = math.nan
    value = LOSSES[name](_pairs(broken))
    assert value.isnan().sum() >= 1 and value.sum().isnan()
    if name not in RANKED:
        assert value.isnan().tolist() == [False, True, False, False]
        assert value[[0, 2, 3]].tolist() == LOSSES[name](_pairs(rows))[[0, 2, 3]].tolist()


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "dpo forward_kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_log_ratios_are_finite(name, dtype):
    far = [(c, r, 0.0, 0.0, 1, 1) for c in (-9e3, -1000.0, 0.0, 1000.0) for r in (-9e3, -1000.0, 0.0, 1000.0)]
    pairs = _leaf(_pairs(far, dtype))
    value = LOSSES[name](pairs)
    grads = torch.autograd.grad(value.sum(), (pairs.chosen, pairs.rejected))
    assert all(torch.isfinite(x).all() for x in (value, *grads))


def test_forward_kl_overflows_and_alpha_0_is_the_clamped_form():
    u = torch.linspace(-60, 60, 13, dtype=torch.float64)
    torch.testing.assert_close(preference.alpha_divergence(u, alpha=0.0), preference.forward_kl(u), rtol=1e-12, atol=0)
    assert preference.forward_kl(torch.tensor([-100.0])) == -math.inf
    assert preference.alpha_divergence(torch.tensor([-100.0]), alpha=0.0).item() == pytest.approx(-math.exp(80), rel=1e-5)


def test_discopop_far_below_0_is_the_logistic_part():
    """A loss of q and e^-h apart is 0 * inf there."""
    assert preference.discopop(_pairs([(-3000.0, 0.0, 0.0, 0.0, 1, 1)], torch.float32)).item() == pytest.approx(300)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_sums_are_computed_in_float32(name, dtype):
    low = _pairs(_rows(25, seed=3), dtype)
    exact = low._replace(**{field: getattr(low, field).double() for field in Pairs._fields[:4]})
    found = LOSSES[name](low)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), LOSSES[name](exact), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("name", ROW_BY_ROW)
def test_a_pair_does_not_depend_on_the_others(name):
    rows = _rows(5, seed=4)
    assert LOSSES[name](_pairs(rows)).tolist() == pytest.approx([LOSSES[name](_pairs([row])).item() for row in rows], rel=1e-14)


def test_limits():
    pairs = _pairs(_rows())
    for fn in (preference.cdpo, preference.robust):
        torch.testing.assert_close(fn(pairs, label_smoothing=0.0), preference.dpo(pairs), rtol=0, atol=0)
    assert preference.alpha_divergence(pairs.chosen, alpha=1.0) is pairs.chosen
    torch.testing.assert_close(preference.alpha_divergence(pairs.chosen, alpha=1 + 2e-6), pairs.chosen, rtol=2e-4, atol=0)
    assert all((fn(pairs, beta=0.3) - fn(pairs)).abs().max() > 1e-3 for fn in LOSSES.values())


@pytest.mark.parametrize("fn", [preference.cdpo, preference.exo, preference.robust, preference.aot, preference.aot_unpaired])
def test_label_smoothing_out_of_range(fn, fixture_p):
    for eps in (-0.1, 0.5, 1.0, math.nan):
        with pytest.raises(ValueError, match=rf"label_smoothing={eps}: expected a number .* below 0.5"):
            fn(fixture_p, label_smoothing=eps)
    assert torch.isfinite(fn(fixture_p, label_smoothing=0.499)).all()


def test_exo_has_no_limit_without_smoothing(fixture_p):
    with pytest.raises(ValueError, match="above 0 and below 0.5"):
        preference.exo(fixture_p, label_smoothing=0.0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_missing_reference_is_an_error(name):
    bare = preference.pairs(_flat(TOKENS)[0], None, *_flat(TOKENS)[1:])
    assert bare.ref_chosen is None and bare.ref_rejected is None
    with pytest.raises(ValueError, match="pass ref_logp"):
        LOSSES[name](bare)
