"""Tokens to the rows of their experts and back: a permutation, and gathers in both directions.

T tokens, k experts of each, N = T k rows, E experts, D features. Row n of the sorted stream is slot `order[n]` = t k + j, the j-th expert
of token t; slots of one expert keep their order. y_t = sum_j p_tj z_(t,j), summed in the order of j.
Forward and backward read and never scatter: no sum of atomics, so results are repeatable.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Route(NamedTuple):
    """order [N]: slot of each sorted row; inverse [N]: sorted row of each slot; ends int32 [E]: where each expert's rows end."""

    order: Tensor
    inverse: Tensor
    ends: Tensor


def route(chosen: Tensor, experts: int) -> Route:
    """The rows of tokens by expert: chosen [T, k], numbers of experts."""
    ordered, order = torch.sort(chosen.flatten(), stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    ends = torch.searchsorted(ordered, torch.arange(experts, device=order.device), right=True, out_int32=True)
    return Route(order, inverse, ends)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(x, order, inverse, k):
        return x[order // k]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])
        ctx.k = inputs[3]

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (inverse,) = ctx.saved_tensors
        return g[inverse].unflatten(0, (-1, ctx.k)).sum(1), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(z, weights, order, inverse):
        slots = z[inverse].unflatten(0, weights.shape)  # [T, k, D]
        return (slots * weights[:, :, None]).sum(1).to(z.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        z, weights, order, inverse = ctx.saved_tensors
        each = g[order // weights.shape[1]]  # [N, D]
        d_weights = (each.to(weights.dtype) * z).sum(1)[inverse].view_as(weights) if ctx.needs_input_grad[1] else None
        return (each * weights.flatten()[order, None]).to(z.dtype), d_weights, None, None


def dispatch(x: Tensor, rule: Route, k: int) -> Tensor:
    """A row for each expert of each token, sorted by expert: x [T, D] -> [T k, D]."""
    return _Dispatch.apply(x, rule.order, rule.inverse, k)


def combine(z: Tensor, weights: Tensor, rule: Route) -> Tensor:
    """The weighted sum of each token's rows: z [T k, D] sorted by expert, weights [T, k] -> [T, D] in the dtype of z.

    The sum is made in the promoted dtype of both, and rounded once.
    """
    return _Combine.apply(z, weights, rule.order, rule.inverse)
