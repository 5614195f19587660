"""What is put around a pair loss: sums of sequences, LD-DPO, WPO, mixtures, and the groups of AOT."""

import math
import random

import pytest
import torch
from torch.func import grad, vmap

from treetune.losses import preference
from treetune.losses.preference import Pairs


def _tokens(lens, seed=0):
    gen = random.Random(seed)
    return [[-3 * gen.random() for _ in range(n)] for n in lens]


def _flat(tokens, dtype=torch.float64):
    lens = torch.tensor([len(row) for row in tokens], dtype=torch.int64)
    return torch.tensor([x for row in tokens for x in row], dtype=dtype), torch.repeat_interleave(torch.arange(len(lens)), lens), lens


LENS = (3, 2, 0, 4, 1, 1, 5, 0, 2, 6)
TOKENS, OTHER = _tokens(LENS), _tokens(LENS, seed=1)


def ld_oracle(tokens, alpha):
    out = []
    for i, row in enumerate(tokens):
        k = min(len(tokens[i - i % 2]), len(tokens[i - i % 2 + 1]))
        out.append(sum(x if t < k else alpha * x for t, x in enumerate(row)))
    return out


def test_pairs_are_sums_and_counts():
    logp, seq, lens = _flat(TOKENS)
    pairs = preference.pairs(logp, _flat(OTHER)[0], seq, lens)
    for field, rows in (("chosen", TOKENS[::2]), ("rejected", TOKENS[1::2]), ("ref_chosen", OTHER[::2]), ("ref_rejected", OTHER[1::2])):
        assert getattr(pairs, field).tolist() == pytest.approx([sum(row) for row in rows], rel=1e-14)
    assert pairs.len_chosen.tolist() == [3, 0, 1, 5, 2] and pairs.len_rejected.tolist() == [2, 4, 1, 0, 6]
    assert pairs.len_chosen.dtype == torch.int64


def test_the_default_sum_is_ld_alpha_1():
    logp, seq, lens = _flat(TOKENS)
    for plain, cut in zip(preference.pairs(logp, logp, seq, lens), preference.pairs(logp, logp, seq, lens, ld_alpha=1.0), strict=True):
        assert torch.equal(plain, cut)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_ld_cuts_policy_and_reference_at_the_same_token(alpha):
    """A precomputed reference therefore holds token log-probs: its sums depend on the pair and on ld_alpha."""
    logp, seq, lens = _flat(TOKENS)
    assert preference.ld_sum(logp, seq, lens, ld_alpha=alpha).tolist() == pytest.approx(ld_oracle(TOKENS, alpha), rel=1e-12)
    pairs = preference.pairs(logp, _flat(OTHER)[0], seq, lens, ld_alpha=alpha)
    ours, ref = ld_oracle(TOKENS, alpha), ld_oracle(OTHER, alpha)
    for field, want in (("chosen", ours[::2]), ("rejected", ours[1::2]), ("ref_chosen", ref[::2]), ("ref_rejected", ref[1::2])):
        assert getattr(pairs, field).tolist() == pytest.approx(want, rel=1e-12)
    same = preference.pairs(logp, logp, seq, lens, ld_alpha=alpha)
    assert torch.equal(same.chosen, same.ref_chosen) and torch.equal(same.rejected, same.ref_rejected)


