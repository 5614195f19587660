"""Attention over a packed stream of token trees, one rule for every backend.

A trunk token sees the trunk tokens of its document up to itself; a branch token sees the first `start` trunk tokens of its document and its
own branch up to itself; a window further asks positions[q] - positions[k] < window; nothing crosses documents.
The mask work is done once per micro-batch by `plan`; every layer then calls `attention` with it. Backends: "sdpa" (CPU: per document one
causal call for the trunk and a masked call for each group of its branches), "varlen" (CUDA, no branches), "flex" (CUDA, FlexAttention).
Shapes: T tokens, H heads, K kv heads (H a multiple of K), d head dim; q [T, H, d], k and v [T, K, d].
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

BACKENDS = ("sdpa", "varlen", "flex")
BLOCK = 128  # tokens of a side of a FlexAttention block
GROUP = 64  # tokens of branches that share a masked call on the CPU: a wider mask costs more than a call


class Document(NamedTuple):
    """One document on the CPU: its token counts, and the masks that a causal call cannot express."""

    trunk: int
    groups: tuple[int, ...]  # tokens of each group of branches; a group is one call
    seen: tuple[int, ...]  # trunk tokens that some token of the group sees: no call reads those behind them
    trunk_mask: torch.Tensor | None  # bool [trunk, trunk], only for a trunk longer than the window
    group_masks: tuple[torch.Tensor, ...]  # bool [group, seen + group] each


class Plan(NamedTuple):
    """The attention pattern of one micro-batch, shared by all layers."""

    backend: str
    documents: tuple[Document, ...]  # "sdpa" only
    tokens: int
    cu_docs: torch.Tensor  # int32 [D + 1], on the device of the attention
    longest: int  # tokens of the longest document
    window: int | None
    block_mask: object = None  # "flex" only: torch.nn.attention.flex_attention.BlockMask


def allowed(batch: dict[str, torch.Tensor], q: torch.Tensor, k: torch.Tensor, window: int | None) -> torch.Tensor:
    """Whether row q may see row k: broadcast boolean over two index tensors. The attention rule, written once."""
    document = _document_of(batch["cu_docs"])
    visible = (document[q] == document[k]) & (k <= q)
    if "branch" in batch:
        branch, start = batch["branch"], batch["start"]
        trunk_index = k - batch["cu_docs"][document[k]]
        visible = visible & ((branch[k] == branch[q]) | ((branch[k] == 0) & (trunk_index < start[q])))
    if window is not None:
        positions = _positions(batch)
        visible = visible & (positions[q] - positions[k] < window)
    return visible


def _document_of(cu_docs: torch.Tensor) -> torch.Tensor:
    lengths = cu_docs.diff().long()
    return torch.repeat_interleave(torch.arange(len(lengths), device=cu_docs.device), lengths)


def _positions(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    if "positions" in batch:
        return batch["positions"]
    cu_docs = batch["cu_docs"].long()
    return torch.arange(int(cu_docs[-1]), device=cu_docs.device) - cu_docs[_document_of(cu_docs)]


def attention_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: dict[str, torch.Tensor],
    *,
    window: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(q k^T * scale + mask) v with the dense [T, T] mask of the rule: the twin that tests compare against."""
    rows = torch.arange(q.shape[0], device=q.device)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~allowed(batch, rows[:, None], rows[None], window), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def _check_boundaries(cu_docs: torch.Tensor, tokens: int) -> list[int]:
    if cu_docs.ndim != 1 or cu_docs.numel() < 1 or cu_docs.is_floating_point():
        raise ValueError(f"cu_docs got {cu_docs.dtype} of shape {tuple(cu_docs.shape)}: expected integers [documents + 1]")
    offsets = cu_docs.tolist()
    if offsets[0] != 0 or offsets[-1] != tokens:
        raise ValueError(f"cu_docs runs from {offsets[0]} to {offsets[-1]}: expected from 0 to the {tokens} tokens of the batch")
    drop = next((i for i in range(len(offsets) - 1) if offsets[i + 1] < offsets[i]), None)
    if drop is not None:
        raise ValueError(f"cu_docs falls from {offsets[drop]} to {offsets[drop + 1]} at document {drop}: boundaries must not decrease")
    return offsets


