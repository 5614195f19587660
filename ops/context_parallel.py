"""Streams whose tokens are split among ranks: each computes the layers of its own, and queries see the keys of all.

T tokens of which each of n ranks has t = ceil(T / n) in order; the last ranks repeat the last token where there are not enough, which
counts nowhere. What comes out whole is used by all ranks alike, each with 1/n of the loss: gradients are summed over ranks.
Source of gathered keys and values: Llama 3, arXiv 2407.21783, section 3.3.2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from treetune.ops.tensor_parallel import Split


class Part(NamedTuple):
    """The tokens that a rank has of a stream of `tokens`: those from `first` on."""

    split: Split
    tokens: int

    @property
    def rows(self) -> int:
        """Tokens of each rank."""
        return -(-self.tokens // self.split.size)

    @property
    def first(self) -> int:
        """The first token of this rank; `tokens` where it has none."""
        return min(self.tokens, self.split.rank * self.rows)

    @property
    def count(self) -> int:
        """Those of them that no other rank has, and that count."""
        return min(self.tokens, self.first + self.rows) - self.first


def own(part: Part | None, x: Tensor) -> Tensor:
    """The rows [t, ...] of this rank of what is there for each token [T, ...], equal on all ranks and without a gradient."""
    if part is None:
        return x
    kept = x[part.first : part.first + part.count]
    missing = part.rows - part.count
    return kept if not missing else torch.cat([kept, x[-1:].expand(missing, *x.shape[1:])])


# torch 2.13 has other names for both.
def _all_gather(whole: Tensor, rows: Tensor, group: Any) -> None:
    (getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)(whole, rows, group=group)


def _reduce_scatter(rows: Tensor, whole: Tensor, group: Any) -> None:
    (getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)(rows, whole, group=group)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(part, *tensors):
        flat = torch.cat([x.reshape(part.rows, -1) for x in tensors], dim=1)
        whole = flat.new_empty(part.split.size * part.rows, flat.shape[1])
        _all_gather(whole, flat, part.split.group)
        pieces = whole[: part.tokens].split([x[0].numel() for x in tensors], dim=1)
        return tuple(piece.reshape(part.tokens, *x.shape[1:]) for piece, x in zip(pieces, tensors, strict=True))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.part, ctx.dtype = inputs[0], inputs[1].dtype

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        part, wide = ctx.part, torch.promote_types(ctx.dtype, torch.float32)
        flat = torch.cat([g.reshape(part.tokens, -1).to(wide) for g in grads], dim=1)
        whole = torch.nn.functional.pad(flat, (0, 0, 0, part.split.size * part.rows - part.tokens))
        rows = whole.new_empty(part.rows, whole.shape[1])
        _reduce_scatter(rows, whole, part.split.group)
        pieces = rows.to(ctx.dtype).split([g[0].numel() for g in grads], dim=1)
        return None, *(piece.reshape(part.rows, *g.shape[1:]) for piece, g in zip(pieces, grads, strict=True))


def dealt(split: Split, own: Tensor, count: int) -> Tensor:
    """Rows [count, ...] of which each rank has made every n-th, [r, ...] from that of its number on: all of them, on all ranks."""
    padded = own.new_zeros(-(-count // split.size), *own.shape[1:])
    padded[: own.shape[0]] = own
    whole = padded.new_empty(split.size * padded.shape[0], *padded.shape[1:])
    _all_gather(whole, padded, split.group)
    return whole.unflatten(0, (split.size, -1)).transpose(0, 1).flatten(0, 1)[:count]


def joined(part: Part | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """[t, ...] of each rank, of one dtype, as [T, ...] on all, in one message; gradients are summed over ranks, each keeping its rows."""
    return tensors if part is None else _Joined.apply(part, *tensors)
