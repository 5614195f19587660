"""Placement of trees on a device mesh: a leaf is plain (whole on every rank) or a DTensor (sharded).

Legend: `axis` is a mesh axis, `dim` a tensor dimension. Data-parallel training keeps leaves plain and sums gradients
once a step; fully sharded training (ZeRO-3) shards every leaf on the data axis and gathers it at the top of each layer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor

from treetune.core import quant, tree, window
from treetune.core.param import Param, Params
from treetune.core.window import Coming

if TYPE_CHECKING:  # torch.distributed.tensor takes half a second to import, and a run on one device never needs it
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

# Parameter axis -> mesh axis, in order of preference; the first dimension of a leaf that has a rule is sharded.
FULLY_SHARDED: Mapping[str, str] = {
    "vocab": "data", "heads": "data", "kv_heads": "data", "mlp": "data", "embed": "data", "rank": "data", "head_dim": "data",
    "expert": "data",
}  # fmt: skip

# Mesh axes along which ranks have different rows, from the outermost.
ROWS = ("replicate", "data")
# Those over which gradients are summed: ranks along `context` have different tokens of the same rows.
SUMMED = ("replicate", "context", "data")


TENSOR = "tensor"  # the axis along which layers are split: `gather` joins the parts of a leaf along all others


def mesh(device_type: str, **sizes: int) -> DeviceMesh:
    """A named device mesh, `mesh("cuda", replicate=2, data=8)`; needs torch.distributed to be initialised (torchrun does)."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def placements(abstract: Params, device_mesh: DeviceMesh, rules: Mapping[str, str]) -> Params:
    """A tree of DTensor placements: each mesh axis shards the first dimension whose axis name maps to it."""
    from torch.distributed.tensor import Replicate, Shard

    names = device_mesh.mesh_dim_names or ()

    def one(param: Param) -> tuple:
        axes = [rules.get(axis) for axis in param.axes]
        return tuple(Shard(axes.index(name)) if name in axes else Replicate() for name in names)

    return tree.map(one, abstract)


def splitting(device_mesh: DeviceMesh) -> DeviceMesh:
    """The part of a mesh whose ranks split leaves among them: along `replicate` and `context` the same parts are held."""
    return device_mesh["data"]


def holding(device_mesh: DeviceMesh | None, sharding: str) -> DeviceMesh | None:
    """The part of a mesh whose ranks have different parts of the weights: along `tensor`, and along `data` where they are fully sharded.

    None where each rank has all of them.
    """
    axes = [axis for axis in (TENSOR, "data") if _has(device_mesh, axis) and (axis == TENSOR or sharding == "full")]
    return cast(Any, device_mesh)[tuple(axes) if len(axes) > 1 else axes[0]] if axes else None


def distributed(leaf: Tensor) -> TypeGuard[DTensor]:
    """Whether a leaf is a DTensor."""
    return hasattr(leaf, "placements")


def sharded(leaf: Tensor) -> bool:
    """Whether a leaf is a DTensor of which each rank holds a part."""
    return distributed(leaf) and any(spec.is_shard() for spec in leaf.placements)


def mesh_of(leaf: Any) -> DeviceMesh | None:
    """The mesh whose ranks have parts of a leaf; None where each has it whole."""
    return leaf.device_mesh if sharded(leaf := _placed(leaf)) else None


def _placed(leaf: Any) -> Any:
    """The tensor that is placed as a leaf is: of a quantised one its codes."""
    return leaf.codes if quant.quantised(leaf) else leaf


def axes(leaf: Any) -> tuple[str, ...]:
    """The axes of the mesh that a leaf is placed on; none of a plain one."""
    leaf = _placed(leaf)
    return tuple(leaf.device_mesh.mesh_dim_names or ()) if distributed(leaf) else ()


def split_axes(leaf: Any) -> tuple[str, ...]:
    """Those along which ranks have different parts of a leaf."""
    leaf = _placed(leaf)
    return tuple(name for name, spec in zip(axes(leaf), leaf.placements, strict=True) if spec.is_shard()) if distributed(leaf) else ()


