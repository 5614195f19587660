"""The attention of a decoder's layers: over a packed stream by its plan, or from the sampler's cache one token at a time.

T tokens, H heads, K key/value heads, d key width, e value width, R cache rows, S slots.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from treetune.ops import attention, attention_torch, context_parallel
from treetune.ops.attention_torch import Weighting


class Sizes(Protocol):
    """What a config says of its attention."""

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct windows of the layers, in tokens."""
        ...

    @property
    def plain_attention(self) -> bool:
        """Whether no layer has a soft-cap or sinks."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """In what it computes."""
        ...

    @property
    def max_positions(self) -> int:
        """Positions of a document."""
        ...

    @property
    def shared_positions(self) -> int:
        """Positions up to which branches may share what is before them."""
        ...

    @property
    def caches(self) -> tuple[tuple[int, int, int], ...]:
        """What is kept of a token for each layer: key/value heads, their key width and value width."""
        ...

    @property
    def keeps_ids(self) -> bool:
        """Whether the cache holds the ids of tokens in place of keys and values."""
        ...


class Rule(NamedTuple):
    """The attention of one layer: its window in tokens (None: all), and how it weighs what it sees."""

    window: int | None
    weighting: Weighting


class Cache(NamedTuple):
    """Keys [R, S, K, d] and values [R, S, K, e] per layer, written in place at (rows, slots), both [T]; `span` slots are in use.

    `attend`, where given, is the attention over it: queries [T, H, d], the number of the layer and its rule -> [T, H, e].
    A model whose layers are not all attention keeps the ids of its tokens [R, S] in place of keys, and reads them again for each new one;
    `before` has the ids that stand before the first slot of each row.
    """

    k: list[Tensor]
    v: list[Tensor]
    rows: Tensor
    slots: Tensor
    span: int
    attend: Callable[[Tensor, int, Rule], Tensor] | None = None
    before: Sequence[Tensor] = ()


def buffers(cfg: Sizes, rows: int, slots: int, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """The keys and the values of a cache before anything is written; or ids, for a model that keeps those."""
    if cfg.keeps_ids:
        return [torch.zeros(rows, slots, dtype=torch.int64, device=device)], []
    # Zeros, because a slot that is masked but not a number would still spoil the weighted sum.
    k = [torch.zeros(rows, slots, heads, width, dtype=cfg.dtype, device=device) for heads, width, _ in cfg.caches]
    return k, [torch.zeros(rows, slots, heads, width, dtype=cfg.dtype, device=device) for heads, _, width in cfg.caches]


def plan(batch: dict, cfg: Sizes, *, device: torch.device | str | None = None) -> attention.Plan:
    """The plan of a batch for all layers of a model. device: where the attention will run; default: where the batch is.

    Raises ValueError for documents whose branches are too long to share a trunk.
    """
    if "branch" in batch and cfg.shared_positions < cfg.max_positions and int(batch["positions"].max()) >= cfg.shared_positions:
        raise ValueError(
            f"a document with branches has {int(batch['positions'].max()) + 1} positions; answers that share a prompt have at most "
            f"{cfg.shared_positions} in this model, whose rotary positions change with the length"
        )
    width = max((max(sides[1:]) for sides in cfg.caches), default=None)
    shared: Any = {"split": getattr(cfg, "context", None)}
    return attention.plan(batch, windows=cfg.windows, plain=cfg.plain_attention, device=device, dtype=cfg.dtype, width=width, **shared)


def mix(q: Tensor, k: Tensor, v: Tensor, layer: int, rule: Rule, *, plan: attention.Plan | None, cache: Cache | None) -> Tensor:
    """q [T, H, d], k [T, K, d], v [T, K, e] of a layer -> [T, H, e]; with a cache k and v are written to it, without a plan it is read.

    Where ranks share the stream these are of the tokens of this one.
    """
    if cache is not None:
        cache.k[layer][cache.rows, cache.slots] = k
        cache.v[layer][cache.rows, cache.slots] = v
    if plan is not None and plan.part is not None and cache is None:
        k, v = context_parallel.joined(plan.part, k, v)
        return attention.attention_of_part(q, k, v, plan.of(rule.window), rule.weighting)
    if plan is not None:
        return attention.attention(q, k, v, plan.of(rule.window), **rule.weighting._asdict())
    assert cache is not None, "a stream without a plan is read from a cache"
    return cache.attend(q, layer, rule) if cache.attend else _cached(q, layer, cache, rule)


def _cached(q: Tensor, layer: int, cache: Cache, rule: Rule) -> Tensor:
    """One query per cache row: q [R, H, d] over the first `span` slots of its row; the heads of a group are its query rows."""
    k, v = (side[layer][:, : cache.span].transpose(1, 2) for side in (cache.k, cache.v))  # [R, K, span, width]
    slot = torch.arange(cache.span, device=q.device)
    seen = slot <= cache.slots[:, None]  # [R, span]
    if rule.window is not None:
        seen &= slot > cache.slots[:, None] - rule.window
    grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[2])  # [R, K, H / K, d]
    scale, softcap, sinks = rule.weighting
    if softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=seen[:, None, None], scale=scale)
    else:
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = grouped.to(wide) @ k.to(wide).transpose(2, 3) * scale
        p = attention_torch.probabilities(scores, seen[:, None, None], softcap, None if sinks is None else sinks.view(k.shape[1], -1, 1))
        out = p.to(v.dtype) @ v
    return out.flatten(1, 2)