def _check_branches(batch: dict[str, torch.Tensor], tokens: int) -> None:
    for name in ("branch", "start", "positions"):
        if name in batch and batch[name].shape != (tokens,):
            raise ValueError(f"{name} got shape {tuple(batch[name].shape)}: expected [{tokens}], one per token")
    if ("branch" in batch) != ("start" in batch):
        raise ValueError("a batch needs both branch and start, or neither: start says how many trunk tokens a branch token may see")
    if "branch" not in batch:
        return
    branch, start, cu_docs = batch["branch"].long(), batch["start"].long(), batch["cu_docs"].long()
    document = _document_of(cu_docs)
    step = branch.diff()
    inside = document.diff() == 0
    first = branch[cu_docs[:-1][cu_docs.diff() > 0]]
    if bool((inside & ((step < 0) | (step > 1))).any()) or bool((first != 0).any()):
        raise ValueError("branch must be 0 on the trunk of every document and grow by 1 from each of its branches to the next")
    trunk = torch.zeros(len(cu_docs) - 1, dtype=torch.long, device=branch.device).index_add(0, document, (branch == 0).long())
    wrong = (branch > 0) & ((start < 0) | (start > trunk[document]))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(f"start is {int(start[row])} at token {row}: expected 0..{int(trunk[document[row]])}, the trunk of its document")


def plan(
    batch: dict[str, torch.Tensor],
    *,
    window: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Plan:
    """The attention plan of a batch, made on the host once per micro-batch.

    Reads cu_docs [D + 1], tokens [T], and positions, branch and start [T] where present. `window` is the model's sliding window in tokens.
    `device` is where the attention will run (default: where the batch is) and `dtype` in what (default: bf16 on CUDA); they choose the
    backend unless it is named.
    Errors: ValueError for boundaries that do not cover the tokens in order, branches out of order, or a backend that cannot serve.
    """
    tokens = (batch["tokens"] if "tokens" in batch else batch["positions"]).shape[0]
    offsets = _check_boundaries(batch["cu_docs"], tokens)
    _check_branches(batch, tokens)
    if window is not None and window < 1:
        raise ValueError(f"window got {window}: expected at least 1 token, or None for full attention")
    device = torch.device(batch["cu_docs"].device if device is None else device)
    longest = max((hi - lo for lo, hi in zip(offsets, offsets[1:], strict=False)), default=0)
    # A window that reaches every document's start is none: backends without windows can then serve, and trunks stay causal calls.
    window = None if window is not None and tokens and int(_positions(batch).max()) < window else window
    backend = _choose(backend, device, dtype, "branch" in batch, window)
    cu_docs = batch["cu_docs"].to(device, torch.int32)
    if backend == "sdpa":
        return Plan(backend, tuple(_documents(batch, offsets, window)), tokens, cu_docs, longest, window)
    mask = _block_mask(batch, tokens, window, device) if backend == "flex" else None
    return Plan(backend, (), tokens, cu_docs, longest, window, mask)


def _choose(backend: str | None, device: torch.device, dtype: torch.dtype | None, branches: bool, window: int | None) -> str:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"attention backend got {backend!r}: expected one of {', '.join(BACKENDS)}")
    missing = _varlen_lacks(device, dtype, branches, window)
    if backend == "varlen" and missing:
        raise ValueError(f"attention backend varlen cannot honour this plan: {missing}. Use backend='flex', or 'sdpa' on the CPU")
    if backend == "flex" and device.type == "cpu":
        raise ValueError("attention backend flex has no backward on the CPU: use backend='sdpa'")
    if backend == "sdpa" and device.type != "cpu":
        raise ValueError(f"attention backend sdpa runs document by document and is meant for the CPU, not {device}: use varlen or flex")
    if backend is None:
        backend = "sdpa" if device.type == "cpu" else "flex" if missing else "varlen"
    return backend


