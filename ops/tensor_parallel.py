"""Layers that are split among ranks: each has the same rows of x and some of the features in between.

y = f(x W^T) V^T with rows of W and columns of V on this rank: x enters (identity; its gradient is summed over ranks), y leaves (summed; its
gradient is as it is). What every rank has whole and applies to its own features (a norm of each head) enters, too: each rank computes a
share of its gradient. One message of [T, D] for each x and y, forward or backward. A norm over the features of all ranks joins them first.
Source: Shoeybi et al., "Megatron-LM", arXiv 1909.08053, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class Split(NamedTuple):
    """The ranks that layers are split among: `rank` of `size` in a process group."""

    group: Any
    rank: int
    size: int

    def part(self, size: int) -> tuple[int, int]:
        """Those of so many rows that this rank has, from the first to before the second: parts are equal but for the last."""
        each = -(-size // self.size)
        return min(self.rank * each, size), min((self.rank + 1) * each, size)


def _summed(tensors: Sequence[Tensor], split: Split) -> list[Tensor]:
    """Each tensor summed over ranks, in one message a dtype, of which the largest alone stays a view.

    Small ones are gradients that may be kept for the whole step, and would keep the message, the gradient of all tokens, with them.
    """
    out: list[Tensor] = list(tensors)
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        chosen = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = torch.cat([tensors[i].reshape(-1) for i in chosen])
        dist.all_reduce(flat, group=split.group)
        largest = max(chosen, key=lambda i: tensors[i].numel())
        for i, piece in zip(chosen, flat.split([tensors[i].numel() for i in chosen]), strict=True):
            out[i] = (piece if i == largest else piece.clone()).view_as(tensors[i])
    return out


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(split, *tensors):
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.split = inputs[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        # Which inputs take a gradient is the same on all ranks, and so are the messages.
        needed = [i for i in range(len(grads)) if ctx.needs_input_grad[1 + i]]
        summed = dict(zip(needed, _summed([grads[i] for i in needed], ctx.split), strict=True))
        return None, *(summed.get(i) for i in range(len(grads)))


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(split, x):
        return _summed([x], split)[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return None, g


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(split, x, size):
        return gathered(split, x, size)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.split, _, ctx.size = inputs

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        first, end = ctx.split.part(ctx.size)
        return None, _summed([g], ctx.split)[0][..., first:end].contiguous(), None


def join(split: Split, x: Tensor, size: int) -> Tensor:
    """`gathered` where each rank goes on with a part of the result: the gradient of x is that of own columns, summed over ranks."""
    return _Join.apply(split, x, size)


def enter(split: Split | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, equal on all ranks, as they are; their gradients are summed over ranks. Without a split nothing is done."""
    return tensors if split is None or not tensors else _Enter.apply(split, *tensors)


def leave(split: Split | None, x: Tensor) -> Tensor:
    """The sum of x over ranks; its gradient, equal on all ranks, is that of each. Without a split x itself."""
    return x if split is None else _Leave.apply(split, x)


def gathered(split: Split | None, x: Tensor, size: int) -> Tensor:
    """The columns [..., size] of all ranks, of which x has those of `Split.part`; not differentiable."""
    if split is None:
        return x
    each = -(-size // split.size)
    own = torch.nn.functional.pad(x, (0, each - x.shape[-1])).movedim(-1, 0).contiguous()
    whole = own.new_empty(split.size * each, *own.shape[1:])
    dist.all_gather(list(whole.chunk(split.size)), own, group=split.group)
    return whole[:size].movedim(0, -1).contiguous()
