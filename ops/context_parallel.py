"""Streams whose tokens are split among ranks: each computes the layers of its own, and queries see the keys of all.

T tokens in 2n chunks of c = ceil(T / 2n), of which rank r of n has those number r and 2n - 1 - r, so that all ranks see about as many
pairs of a query and a key. Where there are not enough tokens, chunks repeat the last one, which counts nowhere. What comes out whole is
used by all ranks alike, each with 1/n of the loss: gradients are summed over ranks.
Source of gathered keys and values, and of these chunks: Llama 3, arXiv 2407.21783, section 3.3.2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from treetune.ops.tensor_parallel import Split


class Part(NamedTuple):
    """The tokens that a rank has of a stream of `tokens`: two chunks, one from its start on and one from its end."""

    split: Split
    tokens: int

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        return -(-self.tokens // (2 * self.split.size))

    @property
    def rows(self) -> int:
        """Tokens of each rank, with those that are repeated."""
        return 2 * self.chunk

    @property
    def spans(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The tokens of each chunk that no other rank has, and that count: from the first to before the second."""
        rank, last = self.split.rank, 2 * self.split.size - 1
        first, second = ((min(self.tokens, i * self.chunk), min(self.tokens, (i + 1) * self.chunk)) for i in (rank, last - rank))
        return first, second

    def places(self) -> Tensor:
        """The token of the stream that each row of this rank is: int64 [t], on the host."""
        return own(self, torch.arange(self.tokens))


def own(part: Part | None, x: Tensor) -> Tensor:
    """The rows [t, ...] of this rank of what is there for each token [T, ...], equal on all ranks and without a gradient."""
    if part is None:
        return x
    chunks = []
    for first, end in part.spans:
        chunks += [x[first:end], x[-1:].expand(part.chunk - (end - first), *x.shape[1:])]
    return torch.cat(chunks)


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
        first, second = whole.view(-1, 2, part.chunk, flat.shape[1]).unbind(1)  # chunks of each rank: those of the start, of the end
        whole = torch.cat([first, second.flip(0)]).flatten(0, 1)
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
        first, second = whole.view(2, -1, part.chunk, whole.shape[1])
        rows = whole.new_empty(part.rows, whole.shape[1])
        _reduce_scatter(rows, torch.stack([first, second.flip(0)], dim=1).flatten(0, 2), part.split.group)
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
