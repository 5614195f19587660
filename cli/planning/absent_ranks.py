"""Ranks that are not there, for a step that is counted on one process: they answer at once, and what they are sent is told.

What a backend holds of a message is held as long: gloo gathers into memory of its own before it fills that of the caller, and sums a copy.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist

from treetune.core import shard
from treetune.core.run.ranks import ALONE, Ranks

NAME = "absent"
# Told of a message: the axis of the mesh, the bytes that pass the link of a rank.
Told = Callable[[str, float], None]


class Sent(dist.Work):
    """A message on its way: what the backend holds until it is waited for, and until it is dropped."""

    def __init__(self, waiting: Any = None, kept: Any = None):
        super().__init__()
        self.waiting, self.kept = waiting, kept

    def wait(self, timeout: Any = None) -> bool:
        """The message has arrived."""
        self.waiting = None
        return True


class Absent(dist.ProcessGroup):
    """A group whose first rank is this process. copies: messages are copied as gloo does."""

    def __init__(self, rank: int, size: int, *, copies: bool):
        cast(Any, super()).__init__(rank, size)  # torch's stubs know the one with a store only
        self.members, self.copies, self.axis = size, copies, ""
        self.told: Told = _nobody

    def getBackendName(self) -> str:
        """The name under which torch knows groups of this kind."""
        return NAME

    @property
    def group_name(self) -> str:
        """The name by which a mesh finds the group."""
        return dist.distributed_c10d._world.pg_names[self]

    def allreduce(self, tensors: Any, opts: Any = None) -> Sent:
        """Sums: as many bytes as a scatter and a gather."""
        self._tell(2 * tensors[0].nbytes)
        return Sent(kept=tensors)

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Sent:
        """Parts of all ranks, end to end."""
        self._tell(output.nbytes)
        return Sent(torch.empty_like(output) if self.copies else None, (output, input))

    def reduce_scatter_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Sent:
        """The part of this rank of a sum."""
        self._tell(input.nbytes)
        return Sent(kept=(output, input.clone() if self.copies else input))

    def allgather(self, output_tensors: Any, input_tensors: Any, opts: Any = None) -> Sent:
        """Tensors of all ranks."""
        size = sum(one.nbytes for one in output_tensors[0])
        self._tell(size)
        copy = torch.empty(size, dtype=torch.uint8, device=input_tensors[0].device) if self.copies else None
        return Sent(copy, (output_tensors, input_tensors))

    # As torch before 2.13 names them.
    _allgather_base: Any = all_gather_single
    _reduce_scatter_base: Any = reduce_scatter_single

    def _tell(self, size: float) -> None:
        self.told(self.axis, size * (self.members - 1) / self.members)


def _nobody(axis: str, size: float) -> None:
    pass


@contextlib.contextmanager
def joined(axes: Mapping[str, int], *, copies: bool) -> Iterator[Ranks]:
    """This process as the first one of a mesh of these axes, whose other ranks are absent; alone where there are none.

    Errors: ValueError in a process that has joined others.
    """
    world = math.prod(axes.values())
    if world == 1:
        yield ALONE
        return
    if dist.is_initialized():
        raise ValueError("a plan counts the ranks of a run by itself, and this process is one of several: start it without torchrun")

    def group(store: Any, rank: int, size: int, timeout: Any) -> Absent:
        return Absent(rank, size, copies=copies)

    dist.Backend.register_backend(NAME, group, devices=["cpu"])
    dist.init_process_group(NAME, rank=0, world_size=world, store=dist.HashStore())
    try:
        mesh = shard.mesh("cpu", **axes)
        for axis in axes:
            cast(Any, mesh.get_group(axis)).axis = axis
        yield Ranks(0, world, mesh)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def telling(ranks: Ranks, told: Told) -> Iterator[None]:
    """Inside, somebody is told of messages along the axes of a mesh."""
    mesh = ranks.mesh
    groups = [] if mesh is None else [cast(Any, mesh.get_group(axis)) for axis in mesh.mesh_dim_names or ()]
    for group in groups:
        group.told = told
    try:
        yield
    finally:
        for group in groups:
            group.told = _nobody
