"""What a computation takes, counted op by op as it runs: floating-point operations, bytes moved, launches, and the most memory at once.

It may run on fake tensors (`torch._subclasses.FakeTensorMode`), which have shapes and no numbers: nothing is computed, and nothing
allocated. FLOPs of products are those of torch's own formulas (`torch.utils.flop_counter`), with ours for ops that it does not know and
for attention, of which only the pairs that see each other count.
"""

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from treetune.core.grad import tensors

# Ops that give another view of a tensor, or memory that is not written yet: nothing is read, and nothing launched.
FREE = frozenset({
    "alias", "as_strided", "detach", "diagonal", "empty", "empty_like", "empty_permuted", "empty_strided", "expand", "is_same_size",
    "lift_fresh", "_local_scalar_dense", "narrow", "new_empty", "new_empty_strided", "permute", "promote_types", "real", "reshape",
    "_reshape_alias", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "_unsafe_view",
    "unsqueeze", "view", "view_as_complex", "view_as_real",
})  # fmt: skip
MESSAGE = "message along "  # what ranks send one another, by axis
LOOKED_UP = frozenset({"embedding", "index", "index_select", "gather"})  # of the source only what comes out is read
WRITTEN = frozenset({"zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "zero_", "fill_", "arange"})
ATTENTION = frozenset({"aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_fused_attention_overrideable"})


class Cost(NamedTuple):
    """flops of matrix products and attention; bytes read and written; launches of kernels."""

    flops: float = 0.0
    bytes: float = 0.0
    launches: float = 0.0

    def plus(self, other: "Cost", times: float = 1.0) -> "Cost":
        """The sum with `times` another."""
        return Cost(*(mine + times * theirs for mine, theirs in zip(self, other, strict=True)))


class Live:
    """Bytes of the tensors that are there now, and the most that there were, by part of the computation.

    Of the backward pass the first and the second half are parts of their own: activations go and gradients come.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        self.held = 0
        self.peaks: dict[str, float] = {}
        self._part, self._course = "before", [0]
        self._seen: dict[int, int] = {}
        for tensor in known:
            self.watch(tensor)

    @property
    def peak(self) -> float:
        """The most bytes at once."""
        return max([*self.peaks.values(), *self._course])

    def enter(self, part: str) -> None:
        """Begin a part of the computation."""
        middle = (len(self._course) + 1) // 2
        halves = {"": self._course}
        if self._part == "backward":
            halves = {" begins": self._course[:middle], " ends": self._course[middle:]}
        for name, course in halves.items():
            self.peaks[self._part + name] = max(self.peaks.get(self._part + name, 0), *course, 0)
        self._part, self._course = part, [self.held]

    def watch(self, tensor: Tensor) -> None:
        """Count the memory of a tensor from now until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            weakref.finalize(storage, self._gone, key)
            self._seen[key] = storage.nbytes()
            self.held += self._seen[key]
            self._course.append(self.held)

    def _gone(self, key: int) -> None:
        self.held -= self._seen.pop(key)


class Census(TorchDispatchMode):
    """Counts what runs inside: `by` the cost of each op by name, `live` the memory of it and of the tensors that are known before."""

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.by: dict[str, Cost] = {}
        self.live = Live(known)

    @property
    def total(self) -> Cost:
        """The cost of all ops."""
        return total(self.by.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op and count it."""
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # what it does to the part of this rank comes here
        kwargs, schema = kwargs or {}, func._schema
        shape_of = _nothing if schema.name.startswith("aten::_fused_ad") else SHAPES.get((schema.name, schema.overload_name))
        out = func(*args, **kwargs) if shape_of is None else shape_of(args)
        for tensor in tensors(out):
            self.live.watch(tensor)
        name = schema.name.partition("::")[2]
        if name not in FREE and func.namespace != "prim":
            self.add(name, Cost(flops_of(func, args, kwargs, out), _bytes(name, (args, kwargs), out), 1))
        return out

    def told(self, name: str, args: tuple) -> None:
        """Count a kernel that is not launched: each of its tensors is read or written once. `ops.backend.counting` calls this."""
        moved = {id(tensor): size(tensor) for tensor in tensors(args)}
        self.add(name, Cost(KERNELS[name](args) if name in KERNELS else 0.0, sum(moved.values()), 1))

    def sent(self, axis: str, size: float) -> None:
        """Count a message along an axis of a mesh, with the bytes that pass the link."""
        self.add(MESSAGE + axis, Cost(bytes=size, launches=1))

    def add(self, name: str, cost: Cost) -> None:
        """Count a cost by name."""
        self.by[name] = self.by.get(name, Cost()).plus(cost)


def total(costs: Iterable[Cost]) -> Cost:
    """The sum of costs."""
    out = Cost()
    for cost in costs:
        out = out.plus(cost)
    return out


def size(tensor: Tensor) -> int:
    """Bytes of the numbers of a tensor; one that is expanded has its numbers once."""
    return tensor.element_size() * math.prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step != 0)


def _bytes(name: str, inputs: Any, out: Any) -> int:
    """Bytes that an op reads and writes: its inputs once and its results once; one that changes a tensor in place does both to it."""
    results = sum(size(tensor) for tensor in tensors(out))
    if name in WRITTEN:
        return results
    return 2 * results if name in LOOKED_UP else results + sum(size(tensor) for tensor in tensors(inputs))


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    """FLOPs of an op: 2 for each product that is summed; 0 for an op without such."""
    name, packet = func._schema.name, func._overloadpacket
    if name.removesuffix("_backward") in ATTENTION:
        named = dict(zip([arg.name for arg in func._schema.arguments], args, strict=False)) | kwargs
        n, m = named["query"].shape[-2], named["key"].shape[-2]
        # Of a causal one each query meets those up to itself.
        pairs = n * (n + 1) / 2 if named.get("is_causal") else n * m
        widths = named["query"].shape[-1], named["value"].shape[-1]
        return attention_flops(math.prod(named["query"].shape[:-2]) * pairs, *widths, backward=name.endswith("_backward"))
    if name in PRODUCTS:
        return PRODUCTS[name](args)
    if name == "aten::addmm_":
        return 2.0 * math.prod(args[1].shape) * args[2].shape[1]
    return float(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0.0


def attention_flops(pairs: float, key_width: int, value_width: int, *, backward: bool) -> float:
    """FLOPs of all pairs of all heads: scores and values; backwards scores again, and the gradients of scores, values, queries and keys."""
    return 2.0 * pairs * (3 * key_width + 2 * value_width if backward else key_width + value_width)


def _rows_by_weight(args: Any) -> float:
    weight = args[1] if args[1].shape[1] == args[0].shape[1] and not _shaped_like_sum(args) else args[2]
    return 2.0 * math.prod(args[0].shape) * weight.shape[0]


def _shaped_like_sum(args: Any) -> bool:
    """Whether the second argument is what is added, and the third the weight."""
    return len(args) > 2 and isinstance(args[2], Tensor) and args[2].ndim == 2


def _grouped(args: Any) -> float:
    """x [N, I] by stacks [E, I, O], or g^T [O, N] by x [N, I] in groups of N: each row meets one matrix."""
    return 2.0 * math.prod(args[0].shape) * args[1].shape[-1]


def _product_like(args: Any) -> Tensor:
    return args[0].new_empty(*args[0].shape[:-1], args[2].shape[0])


def _nothing(args: Any) -> None:
    """The result of an optimiser's kernel, which torch would run on numbers."""


# Results of ops that torch has no rule of shapes for.
SHAPES: dict[tuple[str, str], Callable[[Any], Tensor]] = {("mkldnn::_linear_pointwise", "binary"): _product_like}
PRODUCTS: dict[str, Callable[[Any], float]] = {"mkldnn::_linear_pointwise": _rows_by_weight, "aten::_grouped_mm": _grouped}
KERNELS: dict[str, Callable[[Any], float]] = {
    "attention": lambda args: attention_flops(args[-1], args[0].shape[-1], args[2].shape[-1], backward=False),
    "attention_backward": lambda args: attention_flops(args[-1], args[0].shape[-1], args[2].shape[-1], backward=True),
    "_rows_kernel": lambda args: 2.0 * math.prod(args[0].shape) * args[1].shape[1],
    "_outer_kernel": lambda args: 2.0 * math.prod(args[0].shape) * args[1].shape[1],
}