def _varlen_lacks(device: torch.device, dtype: torch.dtype | None, branches: bool, window: int | None) -> str:
    """Why variable-length attention cannot serve, or an empty string."""
    if branches:
        return "it knows no branches"
    if device.type != "cuda":
        return f"it runs on CUDA only, not on {device.type}"
    if dtype not in (None, torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {dtype}"
    names = _varlen()[1]
    if not names:
        return "this torch has no torch.nn.attention.varlen"
    return "this torch's varlen_attn takes no window" if window is not None and "window_size" not in names else ""


@functools.cache
def _varlen() -> tuple[Callable[..., Any] | None, tuple[str, ...]]:
    """varlen_attn and its parameter names, which differ between torch 2.10 and 2.13; (None, ()) where it is missing."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None, ()
    return varlen_attn, tuple(inspect.signature(varlen_attn).parameters)


def _documents(batch: dict[str, torch.Tensor], offsets: list[int], window: int | None) -> Iterator[Document]:
    """Token counts and masks of each document, from the rule restricted to its rows."""
    for lo, hi in zip(offsets, offsets[1:], strict=False):
        document = {"cu_docs": torch.tensor([0, hi - lo])} | {
            key: batch[key][lo:hi] for key in ("positions", "branch", "start") if key in batch
        }
        sizes = document["branch"].bincount().tolist() if "branch" in document else [hi - lo]
        trunk, groups = (sizes or [0])[0], _groups(sizes[1:])
        rows, trunk_mask, reach, group_masks, end = torch.arange(hi - lo), None, [], [], trunk
        if window is not None and trunk > window:
            trunk_mask = allowed(document, rows[:trunk, None], rows[None, :trunk], window)
        for group in groups:
            queries = rows[end : end + group]
            reach.append(int(document["start"][queries].max()))
            group_masks.append(allowed(document, queries[:, None], torch.cat([rows[: reach[-1]], queries])[None], window))
            end += group
        yield Document(trunk, groups, tuple(reach), trunk_mask, tuple(group_masks))


def _groups(branches: list[int]) -> tuple[int, ...]:
    """Tokens of successive groups of whole branches: each group at least GROUP tokens, but for the last."""
    groups = [0] if branches else []
    for size in branches:
        if groups[-1] >= GROUP:
            groups.append(0)
        groups[-1] += size
    return tuple(groups)


class _Span(NamedTuple):
    """The smallest, or the largest, values among the tokens of each block of the stream; all [blocks]."""

    document: torch.Tensor
    branch: torch.Tensor
    position: torch.Tensor
    limit: torch.Tensor  # trunk tokens that a query may see: start, or all of them for a trunk token
    trunk_index: torch.Tensor  # over trunk tokens; branch tokens count as past the end


def _spans(batch: dict[str, torch.Tensor], tokens: int) -> tuple[_Span, _Span]:
    """Smallest and largest values of each block."""
    document = _document_of(batch["cu_docs"])
    end = torch.full_like(document, torch.iinfo(torch.int64).max)
    branch = batch["branch"].long() if "branch" in batch else torch.zeros_like(document)
    limit = torch.where(branch > 0, batch["start"].long(), end) if "branch" in batch else end
    trunk_index = torch.where(branch > 0, end, torch.arange(tokens) - batch["cu_docs"].long()[document])
    pad = -tokens % BLOCK

    def extent(x):
        # The short last block is filled up with its own last token, which moves neither of its extents.
        blocks = torch.cat([x, x[-1:].expand(pad)]).view(-1, BLOCK)
        return blocks.amin(1), blocks.amax(1)

    low, high = zip(*(extent(x) for x in (document, branch, _positions(batch).long(), limit, trunk_index)), strict=True)
    return _Span(*low), _Span(*high)


def _blocks(batch: dict[str, torch.Tensor], tokens: int, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [q, k] of the mask that may hold a visible pair, and those where every pair is visible: from extents, without [T, T]."""
    low, high = (_Span(*(x[None] for x in side)) for side in _spans(batch, tokens))
    q_low, q_high = (_Span(*(x.T for x in side)) for side in (low, high))  # [q, 1]; low and high serve the keys, [1, k]
    order = torch.arange(low.document.shape[1])
    before, single = order[:, None] > order, (q_low.document == q_high.document) & (low.document == high.document)
    same = single & (low.document == q_low.document)
    trunk = low.trunk_index < q_high.limit
    branch = (high.branch >= q_low.branch) & (low.branch <= q_high.branch)
    visible = (order[:, None] >= order) & (high.document >= q_low.document) & (~same | trunk | branch)
    alike = (low.branch == high.branch) & (q_low.branch == q_high.branch) & (low.branch == q_low.branch)
    every = before & same & ((high.trunk_index < q_low.limit) | alike)
    if window is not None:
        visible &= ~same | (q_low.position - high.position < window)
        every &= q_high.position - low.position < window
    if tokens % BLOCK:
        # The last block is short: a whole block would let its padding be read.
        every[-1] = False
    return visible & ~every, every


def _block_mask(batch: dict[str, torch.Tensor], tokens: int, window: int | None, device: torch.device) -> object:
    from torch.nn.attention.flex_attention import BlockMask

    # Block by block from extents: create_block_mask would fill [T, T] on the host, 460 MB and 2 s at 8192 tokens.
    moved = {key: batch[key].to(device) for key in ("cu_docs", "positions", "branch", "start") if key in batch}
    document, positions = _document_of(moved["cu_docs"]), _positions(moved)
    first = moved["cu_docs"].long()[document]
    branch, start = moved.get("branch"), moved.get("start")

    # The rule of `allowed` over tensors that are made once: the compiled kernel calls this for every pair of a partial block.
    def mask_mod(b, h, q, k):
        visible = (document[q] == document[k]) & (k <= q)
        if branch is not None and start is not None:
            visible = visible & ((branch[k] == branch[q]) | ((branch[k] == 0) & (k - first[k] < start[q])))
        return visible if window is None else visible & (positions[q] - positions[k] < window)

    lists = []
    for blocks in _blocks({key: batch[key].cpu() for key in moved}, tokens, window):
        index = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        lists += [x.to(device, torch.int32)[None, None] for x in (blocks.sum(-1), index)]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(tokens, tokens))


