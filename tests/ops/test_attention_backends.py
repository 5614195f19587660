"""The backends of CUDA on a CPU: the choice of one, the call of varlen attention in each torch, FlexAttention's masks and scores."""

import random

import pytest
import torch
from torch.nn.attention import flex_attention

from treetune.ops import attention, attention_mask, attention_torch
from treetune.ops.context_parallel import Part
from treetune.ops.tensor_parallel import Split

H, K, D = 6, 2, 16
BOTH = {"softcap": 1.5, "sinks": torch.linspace(-2, 3, H)}


def _batch(documents):
    """documents: [(trunk tokens, [(start, branch tokens), ...]), ...] -> the keys of a batch that attention reads."""
    parts = []
    for document, (trunk, grown) in enumerate(documents):
        parts += [(document, 0, 0, position) for position in range(trunk)]
        for branch, (start, tokens) in enumerate(grown, 1):
            parts += [(document, branch, start, position) for position in range(start, start + tokens)]
    document, branch, start, positions = torch.tensor(parts).T
    cu_docs = torch.bincount(document, minlength=len(documents)).cumsum(0)
    keys = {"tokens": positions, "positions": positions, "cu_docs": torch.nn.functional.pad(cu_docs, (1, 0)).int()}
    return keys | ({"branch": branch.int(), "start": start.int()} if branch.any() else {})


LINEAR = _batch([(6, []), (10, []), (1, [])])
TREES = _batch([(200, [(100, 50), (200, 60), (0, 3)]), (300, []), (1, [(1, 5)])])


def _qkv(tokens, width=D, dtype=torch.float64):
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, heads, size, generator=gen, dtype=dtype) for heads, size in ((H, D), (K, D), (K, width))]


def _varlen_2_13(
    q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False, num_splits=None
):
    """The documented meaning of torch 2.13's varlen_attn."""
    assert num_splits == 1 and enable_gqa and window_size[1] == 0
    return _lower_right(q, k, v, cu_q, cu_k, max_q, max_k, None if window_size[0] < 0 else window_size[0] + 1, scale)


def _varlen_2_10(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, return_aux=None):
    """The documented meaning of torch 2.10's: one head count, no scale, no window."""
    assert is_causal and q.shape[1:] == k.shape[1:]
    return _lower_right(q, k, v, cu_q, cu_k, max_q, max_k, None, None)


def _lower_right(q, k, v, cu_q, cu_k, max_q, max_k, window, scale):
    """FlashAttention's mask, document by document: the last query sees up to the last key (flash_attn 2.1 and later)."""
    assert max_q == int(cu_q.diff().max()) and max_k == int(cu_k.diff().max()) and (cu_q.diff() <= cu_k.diff()).all()
    assert q.shape[0] == cu_q[-1] and k.shape[0] == v.shape[0] == cu_k[-1] and cu_q.dtype == cu_k.dtype == torch.int32
    out = []
    for own, keys in zip(cu_q.unfold(0, 2, 1), cu_k.unfold(0, 2, 1), strict=True):
        queries, (kd, vd) = q[own[0] : own[1]], (x[keys[0] : keys[1]] for x in (k, v))
        # In the whole document the queries are the last ones.
        before = torch.cat([queries.new_zeros(len(kd) - len(queries), *queries.shape[1:]), queries])
        batch = {"tokens": torch.zeros(len(kd)), "cu_docs": torch.tensor([0, len(kd)])}
        out.append(attention.attention_ref(before, kd, vd, batch, window=window, scale=scale)[len(kd) - len(queries) :])
    return torch.cat(out)


CUDA = attention._Need(torch.device("cuda"), None, branches=False, plain=True)


@pytest.mark.parametrize("width", [D, 9, 23])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("varlen", [_varlen_2_13, _varlen_2_10])
def test_varlen_call_of_each_torch(monkeypatch, varlen, window, width):
    names = tuple(varlen.__code__.co_varnames[: varlen.__code__.co_argcount + varlen.__code__.co_kwonlyargcount])
    monkeypatch.setattr(attention, "_varlen", lambda: (varlen, names))
    if varlen is _varlen_2_10 and window:
        assert "no window" in attention._varlen_lacks(CUDA, window)
        assert attention._choose(None, CUDA, window) == "flex"
        return
    assert attention._choose(None, CUDA, window) == "varlen"
    plan, qkv = attention.plan(LINEAR, windows=(window,)), _qkv(17, width)
    out = attention._attention_varlen(*qkv, plan, attention_torch.Weighting(0.3, None, None))
    torch.testing.assert_close(out, attention.attention_ref(*qkv, LINEAR, window=window, scale=0.3))