def test_ld_gradients_by_autograd_and_by_vmap():
    logp, seq, lens = _flat(TOKENS)
    assert torch.autograd.gradcheck(lambda x: preference.ld_sum(x, seq, lens, ld_alpha=0.3), logp.clone().requires_grad_())

    def total(x):
        return preference.dpo(preference.pairs(x, _flat(OTHER)[0], seq, lens, ld_alpha=0.3)).square().sum()

    stack = torch.stack([logp, 2 * logp])
    for row, found in zip(stack, vmap(grad(total))(stack), strict=True):
        leaf = row.clone().requires_grad_()
        torch.testing.assert_close(found, torch.autograd.grad(total(leaf), leaf)[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_token_that_ld_leaves_out_cannot_leak(bad):
    """A mask that multiplies makes nan of it."""
    logp, seq, lens = _flat([[-1.0, -2.0, bad], [-1.0, -1.5]])
    logp.requires_grad_()
    value = preference.ld_sum(logp, seq, lens, ld_alpha=0.0)
    assert value.tolist() == [-3.0, -2.5]
    assert torch.autograd.grad(value.sum(), logp)[0].tolist() == [1, 1, 0, 1, 1]
    assert not torch.isfinite(preference.ld_sum(logp, seq, lens, ld_alpha=0.5)[0]), "where it counts, it is never swallowed"


def test_ld_alpha_as_a_tensor():
    logp, seq, lens = _flat(TOKENS)
    found = preference.ld_sum(logp, seq, lens, ld_alpha=torch.tensor(0.25, dtype=torch.float64))
    assert torch.equal(found, preference.ld_sum(logp, seq, lens, ld_alpha=0.25))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan, 2])
def test_ld_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match=rf"ld_alpha={alpha}: expected a number from 0"):
        preference.pairs(_flat(TOKENS)[0], None, *_flat(TOKENS)[1:], ld_alpha=alpha)


def test_an_odd_number_of_sequences():
    with pytest.raises(ValueError, match="3 sequences cannot be pairs"):
        preference.pairs(_flat(TOKENS[:3])[0], None, *_flat(TOKENS[:3])[1:])


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_no_tokens_and_no_pairs(alpha):
    for rows, count in (([], 0), ([[], []], 1)):
        logp, seq, lens = _flat(rows)
        logp.requires_grad_()
        pairs = preference.pairs(logp, logp.detach(), seq, lens, ld_alpha=alpha)
        assert all(x.shape == (count,) for x in pairs)
        assert torch.autograd.grad(preference.dpo(pairs).sum(), logp)[0].shape == (0,)
        assert preference.wpo_weight(logp, logp, seq, lens).tolist() == [1.0] * count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_low_precision_tokens_are_summed_in_float32(dtype, alpha):
    logp, seq, lens = _flat(_tokens((300, 170), seed=2), dtype)
    low = preference.pairs(logp, logp, seq, lens, ld_alpha=alpha)
    want = preference.pairs(logp.double(), None, seq, lens, ld_alpha=alpha)
    assert low.chosen.dtype == low.ref_chosen.dtype == torch.float32 and want.chosen.dtype == torch.float64
    torch.testing.assert_close(low.chosen.double(), want.chosen, rtol=1e-5, atol=0)
    torch.testing.assert_close(low.rejected.double(), want.rejected, rtol=1e-5, atol=0)
    weight = preference.wpo_weight(logp, logp * 0.5, seq, lens)
    torch.testing.assert_close(weight.double(), preference.wpo_weight(logp.double(), logp.double() * 0.5, seq, lens), rtol=1e-5, atol=0)


