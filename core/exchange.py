"""What processes tell each other in words: JSON over a process group, so that all of them go on, or fail, together."""

import json
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist

Group = dist.ProcessGroup | None  # None: this process is alone


def everyone() -> Group:
    """The group of all processes; None where there is no other."""
    return dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None


def beside() -> Group:
    """Another group of all processes, for a thread whose messages must not mix with those of training. A collective."""
    return None if everyone() is None else cast(dist.ProcessGroup, dist.new_group(backend="gloo"))


def rank(group: Group) -> int:
    """Number of this process in a group."""
    return 0 if group is None else dist.get_rank(group)


def size(group: Group) -> int:
    """Number of processes of a group."""
    return 1 if group is None else dist.get_world_size(group)


def gather(value: Any, group: Group) -> list[Any]:
    """The JSON values of all processes, by rank."""
    if group is None:
        return [value]
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else torch.device("cpu")
    # Not all_gather_object, which sends pickles.
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(size(group))]
    dist.all_gather(lengths, torch.tensor([own.numel()], device=device), group=group)
    longest = int(torch.cat(lengths).max())
    texts = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in lengths]
    dist.all_gather(texts, torch.nn.functional.pad(own, (0, longest - own.numel())).to(device), group=group)
    return [json.loads(bytes(text[: int(length)].tolist())) for text, length in zip(texts, lengths, strict=True)]


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
    return each(lambda: function() if rank(group) == 0 else None, group)[0]