def _grouped(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[n, H, d] -> [K, H/K, n, d], a view: with kv heads as the batch, k and v broadcast over their group at stride 0, without a copy."""
    n, heads, dim = x.shape
    return x.reshape(n, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3)


def _sdpa(q, k, v, mask, scale) -> torch.Tensor:
    """[n, H, d] queries over [m, K, d] keys; causal when mask is None."""
    kv_heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    shape = (kv_heads, groups, k.shape[0], k.shape[2])
    # is_causal only without a mask, hence with as many keys as queries: with more keys it aligns top-left, which hides the trunk.
    values = F.scaled_dot_product_attention(
        _grouped(q, kv_heads),
        _grouped(k, kv_heads).expand(shape),
        _grouped(v, kv_heads).expand(shape),
        mask,
        0.0,
        mask is None,
        scale=scale,
    )
    return values.permute(2, 0, 1, 3).flatten(1, 2)


def _attention_cpu(q, k, v, plan: Plan, scale: float | None) -> torch.Tensor:
    lengths = [n for doc in plan.documents for n in (doc.trunk, *doc.groups)]
    # split and not slices: the backward of a slice writes a gradient of the whole stream, once per document
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    outputs = []
    for doc in plan.documents:
        tq, tk, tv = next(parts)
        if doc.trunk:
            outputs.append(_sdpa(tq, tk, tv, doc.trunk_mask, scale))
        for reach, mask in zip(doc.seen, doc.group_masks, strict=True):
            bq, bk, bv = next(parts)
            outputs.append(_sdpa(bq, torch.cat([tk[:reach], bk]), torch.cat([tv[:reach], bv]), mask, scale))
    return torch.cat(outputs) if outputs else q.clone()


def _attention_varlen(q, k, v, plan: Plan, scale: float | None) -> torch.Tensor:
    varlen_attn, names = _varlen()
    assert varlen_attn is not None
    options: dict[str, Any] = {"scale": scale} if scale is not None else {}
    if scale is not None and "scale" not in names:
        # This torch's varlen_attn scales by d^-0.5 itself: what is left of the scale goes into q.
        q, options = q * (scale * q.shape[-1] ** 0.5), {}
    if "window_size" in names:
        # Keys to the left of the query besides its own, and none to the right, which makes it causal.
        options["window_size"] = (-1 if plan.window is None else plan.window - 1, 0)
    else:
        options["is_causal"] = True
    if "num_splits" in names:
        options["num_splits"] = 1  # a document's result must not depend on what it is packed with
    if "enable_gqa" in names:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    elif q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return varlen_attn(q, k, v, plan.cu_docs, plan.cu_docs, plan.longest, plan.longest, **options)


@functools.cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # Without compilation flex_attention holds the scores of all pairs, [heads, T, T]. Compiled once, for all layers.
    return torch.compile(flex_attention)


def _attention_flex(q, k, v, plan: Plan, scale: float | None) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, T, d]
    values = _compiled_flex()(q, k, v, block_mask=plan.block_mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return values[0].transpose(0, 1)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, *, scale: float | None = None) -> torch.Tensor:
    """softmax(q k^T * scale) v under the plan's mask; q [T, H, d], k and v [T, K, d] -> [T, H, d]. scale defaults to d^-0.5.

    Errors: ValueError when the heads do not divide, or the plan was made for another device or dtype.
    """
    if q.shape[1] % k.shape[1] or k.shape != v.shape or q.shape[0] != k.shape[0]:
        raise ValueError(
            f"attention got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected [T, H, d], [T, K, d] twice, K | H"
        )
    if plan.tokens != q.shape[0]:
        raise ValueError(f"the plan was made for {plan.tokens} tokens and q has {q.shape[0]}: make one plan per micro-batch")
    if plan.cu_docs.device != q.device:
        raise ValueError(f"the plan was made for {plan.cu_docs.device} and q is on {q.device}: call plan(batch, device=q.device)")
    if plan.backend == "sdpa":
        return _attention_cpu(q, k, v, plan, scale)
    if plan.backend == "varlen" and q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"the plan is for bfloat16 or float16 (varlen attention) and q is {q.dtype}: call plan(batch, dtype=q.dtype)")
    return (_attention_varlen if plan.backend == "varlen" else _attention_flex)(q, k, v, plan, scale)
