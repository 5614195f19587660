"""Results of a layer that is computed again in the backward pass, kept from its first computation: matrix products and attention.

Everything else of the layer (norms, rotations, activations, casts) is computed once more. Products inside an autograd function that
changes them in place are kept as a whole by `result`; those of torch alone, and its attention, are seen as the layer runs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Put = Callable[[Tensor], Any]

# Attention, and products of two matrices. A product of two stacks is none of them: among these are all scores of an attention.
NAMES = (
    "aten::mm", "aten::addmm", "aten::_grouped_mm", "mkldnn::_linear_pointwise", "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention", "torch_attn::_varlen_attn",
)  # fmt: skip


class Kept(NamedTuple):
    """A kept tensor as `put` left it, and the tensor's version: one that was changed in place afterwards is computed again."""

    value: Any
    seen: Tensor
    version: int


class Store:
    """The results of one layer in the order in which they were computed. put and take: where they are between the passes."""

    def __init__(self, put: Put, take: Callable[[Any], Tensor]):
        self.put, self.take = put, take
        self.results: list[Any] = []

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Inside, results are kept."""
        with _as(self._keep), _Products():
            yield

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Inside, results are those that were kept, in the same order."""
        results = iter(self.results)
        with _as(lambda compute: self._use(next(results), compute)), _Products():
            yield

    def _keep(self, compute: Callable[[], Any]) -> Any:
        out = compute()
        self.results.append(_each(self._kept, out))
        return out

    def _kept(self, tensor: Tensor) -> Any:
        # A detached alias: autograd makes of the result itself a part of the graph, which would then hold itself.
        alias = tensor.detach()
        value = self.put(alias)
        return Kept(value, alias if value is alias else alias.new_empty(0), alias._version)

    def _use(self, results: Any, compute: Callable[[], Any]) -> Any:
        if any(one.seen._version != one.version for one in _flat(results) if one.value is one.seen):
            return compute()
        return _each(lambda one: self.take(one.value).detach(), results)


class _Active(threading.local):
    handle: Callable[[Callable[[], Any]], Any] | None = None


_active = _Active()


@contextlib.contextmanager
def _as(handle: Callable[[Callable[[], Any]], Any] | None) -> Iterator[None]:
    before, _active.handle = _active.handle, handle
    try:
        yield
    finally:
        _active.handle = before


def result(compute: Callable[[], Any]) -> Any:
    """What `compute` gives, a tensor or a tuple of such; where a layer is computed again, what it gave at first."""
    handle = _active.handle
    if handle is None:
        return compute()
    with _as(None):  # what it is made of is not kept
        return handle(compute)


class _Products(TorchDispatchMode):
    """Keeps or uses the products and attentions that torch computes."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What is compiled runs as it is."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The op, or its kept result."""
        if func._schema.name not in NAMES or func._schema.is_mutable:
            return func(*args, **(kwargs or {}))
        return result(lambda: func(*args, **(kwargs or {})))


def _each(fn: Callable[[Any], Any], results: Any) -> Any:
    """`fn` of each tensor or kept tensor; None and numbers stay."""
    if isinstance(results, (Kept, Tensor)):
        return fn(results)
    return type(results)(_each(fn, one) for one in results) if isinstance(results, tuple | list) else results


def _flat(results: Any) -> Iterator[Kept]:
    if isinstance(results, Kept):
        yield results
    elif isinstance(results, tuple | list):
        for one in results:
            yield from _flat(one)