def _parts(tokens, ranks):
    """Parts of a stream, and which of their rows count."""
    parts = [Part(Split(None, rank, ranks), tokens) for rank in range(ranks)]
    return [(part, torch.cat([torch.arange(part.chunk) < end - first for first, end in part.spans])) for part in parts]


@pytest.mark.parametrize("ranks", [1, 2, 3, 25])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("varlen", [_varlen_2_13, _varlen_2_10])
def test_varlen_calls_of_parts(monkeypatch, varlen, window, ranks):
    """Queries of two chunks over the keys of their documents: values and gradients are those of the whole stream."""
    names = tuple(varlen.__code__.co_varnames[: varlen.__code__.co_argcount + varlen.__code__.co_kwonlyargcount])
    monkeypatch.setattr(attention, "_varlen", lambda: (varlen, names))
    monkeypatch.setattr(attention, "_check_half", lambda q: None)
    if varlen is _varlen_2_10 and window:
        return
    qkv = [x.requires_grad_() for x in _qkv(17)]
    whole, total = attention.attention_ref(*qkv, LINEAR, window=window, scale=0.3), torch.zeros(())
    for part, counted in _parts(17, ranks):
        plan = attention.plan(LINEAR, windows=(window,), split=part.split)
        calls = attention._pattern_of_part(part, LINEAR, LINEAR["cu_docs"].tolist(), torch.device("cpu"), window, "varlen")
        plan, rows = plan._replace(patterns=(calls,)), part.places()
        out = attention.attention_of_part(qkv[0][rows], *qkv[1:], plan, attention_torch.Weighting(0.3, None, None))
        torch.testing.assert_close(out[counted], whole[rows[counted]])
        used = torch.autograd.grad(out.sum(), qkv, retain_graph=True, allow_unused=True)
        assert None not in used, "a rank whose chunks are empty takes part in the messages of the backward pass, too"
        total = total + out[counted].square().sum()
    wanted = torch.autograd.grad(whole.square().sum(), qkv)
    torch.testing.assert_close(torch.autograd.grad(total, qkv), wanted)


def test_what_varlen_lacks_goes_to_flex():
    for need in (CUDA._replace(plain=False), CUDA._replace(branches=True), CUDA._replace(dtype=torch.float32)):
        assert attention._choose(None, need, None) == "flex" and attention._choose("flex", need, 8) == "flex"
        assert attention._choose(None, need._replace(device=torch.device("cpu")), None) == "sdpa"
        with pytest.raises(ValueError, match="varlen cannot honour this plan"):
            attention._choose("varlen", need, None)


@pytest.mark.parametrize(
    ("width", "reason"), [(12, "multiples of 8, not 12"), (320, "at most 256 features"), (256, ""), (80, ""), (None, "")]
)
def test_heads_that_flash_attention_does_not_take_go_to_flex(monkeypatch, width, reason):
    monkeypatch.setattr(attention, "_varlen", lambda: (_varlen_2_13, ("window_size",)))
    assert (reason in attention._varlen_lacks(CUDA._replace(width=width), None)) and attention._choose(
        None, CUDA._replace(width=width), None
    ) == ("flex" if reason else "varlen")


