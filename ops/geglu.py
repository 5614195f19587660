"""GeGLU with the tanh approximation: y = gelu(gate) * up with gelu(x) = x/2 (1 + tanh(u(x))), u(x) = sqrt(2/pi) (x + 0.044715 x^3).

As (1 + tanh(u)) / 2 = sigmoid(2u), it is x * sigmoid(2 u(x)): the kernels need no tanh.
Bytes moved (n elements of size b): forward 3nb, backward 5nb. Saved for backward: gate and up (inputs of the op), nothing else.
Shapes: any; gate and up alike.
Source: Shazeer, "GLU Variants Improve Transformer", 2002.05202, eq. 5; Hendrycks and Gimpel, 1606.08415, section 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from treetune.ops import backend
from treetune.ops.backend import tl

BLOCK = 1024  # elements of a program


def geglu_ref(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The formula in plain torch, differentiated by autograd: the twin that tests compare against."""
    return F.gelu(gate, approximate="tanh") * up


def forward_torch(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * up."""
    return F.gelu(gate, approximate="tanh").mul_(up)  # in place: one temporary of this width, not two


def backward_torch(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dgate = dy * up * gelu'(gate), dup = dy * gelu(gate)."""
    return torch.ops.aten.gelu_backward(dy * up, gate, approximate="tanh"), F.gelu(gate, approximate="tanh").mul_(dy)


@backend.jit
def _forward_kernel(gate, up, y, count, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    g = tl.load(gate + index, inside, 0).to(tl.float32)
    s = 1 / (1 + tl.exp(-1.5957691216057308 * (g + 0.044715 * g * g * g)))  # 2 sqrt(2/pi)
    tl.store(y + index, g * s * tl.load(up + index, inside, 0).to(tl.float32), inside)


@backend.jit
def _backward_kernel(dy, gate, up, dgate, dup, count, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    d = tl.load(dy + index, inside, 0).to(tl.float32)
    g = tl.load(gate + index, inside, 0).to(tl.float32)
    u = tl.load(up + index, inside, 0).to(tl.float32)
    e = tl.exp(-1.5957691216057308 * (g + 0.044715 * g * g * g))
    s = 1 / (1 + e)
    # 1 - s as e s, which loses no digits; both are exactly 0 long before g^2 overflows, which 0 * inf must not meet.
    slope = tl.where((s > 0) & (e > 0), g * e * s * 1.5957691216057308 * (1 + 0.134145 * g * g), 0.0)
    tl.store(dgate + index, d * u * s * (1 + slope), inside)
    tl.store(dup + index, d * g * s, inside)


def forward_triton(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * up, rounded once."""
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


class _GeGlu(torch.autograd.Function):
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


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * up, elementwise. Errors: ValueError when gate and up differ in shape or dtype."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"geglu got gate {gate.dtype} {tuple(gate.shape)} and up {up.dtype} {tuple(up.shape)}: expected them alike")
    return _GeGlu.apply(gate, up)
