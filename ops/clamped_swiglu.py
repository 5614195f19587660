"""Clamped SwiGLU over alternating columns: y = (u + 1) g sigmoid(a g), g = min(x[2i], c) and u = x[2i + 1] between -c and c.

Bytes moved (n outputs of size b): forward 3nb, backward 5nb. Saved for backward: x, nothing else.
Computed in float32 (float64 for float64) and rounded once. Shapes: T rows, F outputs; x [T, 2 F], y [T, F].
Source: the gpt-oss release, OpenAI 2025 (arXiv 2508.10925, section 2.3).
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from treetune.ops import backend
from treetune.ops.backend import tl

BLOCK = 1024  # outputs of a program


def clamped_swiglu_ref(x: torch.Tensor, *, alpha: float, limit: float) -> torch.Tensor:
    """The formula in plain torch, differentiated by autograd: the twin that tests compare against."""
    gate, up = x[..., ::2].clamp(max=limit), x[..., 1::2].clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def forward_torch(x: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """y [T, F]."""
    wide = x.to(backend.stat_dtype(x))
    gate, up = wide[..., ::2].clamp(max=limit), wide[..., 1::2].clamp(-limit, limit)
    return torch.sigmoid(gate * alpha).mul_(gate).mul_(up.add_(1)).to(x.dtype)


def backward_torch(dy: torch.Tensor, x: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """dx [T, 2 F]: dg = dy (u + 1) s (1 + a g (1 - s)) with s = sigmoid(a g), du = dy g s, 0 where x is beyond its bounds."""
    wide, dy = x.to(backend.stat_dtype(x)), dy.to(backend.stat_dtype(x))
    raw_gate, raw_up = wide[..., ::2], wide[..., 1::2]
    gate, up = raw_gate.clamp(max=limit), raw_up.clamp(-limit, limit)
    s = torch.sigmoid(gate * alpha)
    dgate = (1 + alpha * gate * (1 - s)).mul_(s).mul_(up + 1).mul_(dy).masked_fill_(raw_gate > limit, 0)
    dup = (gate * s).mul_(dy).masked_fill_(raw_up.abs() > limit, 0)
    return torch.stack([dgate, dup], dim=-1).flatten(-2).to(x.dtype)


@backend.jit
def _forward_kernel(x, y, count, alpha, limit, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    gate = tl.minimum(tl.load(x + 2 * index, inside, 0).to(tl.float32), limit)
    up = tl.minimum(tl.maximum(tl.load(x + 2 * index + 1, inside, 0).to(tl.float32), -limit), limit)
    tl.store(y + index, (up + 1) * gate / (1 + tl.exp(-alpha * gate)), inside)


@backend.jit
def _backward_kernel(dy, x, dx, count, alpha, limit, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    d = tl.load(dy + index, inside, 0).to(tl.float32)
    raw_gate = tl.load(x + 2 * index, inside, 0).to(tl.float32)
    raw_up = tl.load(x + 2 * index + 1, inside, 0).to(tl.float32)
    gate, up = tl.minimum(raw_gate, limit), tl.minimum(tl.maximum(raw_up, -limit), limit)
    s = 1 / (1 + tl.exp(-alpha * gate))
    dgate = d * (up + 1) * s * (1 + alpha * gate * (1 - s))
    tl.store(dx + 2 * index, tl.where(raw_gate > limit, 0.0, dgate), inside)
    tl.store(dx + 2 * index + 1, tl.where(tl.abs(raw_up) > limit, 0.0, d * gate * s), inside)


def forward_triton(x: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """y [T, F], rounded once."""
    x = x.contiguous()
    y = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype, device=x.device)
    if y.numel():
        backend.launch(_forward_kernel, (-(-y.numel() // BLOCK),))(x, y, y.numel(), alpha, limit, BLOCK=BLOCK)
    return y


def backward_triton(dy: torch.Tensor, x: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """dx [T, 2 F], rounded once."""
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    if dy.numel():
        backend.launch(_backward_kernel, (-(-dy.numel() // BLOCK),))(dy, x, dx, dy.numel(), alpha, limit, BLOCK=BLOCK)
    return dx


class _ClampedSwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(x, alpha, limit):
        return (forward_triton if backend.use_triton(x) else forward_torch)(x, alpha, limit)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.alpha, ctx.limit = inputs
        ctx.save_for_backward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return (backward_triton if backend.use_triton(x) else backward_torch)(dy, x, ctx.alpha, ctx.limit), None, None


def clamped_swiglu(x: torch.Tensor, *, alpha: float, limit: float) -> torch.Tensor:
    """(u + 1) g sigmoid(alpha g) of alternating columns: x [..., 2 F] -> [..., F]. Errors: ValueError for an odd number of columns."""
    if x.shape[-1] % 2:
        raise ValueError(f"clamped_swiglu got x {tuple(x.shape)}: expected an even number of columns, gates and values in turn")
    return _ClampedSwiGlu.apply(x, alpha, limit)
