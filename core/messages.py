"""Several tensors in one message: parts that ranks have become whole tensors; gradients of whole tensors become sums that are in parts.

n ranks. Of a tensor with R rows each rank has ceil(R / n), the last ones fewer or none, as `torch.chunk` deals them; in a message all have
as many, and each tensor begins on 16 bytes. Messages are asynchronous: on a GPU the device waits for one, over gloo the host does.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

ALIGNED = 16  # bytes

Beside = Callable[..., AbstractContextManager[Any]]  # of the tensors that are filled


class Slot(NamedTuple):
    """A tensor [R, ...] in each rank's part of a message: from byte `first`, `rows` of its rows."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: int
    first: int

    @property
    def numbers(self) -> int:
        """Numbers of a part."""
        return self.rows * math.prod(self.shape[1:])

    @property
    def bytes(self) -> int:
        """Bytes of a part."""
        return self.numbers * self.dtype.itemsize


class Layout(NamedTuple):
    """What is where in a message: of `ranks` parts of `size` bytes."""

    slots: tuple[Slot, ...]
    ranks: int
    size: int

    def even(self, slot: Slot) -> bool:
        """Whether all ranks have as many rows of a tensor."""
        return slot.shape[0] == slot.rows * self.ranks


@functools.lru_cache(maxsize=4096)
def layout(kinds: tuple[tuple[torch.dtype, tuple[int, ...]], ...], ranks: int) -> Layout:
    """The layout of tensors of these dtypes and whole shapes."""
    slots, size = [], 0
    for dtype, shape in kinds:
        slots.append(Slot(dtype, shape, -(-shape[0] // ranks), size))
        size += -(-slots[-1].bytes // ALIGNED) * ALIGNED
    return Layout(tuple(slots), ranks, size)


class Gather:
    """Whole tensors of the parts that ranks have: begun when it is made. A part is cast to the dtype of its slot before it is sent.

    device: where the tensors will be, if not where the parts are. beside: inside its context parts that are away are copied, and sent.
    """

    @torch.no_grad()
    def __init__(self, parts: Sequence[Tensor], plan: Layout, group: Any, device: torch.device | None = None, beside: Beside | None = None):
        self.plan = plan
        own = torch.empty(plan.size, dtype=torch.uint8, device=parts[0].device if device is None else device)
        self.flat = own.new_empty(plan.ranks * plan.size)
        to = [_numbers(own, slot)[: part.numel()] for slot, part in zip(plan.slots, parts, strict=True)]
        with contextlib.nullcontext() if beside is None else beside(own, self.flat):
            torch._foreach_copy_(to, [part.reshape(-1) for part in parts], non_blocking=beside is not None)
            self.work = _all_gather(self.flat, own, group)

    @torch.no_grad()
    def wait(self) -> list[Tensor]:
        """The tensors, each in memory of its own; to be called once."""
        self.work.wait()
        by_rank = self.flat.view(self.plan.ranks, self.plan.size)
        whole = [_whole(by_rank, slot) for slot in self.plan.slots]
        del self.flat, self.work
        return whole


def _numbers(part: Tensor, slot: Slot) -> Tensor:
    return part[slot.first : slot.first + slot.bytes].view(slot.dtype)


def _whole(by_rank: Tensor, slot: Slot) -> Tensor:
    """The tensor of a slot of bytes [n, size]."""
    ranks = by_rank.shape[0]
    padded = torch.empty(ranks * slot.rows, *slot.shape[1:], dtype=slot.dtype, device=by_rank.device)
    # Bytes as they are, eight at a time where that goes: such copies are the whole cost.
    unit = torch.int64 if slot.bytes % 8 == 0 and by_rank.shape[1] % 8 == 0 else torch.uint8
    lines = padded.view(-1).view(torch.uint8).view(ranks, slot.bytes).view(unit)
    lines.copy_(by_rank[:, slot.first : slot.first + slot.bytes].view(unit))
    return padded[: slot.shape[0]]


class Sum:
    """This rank's parts of tensors [R, ...] summed over ranks: begun when it is made. None stands for zeros; sums have the slots' dtype."""

    @torch.no_grad()
    def __init__(self, tensors: Sequence[Tensor | None], plan: Layout, group: Any, device: torch.device):
        self.plan, self.rank = plan, dist.get_rank(group)
        dtype = plan.slots[0].dtype
        covered = sum(slot.bytes for slot, tensor in zip(plan.slots, tensors, strict=True) if tensor is not None and plan.even(slot))
        empty = torch.empty if covered == plan.size else torch.zeros
        flat = empty(plan.ranks, plan.size // dtype.itemsize, dtype=dtype, device=device)
        for slot, tensor in zip(plan.slots, tensors, strict=True):
            if tensor is not None:
                first = slot.first // dtype.itemsize
                _deal(flat[:, first : first + slot.numbers], tensor)
        self.own = flat.new_empty(flat.shape[1])
        self.work = _reduce_scatter(self.own, flat.view(-1), group)

    def wait(self) -> list[Tensor]:
        """The parts, views of one buffer; to be called once."""
        self.work.wait()
        del self.work
        own = self.own.view(torch.uint8)
        return [_rows(_numbers(own, slot), slot, self.rank) for slot in self.plan.slots]


def _deal(lines: Tensor, tensor: Tensor) -> None:
    """Write a tensor [R, ...] into the parts of ranks [n, numbers]; what is behind it stays zero."""
    flat, size = tensor.reshape(-1), lines.shape[1]
    full = flat.numel() // size if size else 0
    lines[:full].copy_(flat[: full * size].view(full, size))
    if rest := flat.numel() - full * size:
        lines[full, :rest].copy_(flat[full * size :])


def _rows(part: Tensor, slot: Slot, rank: int) -> Tensor:
    """The rows [r, ...] of a rank in its part."""
    count = max(0, min(slot.rows, slot.shape[0] - rank * slot.rows))
    return part.view(slot.rows, *slot.shape[1:])[:count]


# torch 2.13 has other names for both.
def _all_gather(whole: Tensor, part: Tensor, group: Any) -> Any:
    send = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return send(whole, part, group=group, async_op=True)


def _reduce_scatter(part: Tensor, whole: Tensor, group: Any) -> Any:
    send = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return send(part, whole, group=group, async_op=True)