def distribute(leaf: Any, device_mesh: DeviceMesh, spec: tuple) -> Tensor:
    """A whole leaf, the same on every rank, as a DTensor with the given placements; a quantised one has such tensors.

    One that is distributed already is as it is, or gets these placements.
    """
    if quant.quantised(leaf):
        from treetune.core import quant_split  # which is made of this module

        return cast(Any, quant_split.distribute(leaf, device_mesh, spec))
    if distributed(leaf):
        return leaf if tuple(leaf.placements) == tuple(spec) else leaf.redistribute(placements=spec)
    from torch.distributed.tensor import distribute_tensor

    # No source rank: a broadcast would send every weight once more, and all ranks have read the same files.
    return distribute_tensor(leaf, device_mesh, spec, src_data_rank=None)


def gather(leaf: Any, dtype: torch.dtype | None = None) -> Tensor:
    """The whole leaf as a plain tensor, cast to `dtype`; its gradient is summed over ranks and scattered back.

    Of one that is split along `tensor` it is the part of this rank's layers, the same on all ranks of the other axes. A quantised leaf
    becomes dense; one that is away comes to the device.
    """
    if window.coming(leaf):
        return remember(gather(leaf.here(), dtype), leaf)
    if quant.quantised(leaf):
        from treetune.core import gathers, quant_split

        return remember(quant.dense(quant_split.own(leaf, gathers.together), dtype), leaf)
    if not leaf.is_floating_point():
        dtype = None  # indices, which a cast could change
    if not distributed(leaf):
        return leaf if dtype is None or leaf.dtype == dtype else leaf.to(dtype)
    from treetune.core import gathers  # which is made of this module

    if gathers.travels(leaf):
        return remember(gathers.gather(leaf, dtype), leaf.detach())
    from torch.distributed.tensor import Partial, Replicate

    leaf = here(leaf)
    names = leaf.device_mesh.mesh_dim_names or ("",) * leaf.device_mesh.ndim
    axes = [spec if name == TENSOR else Replicate() for name, spec in zip(names, leaf.placements, strict=True)]
    # Along `tensor` each rank has the gradient of its own part, or all that of the whole leaf, equal on all of them.
    # Partial: what arrives in the backward pass is this rank's share of the gradient, to be summed over ranks and scattered. The cast
    # comes after, so that the sum is made in the dtype of the leaf: float32 masters sum in float32 whatever the compute dtype. Those of
    # leaves in 16 bits are sent in float32, and rounded once.
    wide = torch.float32 if leaf.itemsize < 4 else None
    grads = [spec if name == TENSOR else Partial() for name, spec in zip(names, axes, strict=True)]
    placed = leaf if list(leaf.placements) == axes else leaf.redistribute(placements=axes, backward_dtype=wide)
    whole = placed.to_local(grad_placements=grads)
    return remember(whole if dtype is None or whole.dtype == dtype else whole.to(dtype), leaf.detach())


def whole(leaf: Any, dtype: torch.dtype | None = None) -> Tensor:
    """`gather` of all of a leaf, also where the layers of ranks have parts of it, which takes no gradient then."""
    if not split_along(leaf, TENSOR):
        return gather(leaf, dtype)
    every: Any = full(leaf)
    return quant.dense(every, dtype) if quant.quantised(every) else every if dtype is None else every.to(dtype)


def remember(whole: Tensor, leaf: Tensor | quant.Quantised | Coming) -> Tensor:
    """A whole tensor, and inside `gathering_again` what it was made of."""
    if _gathered:
        _gathered[-1][whole.untyped_storage()._cdata] = (whole, leaf)
    return whole


# Of the innermost `gathering_again`: {storage: (whole leaf, what it was made of)}. It holds the leaves, so that no number is used twice.
_gathered: list[dict[int, tuple[Tensor, Any]]] = []


@contextlib.contextmanager
def gathering_again(params: Params) -> Iterator[None]:
    """Inside, what `gather` makes of sharded, quantised or absent `params` is not kept for the backward pass, which makes it once more.

    Without it a model that is not rematerialised would be whole and dense on every rank by the end of its forward pass.
    """
    if not torch.is_grad_enabled() or not any(_made(leaf) for leaf in tree.leaves(params)):
        yield
        return
    _gathered.append({})
    try:
        with torch.autograd.graph.saved_tensors_hooks(without_whole, with_whole):
            yield
    finally:
        _gathered.pop()


def _made(leaf: Any) -> bool:
    """Whether `gather` makes a tensor that is not the leaf."""
    return quant.quantised(leaf) or window.coming(leaf) or sharded(leaf)


