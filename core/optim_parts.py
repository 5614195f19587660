"""Weights that are whole on every rank while each rank updates a part of them, with the moments of that part only (ZeRO stages 1 and 2).

A part is the rows of a leaf that fully sharded training would give the rank, as a DTensor over the memory of the whole leaf: what
changes a part changes the leaf. After an update the ranks send one another the parts that they have changed.
Source: Rajbhandari et al., arXiv 1910.02054, sections 5.1 and 5.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from treetune.core import copies, grad, messages, shard, tree
from treetune.core.optimizer import Optimizer
from treetune.core.state import OptState, Params

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

MESSAGE = 2**28  # bytes of the largest message, unless a leaf alone is larger


def parts(params: Params, mesh: DeviceMesh) -> Params:
    """The part of each leaf that this rank updates, sharing its memory; a number without a dimension is whole on every rank."""
    return tree.map(lambda leaf: part(leaf, mesh), params)


def part(leaf: Tensor, mesh: DeviceMesh) -> Tensor:
    """The rows of a whole leaf that are this rank's, as a DTensor over the same memory."""
    if shard.distributed(leaf) or not leaf.ndim:
        return leaf
    from torch.distributed.tensor import DTensor, Shard

    count, rank = leaf.shape[0], mesh.get_local_rank()
    size = -(-count // mesh.size())  # as `torch.chunk` deals rows
    own = leaf.detach()[min(count, rank * size) : min(count, (rank + 1) * size)]
    return DTensor.from_local(own, mesh, (Shard(0),), shape=leaf.shape, stride=leaf.stride(), run_check=False)


def parted(optimizer: Optimizer, mesh: DeviceMesh) -> Optimizer:
    """The optimiser with moments of this rank's part of each leaf only; weights are whole before and after an update.

    Gradients may be whole or parts. Each call is a collective.
    """

    def init(params: Params) -> OptState:
        return optimizer.init(parts(params, mesh))

    @torch.no_grad()
    def update(grads: Params, state: OptState, params: Params, lr: Tensor, found_inf: Tensor | None = None) -> tuple[Params, OptState]:
        _, state = optimizer.update(parts(grads, mesh), state, parts(params, mesh), lr, found_inf)
        share([leaf for leaf in tree.leaves(params) if leaf.ndim], mesh)
        return params, state

    @torch.no_grad()
    def averaged(params: Params, state: OptState) -> Params:
        assert optimizer.averaged is not None
        return tree.map(shard.full, optimizer.averaged(parts(params, mesh), state))

    return optimizer._replace(init=init, update=update, averaged=averaged if optimizer.averaged is not None else None)


def share(leaves: Sequence[Tensor], mesh: DeviceMesh) -> None:
    """Write into whole leaves the rows of the other ranks, as those have them: one message for many leaves."""
    for chosen in _messages(leaves):
        own = [shard.local(part(leaf, mesh)) for leaf in chosen]
        message = messages.Gather(own, _layout(chosen, mesh), mesh.get_group())
        torch._foreach_copy_([leaf.detach() for leaf in chosen], message.wait())


def collecting(mesh: DeviceMesh) -> grad.Collect:
    """What has `grad.value_and_grad` sum gradients over ranks as they arrive in the backward pass, each rank keeping those of its parts.

    The leaves of a layer are one message, which goes when the gradients of all of them are there.
    """
    return partial(_Arriving, mesh)


class _Arriving:
    """Groups of leaves whose gradients are one message each, which go in the same order on all ranks, whatever arrives first."""

    def __init__(self, mesh: DeviceMesh, leaves: Sequence[tuple[str, Tensor]], before: Sequence[Tensor | None]):
        self._leaves, self._totals, self._mesh = [leaf for _, leaf in leaves], list(before), mesh
        split = [i for i, (_, leaf) in enumerate(leaves) if leaf.ndim]
        for i, (_, leaf) in enumerate(leaves):
            if leaf.ndim:
                copies.on_arrival(leaf, self._arrived, i)
            else:
                leaf.grad = before[i]  # whole, to be summed at the end
        self._groups, self._missing = copies.groups(leaves, split), set(split)
        self._sent = list[tuple[list[int], messages.Sum]]()

    def add(self, i: int, part: Tensor, /, *, last: bool) -> None:
        """Of leaves that travel, which whole ones do not."""
        raise AssertionError("a whole leaf has no parts that travel")

    def _arrived(self, i: int) -> None:
        self._missing.discard(i)
        while self._groups and not self._missing.intersection(self._groups[0]):
            self._send(self._groups.pop(0))

    def _send(self, group: list[int]) -> None:
        """Send the gradients of a group, and take in the sums of the one before, which has travelled meanwhile."""
        leaves = [self._leaves[i] for i in group]
        dtype = torch.float64 if any(leaf.dtype == torch.float64 for leaf in leaves) else torch.float32
        plan = messages.layout(tuple((dtype, tuple(leaf.shape)) for leaf in leaves), self._mesh.size())
        message = messages.Sum([leaf.grad for leaf in leaves], plan, self._mesh.get_group(), leaves[0].device)
        for leaf in leaves:
            leaf.grad = None
        self._take_in()
        self._sent.append((group, message))

    def _take_in(self) -> None:
        for group, message in self._sent:
            for i, own in zip(group, message.wait(), strict=True):
                if (total := self._totals[i]) is None:
                    self._totals[i] = shard.rewrap(own, part(self._leaves[i].detach(), self._mesh))
                else:
                    shard.local(total).add_(own)
        self._sent.clear()

    def collected(self) -> list[Tensor]:
        """The totals, once the backward pass is over: the gradient of a leaf that nothing has used is 0."""
        while self._groups:
            self._send(self._groups.pop(0))
        self._take_in()
        known = zip(self._leaves, self._totals, strict=True)
        alone = [total if leaf.ndim else leaf.grad for leaf, total in known]
        return [torch.zeros_like(leaf) if one is None else one for leaf, one in zip(self._leaves, alone, strict=True)]


def _layout(leaves: Sequence[Tensor], mesh: DeviceMesh) -> messages.Layout:
    return messages.layout(tuple((leaf.dtype, tuple(leaf.shape)) for leaf in leaves), mesh.size())


def _messages(leaves: Sequence[Tensor]) -> list[list[Tensor]]:
    """Leaves in their order, cut where a message would be too large."""
    out, size = list[list[Tensor]](), 0
    for leaf in leaves:
        if not out or size + leaf.nbytes > MESSAGE:
            out.append([])
            size = 0
        out[-1].append(leaf)
        size += leaf.nbytes
    return out
