"""Leaves that are split among ranks as they are read, so that no rank ever holds the model.

A rank keeps the rows of each leaf that `torch.chunk` gives it along the first dimension, as in fully sharded training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from treetune.core import quant, quant_split, shard, tree
from treetune.core.layer_offload import Put
from treetune.core.param import Params

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def whole(path: str) -> None:
    """The dimension along which a leaf is split among ranks of the axis `tensor`: none, of any leaf."""


class Partition(NamedTuple):
    """How leaves are split: along their first dimension over ranks of a mesh, and over those of its axis `tensor` along `dimension`(path).

    Numbers without a dimension stay whole on every rank. put: where parts of layers go as they are read, if not to the device.
    """

    device_mesh: DeviceMesh
    dimension: Callable[[str], int | None] = whole
    put: Put | None = None

    def placements(self, path: str, shape: tuple[int, ...]) -> tuple:
        """Those of a leaf of this shape."""
        from torch.distributed.tensor import Replicate, Shard

        names = self.device_mesh.mesh_dim_names or ("",) * self.device_mesh.ndim
        dims = [self.dimension(path) if name == shard.TENSOR else 0 for name in names]
        return tuple(Replicate() if dim is None or not shape else Shard(dim) for dim in dims)

    def box(self, path: str, shape: tuple[int, ...]) -> tuple[slice, ...] | None:
        """What of a leaf this rank holds, along its first dimensions; None where it holds all."""
        specs = self.placements(path, shape)
        dims = [spec.dim for spec in specs if spec.is_shard()]
        if not dims:
            return None
        own, first = shard.part_of(shape, self.device_mesh, specs)
        return tuple(slice(begin, begin + size) for begin, size in list(zip(first, own, strict=True))[: max(dims) + 1])

    def split(self, path: str, leaf: Any) -> Any:
        """This rank's part of a leaf that it has whole, as all ranks do. Errors: ValueError for a quantised one that does not divide."""
        specs = self.placements(path, tuple(leaf.shape))
        # Autograd would keep each leaf that is whole along every axis as one that is distributed.
        if not any(spec.is_shard() for spec in specs):
            return leaf
        dim, size = self.dimension(path), shard.size(self.device_mesh, shard.TENSOR)
        if quant.quantised(leaf) and dim is not None and size > 1 and (reason := quant_split.refusal(leaf, dim, size)):
            raise ValueError(f"shard tensor={size} does not fit {path}: {reason}; give quant int8, or data instead of tensor")
        return shard.distribute(leaf, self.device_mesh, specs)

    def joined(self, path: str, part: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The leaf of a shape of which this rank has this part, that of `box`."""
        from torch.distributed.tensor import DTensor

        stride, specs = torch.empty(shape, device="meta").stride(), self.placements(path, shape)
        return DTensor.from_local(part, self.device_mesh, specs, shape=torch.Size(shape), stride=stride, run_check=False)


def of(device_mesh: DeviceMesh | None, sharding: str, dimension: Callable[[str], int | None] = whole) -> Partition | None:
    """The partition of a run; None where every rank has whole leaves."""
    mesh = shard.holding(device_mesh, sharding)
    return None if mesh is None else Partition(mesh, dimension)


def changed(change: Callable[[Tensor], Tensor], leaf: Tensor) -> Tensor:
    """A leaf with another first dimension, change(whole leaf), split as it was: whole for that moment only."""
    if not shard.distributed(leaf):
        return change(leaf)
    return shard.distribute(change(shard.full(leaf)), leaf.device_mesh, leaf.placements)


def placed_on(device_mesh: DeviceMesh, fn: Callable[[Tensor], Tensor], leaf: Any) -> Tensor:
    """`fn` of this rank's part of a leaf, split on the same axes of another mesh of the same ranks."""
    from torch.distributed.tensor import DTensor

    names: Any = shard.axes(leaf)
    where = device_mesh[names if len(names) > 1 else names[0]]
    return DTensor.from_local(fn(shard.local(leaf)), where, leaf.placements, shape=leaf.shape, stride=leaf.stride(), run_check=False)


def gathered(params: Params, *, keep: bool) -> Params:
    """Whole leaves, one after another, a collective where they are sharded; None in place of each on ranks that do not keep them."""

    def one(leaf: Tensor) -> Tensor | None:
        whole = shard.full(leaf)
        return whole if keep else None

    return tree.map(one, params)


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two leaves of one placement have the same numbers: a collective where they are sharded."""
    if not shard.sharded(one):
        return torch.equal(one, other)
    same = torch.equal(shard.local(one), shard.local(other))
    return not shard.any_flag(not same, one.device)


def spread(leaf: Any) -> Tensor:
    """`quant.spread` of a leaf: a collective where it is sharded, of these few numbers."""
    if quant.quantised(leaf) or not shard.sharded(leaf):
        return quant.spread(leaf)
    own = shard.local(leaf).detach()
    places = torch.stack(torch.unravel_index(quant.places(leaf.numel()), tuple(leaf.shape)))  # [dimensions, n]
    places -= torch.tensor(shard.first_places(leaf))[:, None]
    here = ((places >= 0) & (places < torch.tensor(own.shape)[:, None])).all(0)
    bits = torch.zeros(places.shape[1], dtype=torch.int32)
    # As bits, of which all ranks but one have none: a sum of numbers would lose the sign of a zero.
    bits[here] = own[tuple(places[:, here].to(own.device))].cpu().to(torch.bfloat16).view(torch.int16).int()
    return (
        shard.all_reduce(bits.to(leaf.device), "sum", leaf.device_mesh, shard.split_axes(leaf)).cpu().to(torch.int16).view(torch.bfloat16)
    )
