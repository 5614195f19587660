"""Products with a weight: x W^T, and g W and g^T x of its gradient.

T rows, I inputs, O outputs: 2 T I O flops each. In float32 on the CPU library and operand order are chosen, once for few rows (a decoding
step) and once for many: which is fastest depends on the processor.
`measure` times the candidates, `choose` sets one for the process; without either it is oneDNN. Elsewhere it is torch's own product.
The same product serves with and without gradients, so a policy equals its reference bit for bit while their weights do.
"""

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from treetune.ops import backend

# oneDNN, and the layer between it and torch, each keep a compiled kernel for up to 1024 shapes, some 0.2 MB apiece, and almost
# every stream has a length of its own: a run would grow by 6 MB a step. Read at their first use.
CACHES, KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), 64
for name in CACHES:
    os.environ.setdefault(name, str(KERNELS))


def fast(x: Tensor) -> bool:
    """Whether products with the rows x [T, I] run in oneDNN."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.shape[0] > 0 and _available() and not backend.on_gpu(x)


def _available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Choice(NamedTuple):
    """Names of `CANDIDATES` for streams of at most `FEW` rows, and for longer ones."""

    few: str = "onednn"
    many: str = "onednn"


FEW = 32


def _onednn(x: Tensor, w: Tensor, add: Tensor | None) -> Tensor:
    if add is None:
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, add, w, None, "add")


def _onednn_turned(x: Tensor, w: Tensor, add: Tensor | None) -> Tensor:
    y = torch.ops.mkldnn._linear_pointwise(w, x, None, "none", [], "").T
    return y.contiguous() if add is None else add.add_(y)


def _torch(x: Tensor, w: Tensor, add: Tensor | None) -> Tensor:
    return x @ w.T if add is None else add.add_(x @ w.T)


def _torch_turned(x: Tensor, w: Tensor, add: Tensor | None) -> Tensor:
    y = (w @ x.T).T
    return y.contiguous() if add is None else add.add_(y)


# Turned: (W x^T)^T, in which the library sees the weight's rows first and there are many of them however few x has.
CANDIDATES: dict[str, Callable] = {"onednn": _onednn, "onednn turned": _onednn_turned, "torch": _torch, "torch turned": _torch_turned}
_choice = Choice()


def choose(choice: Choice) -> None:
    """Use these products in this process. Results of runs are equal to the bit only under equal choices."""
    global _choice
    if unknown := set(choice) - CANDIDATES.keys():
        raise ValueError(f"product {min(unknown)!r} is not one of {', '.join(CANDIDATES)}")
    _choice = choice


def chosen() -> Choice:
    """The products in use."""
    return _choice


def measure(*, inputs: int = 1024, outputs: int = 2048, rounds: int = 7, margin: float = 0.85) -> Choice:
    """The fastest candidate for 16 rows and for 256, by the best of some interleaved rounds: 0.2 to 0.3 s on two cores.

    Another than oneDNN must take less than `margin` of its time, so that noise does not decide.
    """
    return Choice(*(_fastest(rows, inputs, outputs, rounds, margin) for rows in (16, 256)))


def _fastest(rows: int, inputs: int, outputs: int, rounds: int, margin: float) -> str:
    x, w = torch.ones(rows, inputs), torch.ones(outputs, inputs)
    if not fast(x):
        return Choice().few
    # The best of interleaved rounds: other work on the machine only ever slows a round down, and slows all candidates alike.
    best = dict.fromkeys(CANDIDATES, float("inf"))
    for _ in range(rounds):
        for name, product in CANDIDATES.items():
            start = time.perf_counter()
            product(x, w, None)
            best[name] = min(best[name], time.perf_counter() - start)
    first = min(best, key=best.__getitem__)
    return first if best[first] < margin * best["onednn"] else "onednn"


def rows_t(x: Tensor, w: Tensor, add: Tensor | None = None) -> Tensor:
    """x W^T, plus `add`, which this consumes: x [T, I], w [O, I] -> [T, O]. Not differentiable: for the inside of autograd functions."""
    # Also without gradients: another product would make a frozen copy of the weights differ in the last bits, and KL at step 0 not be 0.
    if not fast(x):
        return x @ w.T if add is None else add.addmm_(x, w.T)
    return CANDIDATES[_choice.few if x.shape[0] <= FEW else _choice.many](x, w, add)


def even_rows_t(x: Tensor, w: Tensor) -> Tensor:
    """x W^T as `rows_t`, but in float32 on the CPU a row of it depends on that row of x alone, and not on how many there are.

    For groups of rows whose sizes vary: other documents of a stream would else change the last bits. Not differentiable, likewise.
    """
    if not fast(x):
        return x @ w.T
    # One row alone would be a product with a vector, which sums in another order.
    return _onednn(torch.cat([x, x]), w, None)[:1] if x.shape[0] == 1 else _onednn(x, w, None)


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
