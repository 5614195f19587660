"""Attention in plain torch, document by document: one causal call for a trunk, a masked call for each group of its branches.

n queries over m keys of one document; H heads, K kv heads, G = H / K, d key width, e value width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes

from treetune.ops import attention_mask
from treetune.ops.context_parallel import Part

GROUP = 64  # tokens of branches that share a masked call: a wider mask costs more than a call


class Document(NamedTuple):
    """One document on the CPU: its token counts, and the masks that a causal call cannot express."""

    trunk: int
    groups: tuple[int, ...]  # tokens of each group of branches; a group is one call
    seen: tuple[int, ...]  # trunk tokens that some token of the group sees: no call reads those behind them
    trunk_mask: torch.Tensor | None  # bool [trunk, trunk], only for a trunk longer than the window
    group_masks: tuple[torch.Tensor, ...]  # bool [group, seen + group] each


def documents_of(batch: dict[str, torch.Tensor], offsets: list[int], window: int | None) -> Iterator[Document]:
    """Token counts and masks of each document, from the rule restricted to its rows."""
    for lo, hi in zip(offsets, offsets[1:], strict=False):
        document = {"cu_docs": torch.tensor([0, hi - lo])} | {
            key: batch[key][lo:hi] for key in ("positions", "branch", "start") if key in batch
        }
        sizes = document["branch"].bincount().tolist() if "branch" in document else [hi - lo]
        trunk, groups = (sizes or [0])[0], _groups(sizes[1:])
        rows, trunk_mask, reach, group_masks, end = torch.arange(hi - lo), None, [], [], trunk
        if window is not None and trunk > window:
            trunk_mask = attention_mask.allowed(document, rows[:trunk, None], rows[None, :trunk], window)
        for group in groups:
            queries = rows[end : end + group]
            reach.append(int(document["start"][queries].max()))
            group_masks.append(attention_mask.allowed(document, queries[:, None], torch.cat([rows[: reach[-1]], queries])[None], window))
            end += group
        yield Document(trunk, groups, tuple(reach), trunk_mask, tuple(group_masks))


class Piece(NamedTuple):
    """Queries that stand together, the keys [first, end) of the stream that some of them see, and their mask [n, m]; causal without one."""

    queries: int
    first: int
    end: int
    mask: torch.Tensor | None


def pieces_of(batch: dict[str, torch.Tensor], offsets: list[int], window: int | None, part: Part) -> Iterator[Piece]:
    """The tokens of each chunk of a part of a stream, document by document; behind them those that repeat the last token of the stream."""
    for begin, end in part.spans:
        for lo, hi in zip(offsets, offsets[1:], strict=False):
            first, last = max(lo, begin), min(hi, end)
            if first >= last:
                continue
            rows, keys = torch.arange(first, last), torch.arange(lo, last)
            causal = first == lo and window is None and "branch" not in batch
            yield Piece(last - first, lo, last, None if causal else attention_mask.allowed(batch, rows[:, None], keys[None], window))
        if missing := part.chunk - (end - begin):
            keys = torch.arange(part.tokens)
            yield Piece(missing, 0, part.tokens, attention_mask.allowed(batch, keys[-1:].expand(missing)[:, None], keys[None], window))


def attention_of(q, k, v, pieces: Sequence[Piece], weighting: Weighting) -> torch.Tensor:
    """Attention of the queries [t, H, d] of these pieces over the keys and values [T, K, d] of a whole stream -> [t, H, e]."""
    call = _sdpa if weighting.softcap is None and weighting.sinks is None else _written_out
    if weighting.sinks is not None:
        weighting = weighting._replace(sinks=weighting.sinks.to(torch.promote_types(q.dtype, torch.float32)))
    parts = zip(q.split([piece.queries for piece in pieces]), pieces, strict=True)
    return torch.cat([call(own, k[piece.first : piece.end], v[piece.first : piece.end], piece.mask, weighting) for own, piece in parts])


def pairs_of(pieces: Sequence[Piece]) -> int:
    """Pairs of a query of these pieces and a token that it sees."""
    causal = sum(piece.queries * (piece.queries + 1) // 2 for piece in pieces if piece.mask is None)
    with _disable_current_modes():
        return causal + sum(int(piece.mask.sum()) for piece in pieces if piece.mask is not None)


def pairs(documents: Sequence[Document]) -> int:
    """Pairs of a token and one that it sees. Masks have numbers also where the tensors that are counted have none."""
    masked = [mask for doc in documents for mask in (doc.trunk_mask, *doc.group_masks) if mask is not None]
    causal = sum(doc.trunk * (doc.trunk + 1) // 2 for doc in documents if doc.trunk_mask is None)
    with _disable_current_modes():
        return causal + sum(int(mask.sum()) for mask in masked)


def _groups(branches: list[int]) -> tuple[int, ...]:
    """Tokens of successive groups of whole branches: each group at least GROUP tokens, but for the last."""
    groups = [0] if branches else []
    for size in branches:
        if groups[-1] >= GROUP:
            groups.append(0)
        groups[-1] += size
    return tuple(groups)


def _grouped(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[n, H, d] -> [K, H/K, n, d], a view: with kv heads as the batch, k and v broadcast over their group at stride 0, without a copy."""
    n, heads, dim = x.shape
    return x.reshape(n, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3)


