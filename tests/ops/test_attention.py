"""Attention against the one rule, written here as a loop over pairs of tokens."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treetune.ops import attention, attention_mask, attention_torch

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


def _qkv(tokens, dtype=torch.float64, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tokens, heads, D, generator=gen, dtype=torch.float64).to(dtype).requires_grad_() for heads in (H, K, K))


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


def _loop(q, k, v, batch, window):
    rows = []
    for i in range(len(q)):
        seen = [j for j in range(len(q)) if _visible(batch, i, j, window)]
        heads = []
        for h in range(H):
            scores = torch.stack([q[i, h] @ k[j, h * K // H] for j in seen]) / D**0.5
            heads.append(scores.softmax(0) @ torch.stack([v[j, h * K // H] for j in seen]))
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def _both(fn, qkv):
    out = fn(*qkv)
    coefficient = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out, *torch.autograd.grad(out, qkv, coefficient)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("batch", [LINEAR, TREES], ids=["linear", "trees"])
def test_reference_and_op_equal_the_rule(batch, window):
    qkv = _qkv(len(batch["tokens"]))
    exact = _both(lambda q, k, v: _loop(q, k, v, batch, window), qkv)
    plan = attention.plan(batch, windows=(window,))
    for fn in (lambda q, k, v: attention.attention_ref(q, k, v, batch, window=window), lambda q, k, v: attention.attention(q, k, v, plan)):
        for a, b in zip(_both(fn, qkv), exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def _random_batch(seed, sizes=(1, 3, 17, 40)):
    rng = random.Random(seed)
    documents = []
    for _ in range(rng.randint(1, 5)):
        trunk = rng.choice(sizes)
        documents.append((trunk, [(rng.randint(0, trunk), rng.choice(sizes)) for _ in range(rng.choice([0, 0, 1, 4]))]))
    return _batch(documents)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_against_float64(seed, dtype, relative_error):
    batch, window = _random_batch(seed), [None, 5, 30][seed % 3]
    qkv = _qkv(len(batch["tokens"]), dtype)
    exact = _both(
        lambda q, k, v: attention.attention_ref(q, k, v, batch, window=window), [x.detach().double().requires_grad_() for x in qkv]
    )
    plan = attention.plan(batch, windows=(window,))
    ours = _both(lambda q, k, v: attention.attention(q, k, v, plan), qkv)
    plain = _both(lambda q, k, v: attention.attention_ref(q, k, v, batch, window=window), qkv)
    for a, b, truth in zip(ours, plain, exact, strict=True):
        assert relative_error(a, truth) <= 1.5 * relative_error(b, truth) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("batch", [LINEAR, TREES], ids=["linear", "trees"])
def test_documents_are_isolated_bit_for_bit(batch, window, dtype):
    cu_docs, plan = batch["cu_docs"].tolist(), attention.plan(batch, windows=(window,))
    qkv = _qkv(cu_docs[-1], dtype)
    before = _both(lambda q, k, v: attention.attention(q, k, v, plan), qkv)
    for lo, hi in zip(cu_docs, cu_docs[1:], strict=False):
        changed = [x.detach().clone() for x in qkv]
        for x in changed:
            x[lo:hi] = torch.nan
        after = _both(lambda q, k, v: attention.attention(q, k, v, plan), [x.requires_grad_() for x in changed])
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a[:lo], b[:lo]) and torch.equal(a[hi:], b[hi:])
            assert hi == lo or b[lo:hi].isnan().any()


def test_branches_do_not_see_each_other():
    plan = attention.plan(TREES)
    q, k, v = (x.detach() for x in _qkv(len(TREES["tokens"]), torch.float32))
    before = attention.attention(q, k, v, plan)
    sibling = torch.zeros(len(q), dtype=torch.bool)
    sibling[6:9] = True  # the first branch of the first document
    for x in (q, k, v):
        x[sibling] += 1
    after = attention.attention(q, k, v, plan)
    assert torch.equal(before[~sibling], after[~sibling]) and not torch.equal(before[sibling], after[sibling])


@pytest.mark.parametrize("window", [None, 3])
def test_branch_equals_its_own_document(window):
    trunk, leave, tokens = 9, 5, 4
    shared = _batch([(trunk, [(2, 3), (leave, tokens)])])
    qkv = [x.detach() for x in _qkv(trunk + 3 + tokens, torch.float32)]
    rows = torch.cat([torch.arange(leave), torch.arange(trunk + 3, trunk + 3 + tokens)])
    alone = _batch([(leave + tokens, [])], branches=False)
    ours = attention.attention(*qkv, attention.plan(shared, windows=(window,)))[trunk + 3 :]
    copied = attention.attention(*(x[rows] for x in qkv), attention.plan(alone, windows=(window,)))[leave:]
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


def test_no_tokens():
    batch = {"tokens": torch.zeros(0, dtype=torch.int64), "cu_docs": torch.tensor([0])}
    assert attention.attention(*_qkv(0), attention.plan(batch)).shape == (0, H, D)


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
    with pytest.raises(ValueError, match="made for 17 tokens and q has 16"):
        attention.attention(q[:16], k[:16], v[:16], plan)


def _varlen_2_13(
    q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False, num_splits=None
):
    """The documented meaning of torch 2.13's varlen_attn."""
    assert max_q == max_k == int(cu_q.diff().max()) and num_splits == 1 and enable_gqa and window_size[1] == 0
    batch = {"tokens": q[:, 0, 0], "cu_docs": cu_q}
    return attention.attention_ref(q, k, v, batch, window=None if window_size[0] < 0 else window_size[0] + 1, scale=scale)