@pytest.mark.parametrize(("capability", "backend"), [((7, 5), "flex"), ((8, 0), "varlen"), ((12, 0), "varlen")])
def test_old_gpus_go_to_flex(monkeypatch, capability, backend):
    monkeypatch.setattr(attention, "_varlen", lambda: (_varlen_2_13, ("window_size",)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attention._choose(None, CUDA, None) == backend


@pytest.mark.slow
def test_flex_never_goes_on_uncompiled(monkeypatch):
    """Past its limit of graphs it raises; without the whole as one graph torch would hold all scores in memory and say nothing."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **options: compile_(fn, backend="eager", **options))
    attention._compiled_flex.cache_clear()
    before = torch._dynamo.config.recompile_limit
    try:
        flex = attention._compiled_flex()
        assert torch._dynamo.config.recompile_limit >= attention.GRAPHS
        with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad(), pytest.raises(Exception, match="fullgraph=True"):
            for width in (16, 24, 32, 40):
                flex(*(torch.zeros(1, 2, 4, width) for _ in range(3)))
    finally:
        torch._dynamo.config.recompile_limit = before
        attention._compiled_flex.cache_clear()


def _random_batch(seed):
    rng = random.Random(seed)
    sizes = [rng.choice((1, 60, 128, 300)) for _ in range(rng.randint(1, 5))]
    grown = [[(rng.randint(0, trunk), rng.choice((1, 60, 128))) for _ in range(rng.choice([0, 0, 1, 4]))] for trunk in sizes]
    return _batch(list(zip(sizes, grown, strict=True)))


@pytest.mark.parametrize("seed", range(6))
def test_block_mask_covers_the_rule(seed):
    batch = _random_batch(seed)
    if seed % 3 == 0:
        batch = _batch([(5, []), (700, []), (300, [])])
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


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_block_mask_of_a_part_covers_the_rule(seed, ranks):
    batch = _random_batch(seed) if seed % 3 else _batch([(5, []), (700, []), (300, [])])
    tokens, block = len(batch["tokens"]), attention_mask.BLOCK
    rows, wide = torch.arange(tokens), -(-tokens // block)
    for part, _ in _parts(tokens, ranks):
        own, high = part.places(), -(-part.rows // block)
        for window in (None, 40, 200):
            dense = torch.zeros(high * block, wide * block, dtype=torch.bool)
            dense[: len(own), :tokens] = attention_mask.allowed(batch, own[:, None], rows[None], window)
            mask = attention_mask.block_mask(batch, tokens, window, torch.device("cpu"), part)
            assert torch.equal(mask.mask_mod(0, 0, torch.arange(len(own))[:, None], rows[None]), dense[: len(own), :tokens])
            assert mask.seq_lengths == (len(own), tokens)
            tiles = dense.view(high, block, wide, block).transpose(1, 2).flatten(2)
            partial, full = attention_mask.blocks(batch, tokens, window, own)
            assert not (tiles.any(-1) & ~partial & ~full).any(), "a visible pair outside the blocks"
            assert not (full & ~tiles.all(-1)).any(), "a full block with a hidden pair"
            # A block of queries in which a chunk ends stands for all between: its documents reach from one chunk to the other.
            assert (partial | full).sum() <= 1.5 * tiles.any(-1).sum() + 4 + wide, "the mask is not sparse"


def _as_flex(batch, window, part=None):
    """The plan of a batch for FlexAttention, on the CPU."""
    plan = attention.plan(batch, windows=(window,), plain=False, split=part and part.split)
    mask = attention_mask.block_mask(batch, plan.tokens, window, torch.device("cpu"), part)
    return plan._replace(patterns=(attention.Pattern(window, "flex", (), mask),))


def _written_flex(q, k, v, *, block_mask, scale, enable_gqa, score_mod=None, return_aux=None):
    """The documented meaning of flex_attention, with a backward pass, which it lacks on a CPU."""
    assert enable_gqa == (q.shape[1] != k.shape[1])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    head, row, column = torch.arange(q.shape[1])[:, None, None], torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    scores = q @ k.mT * scale
    scores = scores if score_mod is None else score_mod(scores, 0, head, row, column)
    scores = scores.masked_fill(~block_mask.mask_mod(0, 0, row, column), -torch.inf)
    out = scores.softmax(-1) @ v
    return out if return_aux is None else (out, flex_attention.AuxOutput(lse=scores.logsumexp(-1), max_scores=None))


@pytest.mark.parametrize("names", [(), ("softcap",), ("sinks",), ("softcap", "sinks")])
@pytest.mark.parametrize("window", [None, 3])
def test_flex_gradients_equal_those_of_the_rule(monkeypatch, window, names):
    monkeypatch.setattr(attention, "_compiled_flex", lambda: _written_flex)
    batch = _batch([(6, [(6, 3), (2, 2)]), (9, []), (1, [(1, 4)])])
    leaves = [x.requires_grad_() for x in (*_qkv(len(batch["tokens"]), 9), BOTH["sinks"].double())]
    options = {"softcap": 1.5 if "softcap" in names else None, "sinks": leaves[3] if "sinks" in names else None}
    mine = attention.attention(*leaves[:3], _as_flex(batch, window), **options)
    exact = attention.attention_ref(*leaves[:3], batch, window=window, **options)
    torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-12)
    used = leaves if "sinks" in names else leaves[:3]
    grads = [torch.autograd.grad((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum(), used) for x in (mine, exact)]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("names", [(), ("softcap", "sinks")])
@pytest.mark.parametrize("window", [None, 3])
def test_flex_gradients_of_parts_equal_those_of_the_rule(monkeypatch, window, names):
    monkeypatch.setattr(attention, "_compiled_flex", lambda: _written_flex)
    batch = _batch([(6, [(6, 3), (2, 2)]), (9, []), (1, [(1, 4)])])
    leaves = [x.requires_grad_() for x in (*_qkv(len(batch["tokens"]), 9), BOTH["sinks"].double())]
    weighting = attention_torch.Weighting(0.3, 1.5 if names else None, leaves[3] if names else None)
    exact = attention.attention_ref(*leaves[:3], batch, window=window, **weighting._asdict())
    weights, total = torch.linspace(-1, 1, exact.numel()).view_as(exact), torch.zeros(())
    for part, counted in _parts(len(batch["tokens"]), 3):
        rows = part.places()
        mine = attention.attention_of_part(leaves[0][rows], *leaves[1:3], _as_flex(batch, window, part), weighting)
        assert mine.isfinite().all()
        torch.testing.assert_close(mine[counted], exact[rows[counted]], rtol=1e-11, atol=1e-12)
        total = total + (mine * weights[rows])[counted].sum()
    used = leaves if names else leaves[:3]
    grads = [torch.autograd.grad(x, used) for x in (total, (exact * weights).sum())]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)


@pytest.mark.more
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("options", [{}, BOTH])
@pytest.mark.parametrize("window", [None, 70])
def test_flex_forward_of_parts_equals_the_rule(monkeypatch, window, options):
    """By torch's own flex_attention, with block masks of fewer queries than keys."""
    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention.flex_attention)
    _check_flex_parts(window, options)


def _check_flex_parts(window, options):
    q, k, v = _qkv(len(TREES["tokens"]), D, torch.float32)
    exact = attention.attention_ref(*(x.double() for x in (q, k, v)), TREES, window=window, **options)
    weighting = attention_torch.Weighting(D**-0.5, options.get("softcap"), options.get("sinks"))
    for part, counted in _parts(len(q), 3):
        rows = part.places()
        out = attention.attention_of_part(q[rows], k, v, _as_flex(TREES, window, part), weighting)
        torch.testing.assert_close(out[counted].double(), exact[rows[counted]], rtol=0, atol=2e-6)


def _counted_graphs(monkeypatch) -> list[int]:
    """How many graphs each call of the compiled kernel makes, from now on."""
    flex, graphs = attention._compiled_flex(), []

    def counted(*args, **kwargs):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        out = flex(*args, **kwargs)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
        return out

    monkeypatch.setattr(attention, "_compiled_flex", lambda: counted)
    return graphs


@pytest.mark.slow
def test_flex_of_parts_is_compiled_once(monkeypatch):
    """The compiled kernel reads the blocks of the mask, which the written-out one does not; one graph serves all ranks and windows."""
    graphs = _counted_graphs(monkeypatch)
    for window in (None, 70, 40):
        _check_flex_parts(window, {})
    assert sum(graphs) == 1


@pytest.mark.sampled(3)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("options", "width"), [({}, D), ({"softcap": 1.5}, D), (BOTH, 8)])
@pytest.mark.parametrize("window", [None, 70])
def test_flex_forward_equals_the_rule(monkeypatch, window, options, width):
    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention.flex_attention)
    _check_flex(window, options, width)


@pytest.mark.slow
def test_windows_and_soft_caps_are_compiled_once(monkeypatch):
    """Compiled anew for each value, the ninth would fall back to all scores in memory. (Sinks need what the CPU cannot compile.)"""
    graphs = _counted_graphs(monkeypatch)
    for window in (None, 70, 40):
        for options in ({}, {"softcap": 1.5}, {"softcap": 50.0}):
            _check_flex(window, options, D)
    assert sum(graphs) == 2, "one with a soft-cap and one without"


def _check_flex(window, options, width):
    qkv = _qkv(len(TREES["tokens"]), width, torch.float32)
    exact = attention.attention_ref(*(x.double() for x in qkv), TREES, window=window, **options)
    out = attention.attention(*qkv, _as_flex(TREES, window), **options)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-6)
