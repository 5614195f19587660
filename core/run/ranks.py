"""The processes of one run: who takes part, waiting for one another, and what rank 0 does for all."""

import datetime
import math
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh

from treetune.core import exchange, shard
from treetune.core.config.ranges import SECONDS_MAX
from treetune.core.run.errors import RunFailed

T = TypeVar("T")


class Ranks(NamedTuple):
    """This process among those that torchrun started; rank 0 of a world of 1, without a mesh, when it runs alone.

    Ranks along `replicate` and `data` have rows of their own, those along other axes the same: rows, prompts and seeds are dealt by
    `row_rank` among `row_ranks`. Files are written by rank 0 of all.
    """

    rank: int
    world: int
    mesh: DeviceMesh | None

    @property
    def row_rank(self) -> int:
        """The number of this rank among those that have different rows."""
        return self.rank if self.mesh is None else shard.row_rank(self.mesh)

    @property
    def row_ranks(self) -> int:
        """How many ranks have different rows."""
        return self.world if self.mesh is None else shard.world(self.mesh)

    @property
    def leads(self) -> bool:
        """Whether this is the first of the ranks that have its rows."""
        mesh = self.mesh
        return mesh is None or not any(mesh.get_local_rank(axis) for axis in mesh.mesh_dim_names or () if axis not in shard.ROWS)


ALONE = Ranks(0, 1, None)


def join_ranks(device: torch.device, sizes: Mapping[str, int] = MappingProxyType({}), timeout: float = 1800.0) -> Ranks:
    """Join the other processes of torchrun, if there are any, on a mesh of these axes, from the outermost; all on `data` without any.

    timeout: seconds that they wait for one another. Errors: ValueError where the sizes do not multiply to the number of processes.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if math.prod(sizes.values()) not in (1, world):
        shown = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(f"a mesh of {shown} has {math.prod(sizes.values())} processes, and there are {world}")
    if world == 1:
        return ALONE
    if device.type == "cuda":
        torch.cuda.set_device(device)
    waits = datetime.timedelta(seconds=min(timeout + 120, SECONDS_MAX))  # longer than `stalls` does, which knows more of who hangs
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # another run of these processes: all have checked their options before one takes the folder
    else:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=waits)
    mesh = shard.mesh(device.type, **(sizes or {"data": world}))
    for axis in mesh.mesh_dim_names or ():  # the groups of several axes are made with a time-out of torch's own
        torch.distributed.distributed_c10d._set_pg_timeout(waits, mesh.get_group(axis))
    return Ranks(torch.distributed.get_rank(), world, mesh)


def on_hosts(ranks: Ranks) -> DeviceMesh | None:
    """The same ranks as a mesh of CPUs, which exchange over gloo: a collective. None without several ranks."""
    mesh = ranks.mesh
    if mesh is None or mesh.device_type == "cpu":
        return mesh
    names = mesh.mesh_dim_names or ()
    hosts = shard.mesh("cpu", **{name: mesh[name].size() for name in names})
    for name in names:
        torch.distributed.distributed_c10d._set_pg_timeout(exchange.PATIENCE, hosts.get_group(name))
    return hosts


def every(ranks: Ranks, value: T) -> list[T]:
    """The values of the ranks that have different rows, in their order."""
    if ranks.row_ranks == 1:
        return [value]
    answers: list[Any] = [None] * ranks.world
    torch.distributed.all_gather_object(answers, (ranks.row_rank, value))
    by_rank = dict(reversed(answers))  # of ranks with the same rows the first one's
    return [by_rank[number] for number in range(ranks.row_ranks)]


def each(ranks: Ranks, function: Callable[[], T]) -> list[T]:
    """What `function` gives on each rank, by rank, on all.

    Errors: a RunFailed of one is a RunFailed on all, a ValueError or OSError a ValueError.
    """
    if ranks.world == 1:
        return [function()]
    # One that raised alone would leave the others waiting for its next message.
    try:
        message = (function(), None, "")
    except (ValueError, OSError, RunFailed) as error:
        message = (None, RunFailed if isinstance(error, RunFailed) else ValueError, str(error))
    answers: list[Any] = [None] * ranks.world
    torch.distributed.all_gather_object(answers, message)
    for _, kind, text in answers:
        if kind is not None:
            raise kind(text)
    return [value for value, _, _ in answers]


def of_same_rows(ranks: Ranks, function: Callable[..., T], also: tuple[type[Exception], ...] = ()) -> Callable[..., T]:
    """`function` called on the first of the ranks that have the same rows, and what it gives on all of them.

    For what may differ from call to call, or costs something each time. Errors: a ValueError, OSError or one of `also` there is a
    ValueError on all.
    """
    if ranks.mesh is None or ranks.row_ranks == ranks.world:
        return function
    mesh = ranks.mesh
    axes = [axis for axis in mesh.mesh_dim_names or () if axis not in shard.ROWS]

    def call(*args: Any) -> T:
        message: list[Any] = [None, None]  # result, error
        if ranks.leads:
            try:
                message = [function(*args), None]
            except (ValueError, OSError, *also) as error:
                message = [None, str(error)]
        for axis in axes:
            group = mesh.get_group(axis)
            torch.distributed.broadcast_object_list(message, group=group, group_src=0)
        if message[1] is not None:
            raise ValueError(message[1])
        return message[0]

    return call


def barrier(ranks: Ranks) -> None:
    """Return when every rank has come this far."""
    if ranks.world > 1:
        torch.distributed.barrier()


def share(ranks: Ranks, function: Callable[[], T]) -> T:
    """The result of calling `function` on rank 0, on every rank. Errors: a ValueError or OSError there is a ValueError on all of them."""
    if ranks.world == 1:
        return function()
    message: list = [None, None]  # result, error
    if ranks.rank == 0:
        # The others wait in the broadcast: an error that left this rank alone would hang them.
        try:
            message = [function(), None]
        except (ValueError, OSError) as error:
            message = [None, str(error)]
    torch.distributed.broadcast_object_list(message, src=0)
    if message[1] is not None:
        raise ValueError(message[1])
    return message[0]