def probabilities(scores: torch.Tensor, visible: torch.Tensor | None, softcap: float | None, sinks: torch.Tensor | None) -> torch.Tensor:
    """softmax over the last axis of c tanh(scores / c) where visible, in float32 at least; sinks [..., 1] join the denominator alone.

    Sources: the soft-cap c of Gemma 2, arXiv 2408.00118; the sinks of gpt-oss, arXiv 2508.10925.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is None:
        return scores.softmax(-1)
    return torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], -1).softmax(-1)[..., :-1]


class Weighting(NamedTuple):
    """How a layer weighs the tokens that it sees: softmax(cap(q k^T * scale)), with a further logit [H] in the denominator."""

    scale: float
    softcap: float | None
    sinks: torch.Tensor | None


def _written_out(q, k, v, mask, weighting: Weighting) -> torch.Tensor:
    """[n, H, d] queries over keys [m, K, d] and values [m, K, e] with all scores [H, n, m] in memory; causal when mask is None."""
    kv_heads, wide = k.shape[1], torch.promote_types(q.dtype, torch.float32)
    if mask is None:
        mask = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool, device=q.device).tril()
    scores = _grouped(q, kv_heads).to(wide) @ k.to(wide).permute(1, 2, 0)[:, None] * weighting.scale  # [K, G, n, m]
    sinks = None if weighting.sinks is None else weighting.sinks.view(kv_heads, -1, 1, 1)
    p = probabilities(scores, mask, weighting.softcap, sinks).to(v.dtype)
    return (p @ v.transpose(0, 1)[:, None]).permute(2, 0, 1, 3).flatten(1, 2)


def _sdpa(q, k, v, mask, weighting: Weighting) -> torch.Tensor:
    """[n, H, d] queries over keys [m, K, d] and values [m, K, e]; causal when mask is None."""
    kv_heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    shape = (kv_heads, groups, k.shape[0], -1)
    # is_causal only without a mask, hence with as many keys as queries: with more keys it aligns top-left, which hides the trunk.
    values = F.scaled_dot_product_attention(
        _grouped(q, kv_heads),
        _grouped(k, kv_heads).expand(shape),
        _grouped(v, kv_heads).expand(shape),
        mask,
        0.0,
        mask is None,
        scale=weighting.scale,
    )
    return values.permute(2, 0, 1, 3).flatten(1, 2)


def attention(q, k, v, documents: Sequence[Document], weighting: Weighting) -> torch.Tensor:
    """Attention over a stream of these documents: q [T, H, d], k [T, K, d], v [T, K, e] -> [T, H, e]."""
    call = _sdpa if weighting.softcap is None and weighting.sinks is None else _written_out
    if weighting.sinks is not None:
        # Once and not per call, whose gradients would be rounded before they are summed.
        weighting = weighting._replace(sinks=weighting.sinks.to(torch.promote_types(q.dtype, torch.float32)))
    lengths = [n for doc in documents for n in (doc.trunk, *doc.groups)]
    # split and not slices: the backward of a slice writes a gradient of the whole stream, once per document
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    outputs = []
    for doc in documents:
        tq, tk, tv = next(parts)
        if doc.trunk:
            outputs.append(call(tq, tk, tv, doc.trunk_mask, weighting))
        for reach, mask in zip(doc.seen, doc.group_masks, strict=True):
            bq, bk, bv = next(parts)
            outputs.append(call(bq, torch.cat([tk[:reach], bk]), torch.cat([tv[:reach], bv]), mask, weighting))
    return torch.cat(outputs) if outputs else call(q, k, v, None, weighting)
