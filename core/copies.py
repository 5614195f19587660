"""Weights that are whole on every rank: gradients are summed a layer at a time while the backward pass goes on.

The leaves of a layer are one message, which goes when the gradients of all of them are there, in the same order on all ranks. Of several
micro-batches only the last one's pass sends: what it adds to is the gradient of all before.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

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
    """What has `grad.value_and_grad` give gradients of whole leaves summed over all ranks of a mesh with tokens of their own."""
    over = [mesh.get_group(axis) for axis in reversed(shard.SUMMED) if shard.size(mesh, axis) > 1]
    return partial(_Summed, over, shard.size(mesh, "context") == 1)


class _Summed(grad.Plain):
    """Totals of which those of whole leaves are summed over groups of ranks as they arrive."""

    def __init__(self, over: Sequence[Any], early: bool, items: Sequence[tuple[str, Tensor]], before: Sequence[Tensor | None]):
        super().__init__(items, before)
        self._over = over
        whole = [i for i, leaf in enumerate(self.leaves) if not shard.distributed(leaf)]
        self._groups = groups(items, whole)
        self._missing = set(whole)
        # Beside leaves that travel everything would have to arrive in one order on all ranks, also what some ranks have no gradient of.
        # So it would beside keys and values, which travel among ranks that share a stream.
        self._early = early and not any(gathers.travels(leaf) for leaf in self.leaves)
        self._sent: list[tuple[list[int], Tensor, Any]] = []
        for i in whole:
            on_arrival(self.leaves[i], self._arrived, i)

    def _arrived(self, i: int) -> None:
        self._missing.discard(i)
        while self._early and self._groups and not self._missing.intersection(self._groups[0]):
            self._send(self._groups.pop(0))

    @torch.no_grad()
    def _send(self, group: list[int]) -> None:
        """Send the gradients of a group, and take in the sums of the one before, which has travelled meanwhile."""
        self._take_in()
        totals = [self.total(i) for i in group]
        for dtype in dict.fromkeys(total.dtype for total in totals):
            chosen = [i for i, total in zip(group, totals, strict=True) if total.dtype == dtype]
            flat = torch.cat([self.total(i).reshape(-1) for i in chosen])
            self._sent.append((chosen, flat, dist.all_reduce(flat, group=self._over[0], async_op=True) if self._over else None))

    @torch.no_grad()
    def _take_in(self) -> None:
        for chosen, flat, work in self._sent:
            if work is not None:
                work.wait()
            for over in self._over[1:]:
                dist.all_reduce(flat, group=over)
            leaves = [self.leaves[i] for i in chosen]
            # Not in place: autograd may have given two leaves one memory.
            for i, leaf, part in zip(chosen, leaves, flat.split([leaf.numel() for leaf in leaves]), strict=True):
                self.put(i, part.view(leaf.shape))
        self._sent.clear()

    def collected(self) -> list[Tensor]:
        """The totals, once the backward pass is over."""
        while self._groups:
            self._send(self._groups.pop(0))
        self._take_in()
        return super().collected()
