"""Attention against the one rule, written here as a loop over pairs of tokens."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treetune.ops import attention, attention_torch

H, K, D = 6, 2, 8


def _batch(documents, *, branches=True):
    """documents: [(trunk tokens, [(start, branch tokens), ...]), ...] -> the keys of a batch that attention reads."""
    branch, start, positions, cu_docs = [], [], [], [0]
    for trunk, grown in documents:
        branch += [0] * trunk
        start += [0] * trunk
        positions += range(trunk)
        for b, (leave, tokens) in enumerate(grown, 1):
            branch += [b] * tokens
            start += [leave] * tokens
            positions += range(leave, leave + tokens)
        cu_docs.append(len(branch))
    out = {"tokens": torch.zeros(len(branch), dtype=torch.int64), "cu_docs": torch.tensor(cu_docs, dtype=torch.int32)}
    out["positions"] = torch.tensor(positions, dtype=torch.int64)
    if branches:
        out |= {"branch": torch.tensor(branch, dtype=torch.int32), "start": torch.tensor(start, dtype=torch.int32)}
    return out


LINEAR = _batch([(6, []), (0, []), (10, []), (1, [])], branches=False)
TREES = _batch([(6, [(6, 3), (6, 2)]), (1, []), (9, [(2, 4), (0, 2), (9, 1)]), (4, []), (3, [(1, 3)])])


def _qkv(tokens, dtype=torch.float64, seed=0, width=D):
    gen = torch.Generator().manual_seed(seed)
    shapes = ((tokens, H, D), (tokens, K, D), (tokens, K, width))
    return tuple(torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)


# How scores become weights: soft-cap, whether there are sinks, and the width of the values.
WEIGHTINGS = [(None, False, D), (1.5, False, D), (None, True, 5), (1.5, True, D), (None, False, 11)]


def _weighed(weighting, tokens, dtype=torch.float64):
    """The leaves q, k, v (and sinks) of a weighting, and its soft-cap."""
    softcap, sinks, width = weighting
    leaves = _qkv(tokens, dtype, width=width)
    return (*leaves, torch.linspace(-2, 3, H, dtype=dtype).requires_grad_()) if sinks else leaves, softcap


def _visible(batch, q, k, window):
    cu_docs = batch["cu_docs"].tolist()
    doc = [max(d for d in range(len(cu_docs) - 1) if cu_docs[d] <= row) for row in (q, k)]
    if doc[0] != doc[1] or k > q:
        return False
    if window is not None and int(batch["positions"][q] - batch["positions"][k]) >= window:
        return False
    if "branch" not in batch:
        return True
    b_q, b_k = int(batch["branch"][q]), int(batch["branch"][k])
    return b_q == b_k or (b_k == 0 and k - cu_docs[doc[0]] < int(batch["start"][q]))


def _loop(q, k, v, batch, window, softcap=None, sinks=None):
    rows = []
    for i in range(len(q)):
        seen = [j for j in range(len(q)) if _visible(batch, i, j, window)]
        heads = []
        for h in range(H):
            scores = torch.stack([q[i, h] @ k[j, h * K // H] for j in seen]) / D**0.5
            mass = (scores if softcap is None else softcap * torch.tanh(scores / softcap)).exp()
            total = mass.sum() + (0 if sinks is None else sinks[h].exp())
            heads.append((mass / total) @ torch.stack([v[j, h * K // H] for j in seen]))
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def _both(fn, leaves):
    """The output and the gradients of fn(q, k, v) or fn(q, k, v, sinks)."""
    out = fn(*leaves)
    coefficient = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out, *torch.autograd.grad(out, leaves, coefficient)


def _op(batch, window, softcap=None, *, ref=False):
    """fn(q, k, v, sinks=None): the op or its reference."""
    if ref:
        return lambda q, k, v, s=None: attention.attention_ref(q, k, v, batch, window=window, softcap=softcap, sinks=s)
    plan = attention.plan(batch, windows=(window,), plain=False)
    return lambda q, k, v, s=None: attention.attention(q, k, v, plan, softcap=softcap, sinks=s)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("batch", [LINEAR, TREES], ids=["linear", "trees"])
def test_reference_and_op_equal_the_rule(batch, window, weighting):
    leaves, softcap = _weighed(weighting, len(batch["tokens"]))
    exact = _both(lambda q, k, v, s=None: _loop(q, k, v, batch, window, softcap, s), leaves)
    for ref in (True, False):
        for a, b in zip(_both(_op(batch, window, softcap, ref=ref), leaves), exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def _random_batch(seed, sizes=(1, 3, 17, 40)):
    rng = random.Random(seed)
    documents = []
    for _ in range(rng.randint(1, 5)):
        trunk = rng.choice(sizes)
        documents.append((trunk, [(rng.randint(0, trunk), rng.choice(sizes)) for _ in range(rng.choice([0, 0, 1, 4]))]))
    return _batch(documents)


@pytest.mark.parametrize("weighting", [WEIGHTINGS[0], WEIGHTINGS[2], WEIGHTINGS[3]])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_against_float64(seed, dtype, weighting, relative_error):
    batch, window = _random_batch(seed), [None, 5, 30][seed % 3]
    leaves, softcap = _weighed(weighting, len(batch["tokens"]), dtype)
    exact = _both(_op(batch, window, softcap, ref=True), [x.detach().double().requires_grad_() for x in leaves])
    ours, plain = (_both(_op(batch, window, softcap, ref=ref), leaves) for ref in (False, True))
    errors = [(relative_error(a, truth), relative_error(b, truth)) for a, b, truth in zip(ours, plain, exact, strict=True)]
    assert all(mine <= 1.5 * reference + 1e-6 for mine, reference in errors[:4])
    # The gradient of sinks is six numbers, in which roundings average less: a ratio of at most 1.74 over 60 seeds, 0.6 in the median.
    assert all(mine <= 2 * reference + 1e-6 for mine, reference in errors[4:])


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("batch", [LINEAR, TREES], ids=["linear", "trees"])
def test_documents_are_isolated_bit_for_bit(batch, window, dtype, softcap):
    cu_docs, op = batch["cu_docs"].tolist(), _op(batch, window, softcap)
    qkv = _qkv(cu_docs[-1], dtype)
    before = _both(op, qkv)
    for lo, hi in zip(cu_docs, cu_docs[1:], strict=False):
        changed = [x.detach().clone() for x in qkv]
        for x in changed:
            x[lo:hi] = torch.nan
        after = _both(op, [x.requires_grad_() for x in changed])
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a[:lo], b[:lo]) and torch.equal(a[hi:], b[hi:])
            assert hi == lo or b[lo:hi].isnan().any()


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_branches_do_not_see_each_other(softcap):
    op = _op(TREES, None, softcap)
    q, k, v = (x.detach() for x in _qkv(len(TREES["tokens"]), torch.float32))
    before = op(q, k, v)
    sibling = torch.zeros(len(q), dtype=torch.bool)
    sibling[6:9] = True  # the first branch of the first document
    for x in (q, k, v):
        x[sibling] += 1
    after = op(q, k, v)
    assert torch.equal(before[~sibling], after[~sibling]) and not torch.equal(before[sibling], after[sibling])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("window", [None, 3])
def test_branch_equals_its_own_document(window, weighting):
    trunk, leave, tokens = 9, 5, 4
    shared = _batch([(trunk, [(2, 3), (leave, tokens)])])
    leaves, softcap = _weighed(weighting, trunk + 3 + tokens, torch.float32)
    qkv, sinks = leaves[:3], leaves[3:]
    rows = torch.cat([torch.arange(leave), torch.arange(trunk + 3, trunk + 3 + tokens)])
    alone = _batch([(leave + tokens, [])], branches=False)
    ours = _op(shared, window, softcap)(*qkv, *sinks)[trunk + 3 :]
    copied = _op(alone, window, softcap)(*(x[rows] for x in qkv), *sinks)[leave:]
    torch.testing.assert_close(ours, copied, rtol=1e-6, atol=1e-6)


def test_window_wider_than_the_documents_is_no_window():
    for batch in (LINEAR, TREES):
        pattern = attention.plan(batch, windows=(11,)).patterns[0]
        assert pattern.window is None and all(document.trunk_mask is None for document in pattern.documents)
    documents = attention.plan(LINEAR, windows=(9,)).patterns[0].documents
    assert documents[2].trunk_mask is not None and documents[0].trunk_mask is None


def test_scale():
    qkv = _qkv(len(TREES["tokens"]))
    out = attention.attention(*qkv, attention.plan(TREES), scale=0.3)
    torch.testing.assert_close(out, attention.attention_ref(*qkv, TREES, scale=0.3))
    assert not torch.allclose(out, attention.attention_ref(*qkv, TREES))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_no_tokens(weighting):
    batch = {"tokens": torch.zeros(0, dtype=torch.int64), "cu_docs": torch.tensor([0])}
    leaves, softcap = _weighed(weighting, 0)
    out = _op(batch, None, softcap)(*leaves)
    assert out.shape == (0, H, weighting[2]) and not any(x.abs().sum() for x in torch.autograd.grad(out.sum(), leaves))


def test_a_plan_serves_layers_of_several_windows():
    qkv, together = _qkv(len(TREES["tokens"])), attention.plan(TREES, windows=(None, 3, 11, 3, 5))
    assert together.windows == (None, 3, 11, 5)
    assert together.of(11).patterns[0] is together.of(None).patterns[0], "no document is longer than 11 tokens"
    for window in together.windows:
        alone = attention.attention(*qkv, attention.plan(TREES, windows=(window,)))
        assert torch.equal(attention.attention(*qkv, together.of(window)), alone)
    with pytest.raises(ValueError, match=r"of windows \(None, 3, 11, 5\) and the layer's is 4"):
        together.of(4)
    with pytest.raises(ValueError, match=r"serves layers of windows \(None, 3, 11, 5\)"):
        attention.attention(*qkv, together)


# Boundaries are data: a list that does not describe the tokens is refused, whatever it is, and never guessed from positions.


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(-3, 40), max_size=8), st.integers(0, 40))
def test_boundaries_are_exact_or_refused(cu_docs, tokens):
    batch = {"tokens": torch.zeros(tokens, dtype=torch.int64), "cu_docs": torch.tensor(cu_docs, dtype=torch.int32)}
    legal = bool(cu_docs) and cu_docs[0] == 0 and cu_docs[-1] == tokens and sorted(cu_docs) == cu_docs
    if not legal:
        with pytest.raises(ValueError, match="cu_docs"):
            attention.plan(batch)
        return
    plan = attention.plan(batch)
    trunks = [document.trunk for document in plan.patterns[0].documents]
    assert sum(trunks) == tokens and plan.longest == max(trunks, default=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_docs": torch.tensor([[0, 25]])}, "expected integers"),
        ({"cu_docs": torch.tensor([0.0, 25.0])}, "expected integers"),
        ({"cu_docs": torch.tensor([0, 75])}, "expected from 0 to the"),  # three copies of the positions, say
        ({"positions": torch.zeros(3, 36, dtype=torch.int64)}, "positions got shape"),
        ({"branch": None}, "both branch and start"),
        ({"start": TREES["start"] + (TREES["branch"] == 2) * 100}, "start is 106 at token 9: expected 0..6"),
        ({"branch": TREES["branch"].flip(0)}, "branch must be 0 on the trunk"),
        ({"branch": TREES["branch"] * 2}, "grow by 1"),
        ({"branch": TREES["branch"] - 1}, "branch must be 0 on the trunk"),
    ],
)
def test_batches_that_contradict_themselves(change, message):
    batch = {key: value for key, value in (TREES | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        attention.plan(batch)


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        (LINEAR, {"backend": "eager"}, "expected one of sdpa, varlen, flex"),
        (LINEAR, {"backend": "varlen"}, "it runs on CUDA only, not on cpu"),
        (LINEAR, {"backend": "varlen", "device": "cuda", "dtype": torch.float32}, "not torch.float32"),
        (TREES, {"backend": "varlen", "device": "cuda"}, "it knows no branches"),
        (LINEAR, {"backend": "varlen", "device": "cuda", "plain": False}, "it knows no soft-caps and no sinks"),
        (TREES, {"backend": "flex"}, "no backward on the CPU"),
        (TREES, {"backend": "sdpa", "device": "cuda"}, "meant for the CPU"),
        (LINEAR, {"windows": (0,)}, "at least 1 token"),
    ],
)
def test_backend_that_cannot_honour_the_plan_is_refused(batch, options, message):
    with pytest.raises(ValueError, match=message):
        attention.plan(batch, **options)


def test_inputs_that_do_not_fit_the_plan():
    plan, (q, k, v) = attention.plan(LINEAR), _qkv(17)
    with pytest.raises(ValueError, match="K | H"):
        attention.attention(q, k[:, :1].expand(-1, 4, -1), v[:, :1].expand(-1, 4, -1), plan)
    with pytest.raises(ValueError, match="K | H"):
        attention.attention(q, k[..., :5], v, plan)
    with pytest.raises(ValueError, match=r"sinks got shape \(2,\): expected \[6\]"):
        attention.attention(q, k, v, attention.plan(LINEAR, plain=False), sinks=torch.zeros(K))
    for options in ({"softcap": 2.0}, {"sinks": torch.zeros(H)}):
        with pytest.raises(ValueError, match="for plain attention, and the layer has a soft-cap or sinks"):
            attention.attention(q, k, v, plan, **options)
    with pytest.raises(ValueError, match="made for 17 tokens and q has 16"):
        attention.attention(q[:16], k[:16], v[:16], plan)


def test_branches_go_in_groups_of_whole_ones(monkeypatch):
    monkeypatch.setattr(attention_torch, "GROUP", 4)
    plan, qkv = attention.plan(TREES), _qkv(len(TREES["tokens"]))
    documents = plan.patterns[0].documents
    assert [d.groups for d in documents] == [(5,), (), (4, 3), (), (3,)]
    assert [d.seen for d in documents] == [(6,), (), (2, 9), (), (1,)], "no group reads trunk tokens that none of its branches sees"
    assert [tuple(m.shape) for m in documents[2].group_masks] == [(4, 6), (3, 12)]
    for mine, want in zip(_both(lambda *x: attention.attention(*x, plan), qkv), _both(lambda *x: _loop(*x, TREES, None), qkv), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-12, atol=1e-12)
