"""What processes tell each other in words: JSON over a process group, so that all of them go on, or fail, together."""

import functools
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

Group = dist.ProcessGroup | None  # None: this process is alone
PATIENCE = timedelta(days=1)  # one may write to a slow disk for longer than NCCL lets others wait; `run.stalls` ends those that hang


def rank() -> int:
    """Number of this process among all."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Number of all processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def group() -> Group:
    """A group of all processes beside that of training, for one thread at a time; None where there is no other. A collective at first."""
    return None if size() == 1 else _beside(dist.group.WORLD)


@functools.lru_cache(1)
def _beside(world: Any) -> dist.ProcessGroup:
    """Over gloo, whose messages a thread may send while training sends its own."""
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))


def gather(value: Any, group: Group) -> list[Any]:
    """The JSON values of all processes, by rank."""
    if group is None:
        return [value]
    # Not all_gather_object, which sends pickles.
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size())]
    dist.all_gather(lengths, torch.tensor([own.numel()]), group=group)
    longest = int(torch.cat(lengths).max())
    texts = [torch.zeros(longest, dtype=torch.uint8) for _ in lengths]
    dist.all_gather(texts, torch.nn.functional.pad(own, (0, longest - own.numel())), group=group)
    return [json.loads(text[: int(length)].numpy().tobytes()) for text, length in zip(texts, lengths, strict=True)]


def each(function: Callable[[], Any], group: Group) -> list[Any]:
    """What a function gives on every rank, as JSON. Errors: an OSError of one rank is an OSError, with its text, on all of them."""
    if group is None:
        return [function()]
    try:
        reply = {"value": function()}
    except OSError as error:
        reply = {"error": str(error)}
    replies = gather(reply, group)
    if failed := [reply["error"] for reply in replies if "error" in reply]:
        raise OSError(failed[0])
    return [reply["value"] for reply in replies]


def first(function: Callable[[], Any], group: Group) -> Any:
    """What a function gives on rank 0, as JSON, on every rank. Errors: as of `each`."""
    return each(lambda: function() if rank() == 0 else None, group)[0]
