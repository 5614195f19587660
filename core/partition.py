"""Leaves that are split among ranks as they are read, so that no rank ever holds the model.

A rank keeps the rows of each leaf that `torch.chunk` gives it along the first dimension, as in fully sharded training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from treetune.core import quant, shard, tree
from treetune.core.param import Param, Params

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Partition(NamedTuple):
    """How leaves are split: over the ranks of a mesh. Quantised leaves, and numbers without a dimension, stay whole on every rank."""

    device_mesh: DeviceMesh

    def placements(self, shape: tuple[int, ...]) -> tuple:
        """Those of a leaf of this shape."""
        leaf = {"": Param(tuple(shape), axes=("embed",) * len(shape))}
        return shard.placements(leaf, self.device_mesh, shard.FULLY_SHARDED)[""]

    def rows(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The first row of a leaf that this rank holds, and the one behind its last."""
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        own, first = compute_local_shape_and_global_offset(torch.Size(shape), self.device_mesh, self.placements(shape))
        return first[0], first[0] + own[0]

    def split(self, leaf: Any) -> Any:
        """This rank's part of a leaf that it has whole, as all ranks do."""
        return shard.distribute(leaf, self.device_mesh, self.placements(leaf.shape))

    def joined(self, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The leaf of a shape of which this rank has these rows, those of `rows`."""
        from torch.distributed.tensor import DTensor

        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(rows, self.device_mesh, self.placements(shape), shape=torch.Size(shape), stride=stride, run_check=False)


def of(device_mesh: DeviceMesh | None, sharding: str) -> Partition | None:
    """The partition of a run; None where every rank has whole leaves."""
    return None if device_mesh is None or sharding == "none" else Partition(device_mesh)


def changed(change: Callable[[Tensor], Tensor], leaf: Tensor) -> Tensor:
    """A leaf with another first dimension, change(whole leaf), split as it was: whole for that moment only."""
    if not shard.distributed(leaf):
        return change(leaf)
    return shard.distribute(change(shard.full(leaf)), leaf.device_mesh, leaf.placements)


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
    index, own = quant.places(leaf.numel()), shard.local(leaf).detach().reshape(-1)
    first = shard.first_places(leaf)[0] * (leaf.numel() // max(leaf.shape[0], 1))
    here = (index >= first) & (index < first + own.numel())
    bits = torch.zeros(len(index), dtype=torch.int32)
    # As bits, of which all ranks but one have none: a sum of numbers would lose the sign of a zero.
    bits[here] = own[(index[here] - first).to(own.device)].cpu().to(torch.bfloat16).view(torch.int16).int()
    return shard.all_reduce(bits.to(leaf.device), "sum", leaf.device_mesh).cpu().to(torch.int16).view(torch.bfloat16)
