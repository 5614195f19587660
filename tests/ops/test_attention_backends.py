"""The backends of CUDA on a CPU: the choice of one, the call of varlen attention in each torch, FlexAttention's masks and scores."""

import random

import pytest
import torch
from torch.nn.attention import flex_attention

from treetune.ops import attention, attention_mask, attention_torch

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
    assert max_q == max_k == int(cu_q.diff().max()) and num_splits == 1 and enable_gqa and window_size[1] == 0
    batch = {"tokens": q[:, 0, 0], "cu_docs": cu_q}
    return attention.attention_ref(q, k, v, batch, window=None if window_size[0] < 0 else window_size[0] + 1, scale=scale)


def _varlen_2_10(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, return_aux=None):
    """The documented meaning of torch 2.10's: one head count, no scale, no window."""
    assert is_causal and q.shape == k.shape
    return attention.attention_ref(q, k, v, {"tokens": q[:, 0, 0], "cu_docs": cu_q})


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


def _as_flex(batch, window):
    """The plan of a batch for FlexAttention, on the CPU."""
    plan = attention.plan(batch, windows=(window,), plain=False)
    mask = attention_mask.block_mask(batch, plan.tokens, window, torch.device("cpu"))
    return plan._replace(patterns=(attention.Pattern(window, "flex", (), mask),))


def _written_flex(q, k, v, *, block_mask, scale, enable_gqa, score_mod=None, return_aux=None):
    """The documented meaning of flex_attention, with a backward pass, which it lacks on a CPU."""
    assert enable_gqa == (q.shape[1] != k.shape[1])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    head, row, column = torch.arange(q.shape[1])[:, None, None], torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
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
    flex, count = attention._compiled_flex(), 0

    def counted(*args, **kwargs):
        nonlocal count
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        out = flex(*args, **kwargs)
        count += torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
        return out

    monkeypatch.setattr(attention, "_compiled_flex", lambda: counted)
    for window in (None, 70, 40):
        for options in ({}, {"softcap": 1.5}, {"softcap": 50.0}):
            _check_flex(window, options, D)
    assert count == 2, "one with a soft-cap and one without"


def _check_flex(window, options, width):
    qkv = _qkv(len(TREES["tokens"]), width, torch.float32)
    exact = attention.attention_ref(*(x.double() for x in qkv), TREES, window=window, **options)
    out = attention.attention(*qkv, _as_flex(TREES, window), **options)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-6)