def test_wpo_equals_a_loop_and_carries_no_gradient():
    logp, seq, lens = _flat(TOKENS)
    logp.requires_grad_()
    squares = [[-abs(x) / 2 for x in row] for row in OTHER]
    weight = preference.wpo_weight(logp, _flat(squares)[0], seq, lens)
    sides = [math.exp(sum(a - b for a, b in zip(x, y, strict=True)) / max(len(x), 1)) for x, y in zip(TOKENS, squares, strict=True)]
    assert weight.tolist() == pytest.approx([sides[i] * sides[i + 1] for i in range(0, len(sides), 2)], rel=1e-12)
    assert not weight.requires_grad
    loss = preference.dpo(preference.pairs(logp, _flat(OTHER)[0], seq, lens))
    (found,) = torch.autograd.grad((weight * loss).sum(), logp, retain_graph=True)
    (plain,) = torch.autograd.grad(loss.sum(), logp)
    torch.testing.assert_close(found, weight[seq // 2] * plain, rtol=1e-12, atol=0)


def test_wpo_never_swallows_a_nan():
    logp, seq, lens = _flat([[-1.0, math.nan], [-1.0], [-1.0], [-2.0]])
    assert preference.wpo_weight(logp, logp.nan_to_num(), seq, lens).isnan().tolist() == [True, False]


def _pairs(count=8, seed=0):
    gen = torch.Generator().manual_seed(seed)
    sums = [3 * torch.randn(count, generator=gen, dtype=torch.float64) - 20 for _ in range(4)]
    return Pairs(*sums, torch.full((count,), 5), torch.full((count,), 4))


def test_a_mixture_is_the_weighted_sum_in_value_and_gradient():
    pairs = _pairs()
    pairs = pairs._replace(chosen=pairs.chosen.requires_grad_())
    mixed = preference.weighted(((preference.dpo, 0.8), (preference.ipo, 0.2), (preference.nca, -0.1)))
    for options in ({}, {"beta": 0.4}):
        found = mixed(pairs, **options)
        want = 0.8 * preference.dpo(pairs, **options) + 0.2 * preference.ipo(pairs, **options) - 0.1 * preference.nca(pairs, **options)
        torch.testing.assert_close(found, want, rtol=1e-14, atol=0)
        grads = [torch.autograd.grad(x.sum(), pairs.chosen)[0] for x in (found, want)]
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)


def test_a_part_of_weight_0_cannot_leak():
    def broken(pairs, **options):
        return torch.full_like(pairs.chosen, math.inf)

    pairs = _pairs()
    assert torch.equal(preference.weighted(((preference.dpo, 1.0), (broken, 0.0)))(pairs), preference.dpo(pairs))
    for parts in ((), ((preference.dpo, 0.0),)):
        with pytest.raises(ValueError, match=f"a mixture of {len(parts)} losses, none with a weight"):
            preference.weighted(parts)


AOT = [preference.aot, preference.aot_unpaired]
GROUP = torch.tensor([1, 0, 1, 1, 0, 2, 0, 1])


def _take(pairs, rows):
    return Pairs(*(x[rows] for x in pairs))


@pytest.mark.parametrize("fn", AOT)
def test_aot_depends_on_who_is_ranked_together(fn):
    """Peers rank the micro-batch; a group that is named makes the result independent of the split."""
    pairs = _pairs()
    whole = fn(pairs)
    halves = torch.cat([fn(_take(pairs, torch.arange(4))), fn(_take(pairs, torch.arange(4, 8)))])
    assert (whole - halves).abs().max() > 1e-3
    torch.testing.assert_close(fn(pairs, group=torch.arange(8) // 4), halves, rtol=1e-14, atol=0)


@pytest.mark.parametrize("fn", AOT)
def test_aot_groups_equal_one_call_each(fn):
    pairs = _pairs()
    want = torch.zeros(8, dtype=torch.float64)
    for number in range(3):
        want[GROUP == number] = fn(_take(pairs, GROUP == number))
    torch.testing.assert_close(fn(pairs, group=GROUP), want, rtol=1e-14, atol=0)
    torch.testing.assert_close(fn(pairs, group=torch.zeros(8, dtype=torch.int64)), fn(pairs), rtol=0, atol=0)


@pytest.mark.parametrize("fn", AOT)
@pytest.mark.parametrize("group", [None, GROUP])
def test_aot_follows_its_rows_in_any_order(fn, group):
    pairs, order = _pairs(), torch.tensor([3, 7, 0, 1, 6, 2, 5, 4])
    moved = fn(_take(pairs, order), group=None if group is None else group[order])
    torch.testing.assert_close(moved, fn(pairs, group=group)[order], rtol=1e-14, atol=0)


@pytest.mark.parametrize("fn", AOT)
def test_aot_groups_have_gradients_by_autograd_and_by_vmap(fn):
    pairs = _pairs()

    def loss(chosen):
        return fn(pairs._replace(chosen=chosen), group=GROUP)

    assert torch.autograd.gradcheck(loss, pairs.chosen.clone().requires_grad_())
    stack = torch.stack([pairs.chosen, pairs.rejected])
    for row, found in zip(stack, vmap(grad(lambda x: loss(x).sum()))(stack), strict=True):
        leaf = row.clone().requires_grad_()
        torch.testing.assert_close(found, torch.autograd.grad(loss(leaf).sum(), leaf)[0], rtol=1e-12, atol=0)
