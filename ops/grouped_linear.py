"""Projections by groups of rows: y_n = x_n W_e^T + s (x_n A_e^T) B_e^T for each row n of group e, with an optional low-rank adapter.

N rows sorted by group, E groups, I inputs, O outputs, r rank. `ends` [E] is where each group ends; groups may be empty. The last ends at N,
or before: results and gradients of the rows behind it may be anything, and no sum has them.
Weights of experts are x [N, I], W [E, O, I], A [E, r, I], B [E, O, r]. 2 N I O flops, the weights of non-empty groups read once.
Saved for backward: x, and the rank-r product. Every sum has one order, so results are repeatable.
On the CPU a loop over groups; on CUDA `torch._grouped_mm` where it takes the operands, bfloat16 rows of a multiple of 16 bytes, and
Triton kernels elsewhere.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from treetune.ops import backend, grouped_kernels, kept, product


def grouped_linear_ref(x: Tensor, weight: Tensor, ends: Tensor, adapter: dict | None = None, *, scale: float = 1.0) -> Tensor:
    """The formula, one group at a time, through plain autograd: the twin that tests compare against."""
    out = []
    for e, (lo, hi) in enumerate(_spans(ends, x.shape[0])):
        y = x[lo:hi] @ weight[e].T
        out.append(y if adapter is None else y + scale * (x[lo:hi] @ adapter["A"][e].T) @ adapter["B"][e].T)
    return torch.cat(out)


def _spans(ends: Tensor, rows: int) -> list[tuple[int, int]]:
    groups = ends.shape[0]
    bounds = [i * rows // groups for i in range(groups + 1)] if backend.counted() else [0, *ends.tolist()]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def rows_t_loop(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """x_n W_e^T, a product a group: [N, I], [E, O, I] -> [N, O]. In float32 on the CPU no row depends on the others."""
    out = x.new_empty(x.shape[0], w.shape[1])
    for e, (lo, hi) in enumerate(_spans(ends, x.shape[0])):
        if lo < hi:
            out[lo:hi] = product.even_rows_t(x[lo:hi], w[e])
    return out


def outer_loop(g: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """g_e^T x_e, a product a group: [N, O], [N, I] -> [E, O, I], 0 for an empty group."""
    out = x.new_empty(ends.shape[0], g.shape[1], x.shape[1])
    for e, (lo, hi) in enumerate(_spans(ends, x.shape[0])):
        out[e] = product.outer(g[lo:hi], x[lo:hi]) if lo < hi else 0.0
    return out


def rows_t_grouped(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """`rows_t_loop` in one call of torch."""
    return torch._grouped_mm(x.contiguous(), w.transpose(1, 2), offs=ends)


def outer_grouped(g: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """`outer_loop` in one call of torch."""
    return torch._grouped_mm(g.contiguous().T, x.contiguous(), offs=ends)


def _grouped(x: Tensor, inputs: int, outputs: int) -> bool:
    """Whether `torch._grouped_mm` takes rows of these sizes without a loop on the host that waits for the device."""
    return backend.on_gpu(x) and x.dtype == torch.bfloat16 and inputs % 8 == 0 and outputs % 8 == 0


def rows_t(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """x_n W_e^T: x [N, I], w [E, O, I] -> [N, O]. Not differentiable: for the inside of autograd functions."""
    if _grouped(x, w.shape[2], w.shape[1]):
        return rows_t_grouped(x, w, ends)
    return (grouped_kernels.rows_t_triton if backend.use_triton(x) else rows_t_loop)(x, w, ends)


def rows(g: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """g_n W_e: g [N, O], w [E, O, I] -> [N, I]. Not differentiable, likewise."""
    return rows_t(g, w.transpose(1, 2), ends)


def outer(g: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """g_e^T x_e: g [N, O], x [N, I] -> [E, O, I]. Not differentiable, likewise."""
    if _grouped(x, x.shape[1], g.shape[1]):
        return outer_grouped(g, x, ends)
    return (grouped_kernels.outer_triton if backend.use_triton(x) else outer_loop)(g, x, ends)


def _forward(x: Tensor, w: Tensor, ends: Tensor, a: Tensor | None, b: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None]:
    y = rows_t(x, w, ends)
    if a is None or b is None:
        return y, None
    low = rows_t(x, a, ends)  # [N, r]
    return y.add_(rows_t(low, b, ends), alpha=scale), low


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):
        return kept.result(partial(_forward, *inputs))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors, output[1])
        if output[1] is not None:
            ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, g, _):
        x, w, ends, a, b, low = ctx.saved_tensors
        g = g.contiguous()  # a sum's gradient is one number expanded, which grouped products refuse
        d_x = rows(g, w, ends) if ctx.needs_input_grad[0] else None
        d_w = outer(g, x, ends) if ctx.needs_input_grad[1] else None
        if a is None:
            return d_x, d_w, None, None, None, None
        g_low = rows(g, b, ends).mul_(ctx.scale)
        d_x = d_x if d_x is None else d_x.add_(rows(g_low, a, ends))
        return d_x, d_w, None, outer(g_low, x, ends), outer(g, low, ends).mul_(ctx.scale), None


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, adapter: dict | None = None, *, scale: float = 1.0) -> Tensor:
    """x [N, I] sorted by group, weight [E, O, I], ends int32 [E], adapter {"A": [E, r, I], "B": [E, O, r]} or None -> [N, O].

    Errors: ValueError when the sizes do not fit.
    """
    if x.shape[1] != weight.shape[2] or ends.shape != weight.shape[:1]:
        sizes = f"x {list(x.shape)}, weight {list(weight.shape)} and ends {list(ends.shape)}"
        raise ValueError(f"grouped_linear got {sizes}: expected [N, I], [E, O, I] and [E]")
    a, b = (None, None) if not adapter else (adapter[name].to(x.dtype) for name in "AB")
    return _GroupedLinear.apply(x, weight, ends, a, b, scale)[0]


class _GroupedBias(torch.autograd.Function):
    @staticmethod
    def forward(x, bias, ends):
        group = torch.searchsorted(ends, torch.arange(x.shape[0], dtype=ends.dtype, device=x.device), right=True)
        return x + bias[group.clamp_(max=bias.shape[0] - 1)]  # rows behind the last group

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (ends,) = ctx.saved_tensors
        # A sum over each group as a product with ones, 8 columns of them because `torch._grouped_mm` asks for as many.
        ones = torch.ones(g.shape[0], 8, dtype=g.dtype, device=g.device)
        return g, outer(g, ones, ends)[:, :, 0] if ctx.needs_input_grad[1] else None, None


def grouped_bias(x: Tensor, bias: Tensor, ends: Tensor) -> Tensor:
    """x_n + bias_e: x [N, O] sorted by group, bias [E, O], ends int32 [E] -> [N, O]."""
    return _GroupedBias.apply(x, bias, ends)
