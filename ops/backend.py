"""Optional Triton: `triton` and `tl` are None where the package is missing, and `jit` then returns the plain function.

Kernels read `tl` only when they run, so every op imports without Triton; `use_triton` raises where it is needed and missing.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def jit(kernel: Callable) -> Any:
    """Compile a kernel with Triton where there is Triton (interpreted when TRITON_INTERPRET=1 is set at import)."""
    # Kernels upcast right after they load: under the interpreter bfloat16 products are wrong and bfloat16 stores truncate.
    return kernel if triton is None else triton.jit(kernel)


Tell = Callable[[str, tuple], None]  # is told of a launch: the name of a kernel, and its arguments


class _Counting(threading.local):
    tell: Tell | None = None
    gpu: bool = False


_counting = _Counting()


@contextlib.contextmanager
def counting(tell: Tell, *, gpu: bool) -> Iterator[None]:
    """Inside, this thread runs ops on tensors without numbers: with `gpu` they take the way of a GPU, and kernels are only told of."""
    before = _counting.tell, _counting.gpu
    _counting.tell, _counting.gpu = tell, gpu
    try:
        yield
    finally:
        _counting.tell, _counting.gpu = before


def counted() -> bool:
    """Whether ops run on tensors without numbers, to be counted."""
    return _counting.tell is not None


def on_gpu(x: torch.Tensor) -> bool:
    """Whether ops on x take the way of a GPU."""
    return x.is_cuda or _counting.gpu


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """What launches a kernel on a grid when it is called with the arguments; where ops are counted, what tells of it."""
    return partial(tell, kernel.__name__) if counted() else kernel[grid]


def tell(name: str, *args: Any, **constants: Any) -> None:
    """Say that a kernel of this name would be launched with these arguments."""
    if _counting.tell is not None:
        _counting.tell(name, args)


def use_triton(x: torch.Tensor) -> bool:
    """Whether ops on x run as Triton kernels: CUDA tensors, but for float64, which is for checks and runs the torch formulas.

    Errors: ValueError on CUDA without Triton.
    """
    if not on_gpu(x) or x.dtype == torch.float64:
        return False
    if triton is None and not counted():
        raise ValueError("this op got CUDA tensors and Triton is not installed: pip install triton, or move the tensors to the CPU")
    return True


def block_of(n: int, most: int = 1 << 16) -> int:
    """Smallest power of two >= n, at least 16 and at most `most`: the width of a kernel's tile over n columns."""
    return min(most, 1 << max(4, (n - 1).bit_length()))


def warps_of(block: int) -> int:
    """Warps of a program that holds a row of `block` elements: 16 or fewer elements per thread up to 16 warps."""
    return 4 if block <= 2048 else 8 if block <= 4096 else 16


def stat_dtype(x: torch.Tensor) -> torch.dtype:
    """Dtype of statistics over x: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
