"""RMSNorm: y = scale * cast(x / sqrt(mean(x^2) + eps)), the cast order of Llama, or cast(scale * x / ...), that of Gemma and Olmo.

The mean is over the last dim, in float32 (float64 for float64); the normalised x is rounded to x.dtype before `scale` multiplies it, or
once after.
Bytes moved (n elements of size b): forward 2nb, backward 3nb. Saved for backward: x and 1/rms [T] (float32).
Shapes: T rows, D features; x [..., D], scale [D].
Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 1910.07467, eq. 4.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from treetune.ops import backend
from treetune.ops.backend import tl

PROGRAMS = 512  # rows of partial sums of dscale: a fixed number, so that the order of the sum is


def rms_norm_ref(x: torch.Tensor, scale: torch.Tensor, *, eps: float, once: bool = False) -> torch.Tensor:
    """The formula in plain torch, differentiated by autograd: the twin that tests compare against."""
    wide = x.to(backend.stat_dtype(x))
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normal * scale.to(wide.dtype)).to(x.dtype) if once else normal.to(x.dtype) * scale


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=backend.stat_dtype(x))  # one read of x, no temporary
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def forward_torch(x: torch.Tensor, scale: torch.Tensor, eps: float, once: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """y [..., D] and 1/rms [..., 1]."""
    rstd = _inverse_rms(x, eps)
    if once:
        return (x * rstd).mul_(scale).to(x.dtype), rstd
    y = (x * rstd).to(x.dtype)
    return (y.mul_(scale) if scale.dtype == x.dtype else y * scale), rstd


def backward_torch(
    dy: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, rstd: torch.Tensor, with_dscale: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx = rstd * (g - x * rstd^2 * mean(g * x)) with g = dy * scale; dscale = sum over rows of dy * x * rstd, or None."""
    wide = rstd.dtype
    x_wide = x.to(wide)
    g = dy.to(wide) * scale.to(wide)
    dot = (g * x_wide).sum(-1, keepdim=True)
    dx = g.addcmul_(x_wide, dot.mul_(rstd.square()).div_(x.shape[-1]), value=-1).mul_(rstd).to(x.dtype)
    if not with_dscale:
        return dx, None
    rows = (x_wide * rstd).mul_(dy).reshape(-1, x.shape[-1])
    return dx, rows.sum(0).to(scale.dtype)


@backend.jit
def _forward_kernel(x, scale, y, rstd, dim, eps, ONCE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < dim
    raw = tl.load(x + row * dim + cols, inside, 0)
    wide = raw.to(tl.float32)
    inverse = 1 / tl.sqrt(tl.sum(wide * wide, 0) / dim + eps)
    normal = wide * inverse
    if not ONCE:
        normal = normal.to(raw.dtype).to(tl.float32)
    tl.store(y + row * dim + cols, normal * tl.load(scale + cols, inside, 0).to(tl.float32), inside)
    tl.store(rstd + row, inverse)


@backend.jit
def _backward_kernel(  # noqa: PLR0913
    dy, x, scale, rstd, dx, partial, rows, dim, programs, WITH_DSCALE: tl.constexpr, BLOCK: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < dim
    weight = tl.load(scale + cols, inside, 0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(first, rows, programs):
        up = tl.load(dy + row * dim + cols, inside, 0).to(tl.float32)
        wide = tl.load(x + row * dim + cols, inside, 0).to(tl.float32)
        inverse = tl.load(rstd + row)
        g = up * weight
        dot = tl.sum(g * wide, 0)
        tl.store(dx + row * dim + cols, (g - wide * (dot * inverse * inverse / dim)) * inverse, inside)
        total += up * wide * inverse
    if WITH_DSCALE:
        tl.store(partial + first * dim + cols, total, inside)


def forward_triton(x: torch.Tensor, scale: torch.Tensor, eps: float, once: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """y [..., D] and 1/rms [..., 1]; one program per row."""
    x, dim = x.contiguous(), x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype if once else torch.promote_types(x.dtype, scale.dtype), device=x.device)
    rstd = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    block = backend.block_of(dim)
    if x.numel():
        grid, warps = (rstd.numel(),), backend.warps_of(block)
        backend.launch(_forward_kernel, grid)(x, scale.contiguous(), y, rstd, dim, eps, ONCE=once, BLOCK=block, num_warps=warps)
    return y, rstd


def backward_triton(
    dy: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, rstd: torch.Tensor, with_dscale: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx and dscale (or None). Each program takes every PROGRAMS-th row and keeps its own sum for dscale: no atomics."""
    x, dy, dim, rows = x.contiguous(), dy.contiguous(), x.shape[-1], rstd.numel()
    programs = min(PROGRAMS, rows)
    dx = torch.empty_like(x)
    partial = torch.empty(programs if with_dscale else 0, dim, dtype=torch.float32, device=x.device)
    block = backend.block_of(dim)
    if x.numel():
        backend.launch(_backward_kernel, (programs,))(
            *(dy, x, scale.contiguous(), rstd, dx, partial, rows, dim, programs),
            WITH_DSCALE=with_dscale,
            BLOCK=block,
            num_warps=backend.warps_of(block),
        )
    return dx, partial.sum(0).to(scale.dtype) if with_dscale else None


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(x, scale, eps, once):
        return (forward_triton if backend.use_triton(x) else forward_torch)(x, scale, eps, once)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, scale, *_ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, scale, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        x, scale, rstd = ctx.saved_tensors
        run = backward_triton if backend.use_triton(x) else backward_torch
        return *run(dy, x, scale, rstd, ctx.needs_input_grad[1]), None, None


def rms_norm(x: torch.Tensor, scale: torch.Tensor, *, eps: float, once: bool = False) -> torch.Tensor:
    """scale * cast(x / sqrt(mean(x^2, -1) + eps)); x [..., D], scale [D] -> [..., D] in the promoted dtype of x and scale.

    once: cast(scale * x / sqrt(...)) in the dtype of x, which is rounded once.
    Errors: ValueError when scale is not [D].
    """
    if scale.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm got scale of shape {tuple(scale.shape)} for x {tuple(x.shape)}: expected [{x.shape[-1]}]")
    return _RmsNorm.apply(x, scale, eps, once)[0]
