"""Products with a weight: x W^T, and g W and g^T x of its gradient.

In float32 on the CPU they run in oneDNN, elsewhere in torch's own matrix product.
T rows, I inputs, O outputs: 2 T I O flops each. On CPUs for which MKL picks no AVX-512 kernels, oneDNN reaches about twice its rate,
and for the few rows of a decoding step it comes nearer to the speed at which weights are read.
The same product serves with and without gradients, so a policy equals its reference bit for bit while their weights do.
"""

import os

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# oneDNN, and the layer between it and torch, each keep a compiled kernel for up to 1024 shapes, some 0.2 MB apiece, and almost
# every stream has a length of its own: a run would grow by 6 MB a step. A step of one length needs about 30. Read at their first use.
CACHES, KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), 64
for name in CACHES:
    os.environ.setdefault(name, str(KERNELS))


def fast(x: Tensor) -> bool:
    """Whether products with the rows x [T, I] run in oneDNN."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.shape[0] > 0 and _available()


def _available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def rows_t(x: Tensor, w: Tensor, add: Tensor | None = None) -> Tensor:
    """x W^T, plus `add`, which this consumes: x [T, I], w [O, I] -> [T, O]. Not differentiable: for the inside of autograd functions."""
    if not fast(x):
        return x @ w.T if add is None else add.addmm_(x, w.T)
    if add is None:
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, add, w, None, "add")


def rows(g: Tensor, w: Tensor, add: Tensor | None = None) -> Tensor:
    """g W, plus `add`, which this consumes: g [T, O], w [O, I] -> [T, I]. Not differentiable, likewise."""
    return rows_t(g, w.T, add)


def outer(g: Tensor, x: Tensor) -> Tensor:
    """g^T x: g [T, O], x [T, I] -> [O, I]. Not differentiable, likewise."""
    return torch.ops.mkldnn._linear_pointwise(g.T, x.T, None, "none", [], "") if fast(x) else g.T @ x


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x, w):
        return rows_t(x, w)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return rows(g, w) if ctx.needs_input_grad[0] else None, outer(g, x) if ctx.needs_input_grad[1] else None


def linear(x: Tensor, w: Tensor) -> Tensor:
    """x W^T, differentiable in both: x [T, I], w [O, I] -> [T, O]."""
    return _Linear.apply(x, w) if fast(x) else x @ w.T