class _Again(NamedTuple):
    """A view of a whole leaf, as what that is made of and the view's geometry."""

    leaf: Tensor | quant.Quantised | Coming
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def without_whole(saved: Tensor) -> Tensor | _Again:
    """A tensor that autograd saves, or what it is made of again where it is a whole leaf inside `gathering_again`."""
    entry = None if distributed(saved) or not _gathered else _gathered[-1].get(saved.untyped_storage()._cdata)
    return saved if entry is None else _Again(entry[1], saved.dtype, tuple(saved.shape), saved.stride(), int(saved.storage_offset()))


def with_whole(saved: Any) -> Any:
    """A whole leaf of what `without_whole` made of it; anything else as it is."""
    if not isinstance(saved, _Again):
        return saved
    with torch.no_grad():
        return gather(saved.leaf, saved.dtype).as_strided(saved.shape, saved.stride, saved.offset)


def gather_all(params: Params, dtype: torch.dtype | None = None) -> Params:
    """`gather` for every leaf of a (small) tree."""
    return tree.map(lambda leaf: gather(leaf, dtype), params)


def split_along(leaf: Any, axis: str) -> bool:
    """Whether the ranks along an axis of a mesh have different parts of a leaf."""
    return axis in split_axes(leaf)


def own(leaf: Any) -> Tensor:
    """What the layers of this rank compute with, detached: the whole leaf, or this rank's part of one that is split along `tensor`."""
    return gather(leaf).detach() if split_along(leaf, TENSOR) else full(leaf)


def local(leaf: Tensor) -> Tensor:
    """The part of a leaf that lives on this rank; shares storage with it. Of a quantised one its tensors."""
    return cast(Any, leaf.moved(local)) if quant.quantised(leaf) else leaf.to_local() if distributed(leaf) else leaf


def rewrap(leaf: Tensor, like: Tensor) -> Tensor:
    """A local tensor with the sharding of `like`, where it is: also in the memory of the host beside a mesh of GPUs."""
    if not distributed(like):
        return cast(Any, leaf)
    from torch.distributed.tensor import DTensor

    if away(leaf, like.device_mesh):  # which from_local would bring to the device
        from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

        meta = TensorMeta(like.shape, like.stride(), leaf.dtype)
        return DTensor(leaf, DTensorSpec(like.device_mesh, like.placements, tensor_meta=meta), requires_grad=False)
    # run_check would be a collective for every leaf.
    return DTensor.from_local(leaf, like.device_mesh, like.placements, shape=like.shape, stride=like.stride(), run_check=False)


def away(part: Tensor, device_mesh: DeviceMesh) -> bool:
    """Whether a tensor is in the memory of the host beside a mesh of GPUs."""
    return part.device.type == "cpu" and device_mesh.device_type != "cpu"


def here(leaf: Tensor) -> Tensor:
    """A leaf whose part is on the device of its mesh."""
    if not distributed(leaf) or not away(local(leaf), leaf.device_mesh):
        return leaf
    return rewrap(local(leaf).to(leaf.device_mesh.device_type), leaf)


def like(fn: Callable[[Tensor], Tensor], leaf: Tensor) -> Tensor:
    """Apply `fn` to the local part of a leaf and keep the leaf's sharding."""
    return rewrap(fn(local(leaf)), leaf)


def first_places(leaf: Tensor) -> tuple[int, ...]:
    """Where this rank's part of a leaf begins along each dimension."""
    if not distributed(leaf):
        return (0,) * leaf.ndim
    return part_of(tuple(leaf.shape), leaf.device_mesh, leaf.placements)[1]