def _varlen_2_10(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, return_aux=None):
    """The documented meaning of torch 2.10's: one head count, no scale, no window."""
    assert is_causal and q.shape == k.shape
    return attention.attention_ref(q, k, v, {"tokens": q[:, 0, 0], "cu_docs": cu_q})


CUDA = attention._Need(torch.device("cuda"), None, branches=False, plain=True)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("varlen", [_varlen_2_13, _varlen_2_10])
def test_varlen_call_of_each_torch(monkeypatch, varlen, window):
    names = tuple(varlen.__code__.co_varnames[: varlen.__code__.co_argcount + varlen.__code__.co_kwonlyargcount])
    monkeypatch.setattr(attention, "_varlen", lambda: (varlen, names))
    if varlen is _varlen_2_10 and window:
        assert "no window" in attention._varlen_lacks(CUDA, window)
        assert attention._choose(None, CUDA, window) == "flex"
        return
    assert attention._choose(None, CUDA, window) == "varlen"
    plan, qkv = attention.plan(LINEAR, windows=(window,)), _qkv(17)
    out = attention._attention_varlen(*qkv, plan, attention_torch.Weighting(0.3, None, None))
    torch.testing.assert_close(out, attention.attention_ref(*qkv, LINEAR, window=window, scale=0.3))


@pytest.mark.parametrize("seed", range(6))
def test_block_mask_covers_the_rule(seed):
    batch = _random_batch(seed, sizes=(1, 60, 128, 300))
    if seed % 3 == 0:
        batch = _batch([(5, []), (700, []), (300, [])], branches=False)
    tokens = len(batch["tokens"])
    rows, blocks = torch.arange(tokens), -(-tokens // attention_mask.BLOCK)
    for window in (None, 40, 200):
        dense = torch.zeros(blocks * attention_mask.BLOCK, blocks * attention_mask.BLOCK, dtype=torch.bool)
        dense[:tokens, :tokens] = attention_mask.allowed(batch, rows[:, None], rows[None], window)
        tiles = dense.view(blocks, attention_mask.BLOCK, blocks, attention_mask.BLOCK).transpose(1, 2).flatten(2)
        partial, full = attention_mask.blocks(batch, tokens, window)
        assert not (tiles.any(-1) & ~partial & ~full).any(), "a visible pair outside the blocks"
        assert not (full & ~tiles.all(-1)).any(), "a full block with a hidden pair"
        assert (partial | full).sum() <= 1.5 * tiles.any(-1).sum() + 4, "the mask is not sparse"


def _flex(batch, window, compiled, qkv):
    flex = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention
    mask = attention_mask.block_mask(batch, len(batch["tokens"]), window, torch.device("cpu"))
    if compiled:
        plan = attention.plan(batch, windows=(window,))._replace(patterns=(attention.Pattern(window, "flex", (), mask),))
        return attention.attention(*qkv, plan)
    out = flex(*(x.transpose(0, 1)[None] for x in qkv), block_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("window", [None, 70])
def test_flex_forward_equals_the_rule(window, compiled):
    batch = _batch([(200, [(100, 50), (200, 60), (0, 3)]), (300, []), (1, [(1, 5)])])
    gen = torch.Generator().manual_seed(0)
    qkv = [torch.randn(len(batch["tokens"]), heads, 16, generator=gen) for heads in (H, K, K)]
    exact = attention.attention_ref(*(x.double() for x in qkv), batch, window=window)
    torch.testing.assert_close(_flex(batch, window, compiled, qkv).double(), exact, rtol=0, atol=2e-6)


def test_branches_go_in_groups_of_whole_ones(monkeypatch):
    monkeypatch.setattr(attention_torch, "GROUP", 4)
    plan, qkv = attention.plan(TREES), _qkv(len(TREES["tokens"]))
    documents = plan.patterns[0].documents
    assert [d.groups for d in documents] == [(5,), (), (4, 3), (), (3,)]
    assert [d.seen for d in documents] == [(6,), (), (2, 9), (), (1,)], "no group reads trunk tokens that none of its branches sees"
    assert [tuple(m.shape) for m in documents[2].group_masks] == [(4, 6), (3, 12)]
    for mine, want in zip(_both(lambda *x: attention.attention(*x, plan), qkv), _both(lambda *x: _loop(*x, TREES, None), qkv), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-12, atol=1e-12)
