"""Weights that several ranks hold, whole or the same parts: gradients are summed a layer at a time while the backward pass goes on.

The leaves of a layer are one message, which goes when the gradients of all of them are there, in the same order on all ranks. Of several
micro-batches only the last one's pass sends: what it adds to is the gradient of all before.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from treetune.core import gathers, grad, shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def groups(leaves: Sequence[tuple[str, Tensor]], numbers: Sequence[int]) -> list[list[int]]:
    """The numbers of leaves that travel together, a layer or a leaf alone, in the order in which a backward pass has their gradients."""
    by_layer: dict[str, list[int]] = {}
    for i in numbers:
        path = leaves[i][0]
        layer = re.match(r"(.*?\blayers\.\d+)\.", path)
        by_layer.setdefault(layer[1] if layer else path, []).append(i)
    return list(reversed(by_layer.values()))


def on_arrival(leaf: Tensor, method: Callable[[int], None], i: int) -> None:
    """Have a backward pass call a bound method with a number once the gradient of a leaf is there."""
    weak = weakref.WeakMethod(method)  # what it is of holds the leaf: a cycle would keep gradients until Python looks for cycles

    def arrived(_: Tensor) -> None:
        if (alive := weak()) is not None:
            alive(i)

    leaf.register_post_accumulate_grad_hook(arrived)


def summing(mesh: DeviceMesh) -> grad.Collect:
    """What has `grad.value_and_grad` give gradients summed over all ranks of a mesh with tokens of their own."""
    return partial(_Summed, mesh)


class _Message(NamedTuple):
    """Gradients of some leaves, flat, on their way among the first of `over`, groups of ranks; the others follow, one after another."""

    leaves: list[int]
    flat: Tensor
    over: list[Any]
    work: Any


class _Summed(grad.Plain):
    """Totals that are summed as they arrive: of whole leaves over all ranks, of parts over those that hold the same."""

    def __init__(self, mesh: DeviceMesh, items: Sequence[tuple[str, Tensor]], before: Sequence[Tensor | None]):
        super().__init__(items, before)
        self._over = {i: over for i, leaf in enumerate(self.leaves) if (over := _beyond(leaf, mesh))}
        travelling = any(gathers.travels(leaf) for leaf in self.leaves)
        # Beside leaves that travel all would have to arrive in one order on all ranks, also what some ranks have no gradient of: of whole
        # leaves, which go last. So it would beside keys and values, which travel among ranks that share a stream.
        late = [i for i in self._over if travelling and not gathers.travels(self.leaves[i])]
        self._groups, self._late = groups(items, [i for i in self._over if i not in late]), groups(items, late)
        self._early = shard.size(mesh, "context") == 1
        self._missing = set(self._over)
        self._sent: list[_Message] = []
        for i in self._over:
            if not gathers.travels(self.leaves[i]):  # those are added; autograd calls hooks of theirs with nothing
                on_arrival(self.leaves[i], self._arrived, i)

    def add(self, i: int, part: Tensor, /, *, last: bool) -> None:
        """Add this rank's part of a gradient; the last one completes it."""
        super().add(i, part, last=last)
        if i in self._over:
            assert i in self._missing, "a gradient that came after its sum had been sent"
            if last:
                self._arrived(i)

    def _arrived(self, i: int) -> None:
        self._missing.discard(i)
        while self._early and self._groups and not self._missing.intersection(self._groups[0]):
            self._send(self._groups.pop(0))

    @torch.no_grad()
    def _send(self, group: list[int]) -> None:
        """Send the gradients of a group, and take in or send on those before, which have travelled meanwhile."""
        self._take_in()
        kinds: dict[Any, list[int]] = {}
        for i in group:
            kinds.setdefault((self.total(i).dtype, *self._over[i]), []).append(i)
        for (_, *over), chosen in kinds.items():
            flat = torch.cat([shard.local(self.total(i)).reshape(-1) for i in chosen])
            if flat.numel():  # none of the ranks that hold the same has any
                self._sent.append(_begun(chosen, flat, over))

    @torch.no_grad()
    def _take_in(self) -> None:
        sent, self._sent = self._sent, []
        for chosen, flat, over, work in sent:
            work.wait()
            if len(over) > 1:
                self._sent.append(_begun(chosen, flat, over[1:]))
                continue
            totals = [self.total(i) for i in chosen]
            own = [shard.local(total) for total in totals]
            # Not in place: autograd may have given two leaves one memory.
            for i, total, like, part in zip(chosen, totals, own, flat.split([one.numel() for one in own]), strict=True):
                self.put(i, shard.rewrap(part.view(like.shape), total))

    def collected(self) -> list[Tensor]:
        """The totals, once the backward pass is over."""
        for group in [*self._groups, *self._late]:
            self._send(group)
        self._groups.clear()
        while self._sent:
            self._take_in()
        return super().collected()


def _begun(leaves: list[int], flat: Tensor, over: list[Any]) -> _Message:
    return _Message(leaves, flat, over, dist.all_reduce(flat, group=over[0], async_op=True))


def _beyond(leaf: Tensor, mesh: DeviceMesh) -> list[Any]:
    """The groups of ranks that hold the same part of a leaf and have tokens of their own."""
    return [mesh.get_group(axis) for axis in reversed(shard.SUMMED) if axis not in shard.axes(leaf) and shard.size(mesh, axis) > 1]
