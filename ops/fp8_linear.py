"""Products in float8 with frozen weights: y = x W^T with both sides in e4m3, each row of each with a scale of its own.

T tokens, I inputs, O outputs. W [O, I] = codes * s_w, kept so; x [T, I] is rounded to q * s_x with s_x = max |x| of its row / 448, so that
y = s_x s_w (q codes^T), summed in float32. A row of y depends on no other row of x. A number of x is off by at most 1/16 of itself, or
2^-10 s_x near 0. The gradient of x is g W with W made dense, in the dtype of g: what is rounded on the way forward passes gradients as it
is (straight-through). CUDA multiplies float8 itself from compute capability 8.9 on; other devices compute the same sums in float32.
Source: Micikevicius et al., arXiv 2209.05433; Bengio et al., arXiv 1308.3432.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from treetune.ops import kept, product

MOST = 448.0  # the largest number of e4m3
SMALLEST = 1e-12  # the least that the largest number of a row counts as: a row of zeros is zeros
ALIGNED = 16  # CUDA's float8 products take inputs and outputs in multiples of this
CAPABILITY = (8, 9)


class Rows(NamedTuple):
    """A frozen weight [O, I] in float8: e4m3 codes of its shape, and the scale of each row, float32 [O]."""

    codes: Tensor
    scale: Tensor

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W [O, I]."""
        return (self.codes.float() * self.scale[:, None]).to(dtype)


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """q [T, I] in e4m3 and s_x float32 [T] of x [T, I]."""
    wide = x.float()
    scale = wide.abs().amax(1).clamp(min=SMALLEST) / MOST
    # Beyond the largest number e4m3 has nan, where a quotient could be rounded to.
    return (wide / scale[:, None]).clamp(-MOST, MOST).to(torch.float8_e4m3fn), scale


def native(device: torch.device) -> bool:
    """Whether a device multiplies float8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY


def linear_ref(x: Tensor, w: Rows) -> Tensor:
    """The formula."""
    q, scale = rounded_rows(x)
    return (product.rows_t(q.float(), w.codes.float()) * scale[:, None] * w.scale).to(x.dtype)


def _scaled(q: Tensor, scale: Tensor, w: Rows, dtype: torch.dtype) -> Tensor:
    aligned = all(side % ALIGNED == 0 for side in w.codes.shape)
    if not (native(q.device) and aligned):
        return (product.rows_t(q.float(), w.codes.float()) * scale[:, None] * w.scale).to(dtype)
    return torch._scaled_mm(q, w.codes.T, scale_a=scale[:, None], scale_b=w.scale[None, :], out_dtype=torch.bfloat16).to(dtype)


def _forward(x: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    q, scale = rounded_rows(x)
    return tuple(_scaled(q, scale, w, x.dtype) for w in _paired(parts))


def _paired(parts: Sequence[Tensor]) -> list[Rows]:
    return [Rows(codes, scale) for codes, scale in zip(parts[::2], parts[1::2], strict=True)]


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> Any:
        return kept.result(partial(_forward, *inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[1:])  # of the input nothing: the weights take no gradient

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        parts, d_x = ctx.saved_tensors, None
        for g, w in zip(grads, _paired(parts), strict=True):
            d_x = product.rows(g, w.dense(g.dtype), add=d_x)
        return (d_x, *(None for _ in parts))


def linears(x: Tensor, weights: Sequence[Rows]) -> list[Tensor]:
    """x [T, I] through each weight [O_i, I] -> [T, O_i] in the dtype of x; differentiable in x."""
    return list(_Linears.apply(x, *(part for w in weights for part in w)))
