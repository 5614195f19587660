"""SwiGLU: y = silu(gate) * up with silu(x) = x * sigmoid(x).

Bytes moved (n elements of size b): forward 3nb, backward 5nb. Saved for backward: gate and up (inputs of the op), nothing else.
Shapes: any; gate and up alike.
Source: Shazeer, "GLU Variants Improve Transformer", 2002.05202, eq. 5.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from treetune.ops import backend
from treetune.ops.backend import tl

BLOCK = 1024  # elements of a program


def swiglu_ref(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The formula in plain torch, differentiated by autograd: the twin that tests compare against."""
    return F.silu(gate) * up


def forward_torch(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    return F.silu(gate).mul_(up)  # in place: one temporary of this width, not two


def backward_torch(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dgate = dy * up * silu'(gate), dup = dy * silu(gate)."""
    return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)


@backend.jit
def _forward_kernel(gate, up, y, count, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    g = tl.load(gate + index, inside, 0).to(tl.float32)
    tl.store(y + index, g / (1 + tl.exp(-g)) * tl.load(up + index, inside, 0).to(tl.float32), inside)


@backend.jit
def _backward_kernel(dy, gate, up, dgate, dup, count, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    d = tl.load(dy + index, inside, 0).to(tl.float32)
    g = tl.load(gate + index, inside, 0).to(tl.float32)
    u = tl.load(up + index, inside, 0).to(tl.float32)
    s = 1 / (1 + tl.exp(-g))
    tl.store(dgate + index, d * u * s * (1 + g * (1 - s)), inside)
    tl.store(dup + index, d * g * s, inside)


def forward_triton(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, rounded once."""
    gate, up = gate.contiguous(), up.contiguous()
    y, count = torch.empty_like(gate), gate.numel()
    if count:
        backend.launch(_forward_kernel, (-(-count // BLOCK),))(gate, up, y, count, BLOCK=BLOCK)
    return y


def backward_triton(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dgate and dup, rounded once each."""
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup, count = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    if count:
        backend.launch(_backward_kernel, (-(-count // BLOCK),))(dy, gate, up, dgate, dup, count, BLOCK=BLOCK)
    return dgate, dup


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(gate, up):
        return (forward_triton if backend.use_triton(gate) else forward_torch)(gate, up)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        return (backward_triton if backend.use_triton(gate) else backward_torch)(dy, gate, up)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, elementwise. Errors: ValueError when gate and up differ in shape or dtype."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"swiglu got gate {gate.dtype} {tuple(gate.shape)} and up {up.dtype} {tuple(up.shape)}: expected them alike")
    return _SwiGlu.apply(gate, up)
