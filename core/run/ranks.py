"""The processes of one run: who takes part, waiting for one another, and what rank 0 does for all."""

import os
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh

from treetune.core import shard

T = TypeVar("T")


class Ranks(NamedTuple):
    """This process among those that torchrun started; rank 0 of a world of 1, without a mesh, when it runs alone."""

    rank: int
    world: int
    mesh: DeviceMesh | None


ALONE = Ranks(0, 1, None)


def join_ranks(device: torch.device) -> Ranks:
    """Join the other processes of torchrun, if there are any, on a mesh with one axis `data`."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return ALONE
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(torch.distributed.get_rank(), world, shard.mesh(device.type, data=world))


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