def part_of(shape: tuple[int, ...], device_mesh: DeviceMesh, specs: Sequence[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of this rank's part of a leaf, and where it begins along each dimension, as `torch.chunk` deals rows of each axis in turn.

    torch's own `compute_local_shape_and_global_offset` reads numbers of a tensor, which a planned run has not.
    """
    own, first = list(shape), [0] * len(shape)
    for axis, spec in enumerate(specs):
        if spec.is_shard():
            size = own[spec.dim]
            most = -(-size // device_mesh.size(axis))
            begin = min(size, most * device_mesh.get_local_rank(axis))
            own[spec.dim], first[spec.dim] = min(most, size - begin), first[spec.dim] + begin
    return tuple(own), tuple(first)


def parts(leaf: Tensor) -> int:
    """Into how many parts a leaf is split."""
    if not distributed(leaf):
        return 1
    return math.prod(leaf.device_mesh.size(axis) for axis, spec in enumerate(leaf.placements) if spec.is_shard())


def full(leaf: Tensor) -> Tensor:
    """The whole leaf, detached, on every rank (a collective for a sharded leaf); a quantised one stays so."""
    if quant.quantised(leaf):
        from treetune.core import quant_split

        return cast(Any, quant_split.whole(leaf))
    leaf = here(leaf.detach())
    if not distributed(leaf):
        return leaf
    if len(split_axes(leaf)) > 1:
        from torch.distributed.tensor import Replicate

        # One axis after another, from the innermost: torch warns of several messages at once.
        specs = list(leaf.placements)
        for number in reversed(range(len(specs))):
            specs[number] = Replicate()
            leaf = leaf.redistribute(placements=specs)
    return leaf.full_tensor()


def size(device_mesh: DeviceMesh | None, axis: str) -> int:
    """Ranks along an axis; 1 where the mesh does not have it."""
    return 1 if not _has(device_mesh, axis) else cast(Any, device_mesh)[axis].size()


def _has(device_mesh: DeviceMesh | None, axis: str) -> bool:
    return device_mesh is not None and axis in (device_mesh.mesh_dim_names or ())


def world(device_mesh: DeviceMesh | None) -> int:
    """Number of ranks with different rows; 1 without a mesh."""
    return math.prod(size(device_mesh, axis) for axis in ROWS)


def row_rank(device_mesh: DeviceMesh) -> int:
    """The number of this rank among those with different rows: the one along `data` counts fastest."""
    number = 0
    for axis in ROWS:
        number = number * size(device_mesh, axis) + (device_mesh.get_local_rank(axis) if _has(device_mesh, axis) else 0)
    return number


def all_sum(tensors: list[Tensor], device_mesh: DeviceMesh | None, axes: Sequence[str] = ROWS) -> list[Tensor]:
    """Sum each tensor over ranks with different rows, or over axes of the mesh, in one message per dtype and axis.

    Axes that the mesh does not have are left out: the identity without a mesh.
    """
    groups = [device_mesh.get_group(axis) for axis in reversed(axes) if _has(device_mesh, axis)] if device_mesh is not None else []
    if not groups or not tensors:
        return tensors
    out = list(tensors)
    # In order of first appearance, which all ranks share; the order of a set differs between processes, and collectives would mix up.
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        chosen = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = torch.cat([tensors[i].reshape(-1) for i in chosen])
        for group in groups:
            dist.all_reduce(flat, group=group)
        for i, part in zip(chosen, flat.split([tensors[i].numel() for i in chosen]), strict=True):
            out[i] = part.view_as(tensors[i])
    return out


def all_reduce(value: Tensor, how: str, device_mesh: DeviceMesh | None, axes: Sequence[str] = ROWS) -> Tensor:
    """Reduce one tensor over ranks with different rows, or over axes of the mesh; `how` is "sum", "min" or "max"."""
    if device_mesh is None:
        return value
    value = value.clone()
    for axis in reversed(axes):
        if _has(device_mesh, axis):
            dist.all_reduce(value, op=getattr(dist.ReduceOp, how.upper()), group=device_mesh.get_group(axis))
    return value


def all_rows(values: Tensor, device_mesh: DeviceMesh | None) -> Tensor:
    """The values [n] of all ranks with different rows, end to end; ranks may have different n."""
    for axis in reversed(ROWS):
        if device_mesh is not None and _has(device_mesh, axis):
            values = _rows_along(values, device_mesh.get_group(axis))
    return values


def _rows_along(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    counts = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(group.size())]
    dist.all_gather(counts, torch.tensor([len(values)], device=values.device), group=group)
    longest = int(torch.stack(counts).max())  # all_gather takes equal shapes only
    parts = [values.new_zeros(longest) for _ in counts]
    dist.all_gather(parts, torch.nn.functional.pad(values, (0, longest - len(values))), group=group)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def any_flag(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank."""
    seen = torch.tensor(float(flag), device=device)
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    return bool(seen)
