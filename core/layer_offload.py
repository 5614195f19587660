"""Frozen layers in host memory or in files, of which two are on the device: the one that is computed, and the one that comes next.

A leaf that is away is a plain tensor, or a quantised leaf of such: in pinned memory, copied to the device on a stream of its own; or mapped
from a file. To a CPU nothing is copied: the system is told which pages are read next, and which are not needed for a while.
What travels are the bytes of the leaf: a quantised one is made dense on the device.
"""

import contextlib
import ctypes
import functools
import mmap
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from treetune.core import offload, quant, shard, tree
from treetune.core.param import Params
from treetune.core.window import Coming, Window

SMALL = 1 << 12  # bytes of a tensor that stays on the device: a page of memory
FILE = "treetune-layers-"  # how the names of files begin

Put = Callable[[Tensor], Tensor]


class Lane(Protocol):
    """The way of tensors to a device."""

    def send(self, parts: list[Tensor]) -> tuple[list[Tensor], Any]:
        """Begin to bring tensors: those on the device, and a mark of the moment when they are there."""
        ...

    def wait(self, mark: Any) -> None:
        """Have what the device does from now on begin after a mark."""
        ...

    def beside(self, *filled: Tensor) -> AbstractContextManager[Any]:
        """Inside, tensors of the device are filled, and sent to other ranks, beside what the device computes."""
        ...

    def drop(self, parts: list[Tensor]) -> None:
        """Tensors that were sent are not needed for a while."""
        ...


class Cuda:
    """Copies of pinned memory on a stream of their own, beside what the device computes."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, _side_stream(device)

    def send(self, parts: list[Tensor]) -> tuple[list[Tensor], Any]:
        """Copies, in memory that is free when all is done that the device was given so far."""
        # From the pool of the stream that computes, so that what a layer leaves is taken by the next but one. Memory of the side stream
        # would be given back by the host, which runs ahead of the device, and be as large as the model.
        copies = [torch.empty_like(part, device=self.device, memory_format=torch.contiguous_format) for part in parts]
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for copy, part in zip(copies, parts, strict=True):
                copy.copy_(part, non_blocking=True)
            return copies, self.stream.record_event()

    def wait(self, mark: Any) -> None:
        """The computing stream waits, the host does not."""
        torch.cuda.current_stream(self.device).wait_event(mark)

    def beside(self, *filled: Tensor) -> AbstractContextManager[Any]:
        """The side stream, whose end the memory waits for, also where nobody waits for what is sent."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        for tensor in filled:
            tensor.record_stream(self.stream)
        return torch.cuda.stream(self.stream)

    def drop(self, parts: list[Tensor]) -> None:
        """Nothing: the copies go, and the tensors stay where they are."""


@functools.cache
def _side_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


class Pages:
    """Tensors that are mapped from files, read where they lie: their pages are fetched ahead, and given back."""

    def send(self, parts: list[Tensor]) -> tuple[list[Tensor], Any]:
        """The tensors themselves."""
        for part in parts:
            _advise(part, "MADV_WILLNEED")
        return parts, None

    def wait(self, mark: Any) -> None:
        """Nothing: reading a page waits for it."""

    def beside(self, *filled: Tensor) -> AbstractContextManager[Any]:
        """Nothing: the host reads, and sends."""
        return contextlib.nullcontext()

    def drop(self, parts: list[Tensor]) -> None:
        """Their pages go; another read fetches them again."""
        for part in parts:
            _advise(part, "MADV_DONTNEED")


def _advise(part: Tensor, name: str) -> None:
    # Of a file that is mapped, and of nothing else: anonymous memory would come back as zeros.
    if _mapped(part) and hasattr(mmap, name):
        storage = part.untyped_storage()
        pointer, size = ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes())
        _system().madvise(pointer, size, getattr(mmap, name))  # advice that is not taken changes no number


@functools.cache
def _system() -> Any:
    return ctypes.CDLL(None)


def _mapped(part: Tensor) -> bool:
    return part.device.type == "cpu" and FILE in (part.untyped_storage().filename or "")


class _Used:
    """Whether any leaf of this process is away: a pass of a model where none is looks at no leaf."""

    ever = False


def home(place: str, device: torch.device) -> Put | None:
    """What brings a tensor of a frozen layer to its place, "cpu" or "disk", away from a device; None where that changes nothing.

    Tensors below SMALL stay. Errors: ValueError for another place.
    """
    if place == "none":
        return None
    if place not in offload.PLACES:
        raise ValueError(f"layers are offloaded to {' or '.join(offload.PLACES)}, got {place!r}")
    if place == "cpu" and device.type == "cpu":
        return None
    put = _pinned if place == "cpu" else _in_file

    def one(part: Tensor) -> Tensor:
        if shard.distributed(part):
            return shard.like(one, part)
        if part.nbytes < SMALL or _mapped(part) or (place == "cpu" and part.device.type == "cpu" and part.is_pinned()):
            return part
        _Used.ever = True
        return put(part.detach())

    return one


def _pinned(part: Tensor) -> Tensor:
    return torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part)


def _in_file(part: Tensor) -> Tensor:
    """The tensor, mapped from a file without a name, which goes with it."""
    flat = part.contiguous().cpu().view(-1).view(torch.uint8)
    with tempfile.NamedTemporaryFile(prefix=FILE) as file:
        file.write(flat.numpy().data)
        file.flush()
        return torch.from_file(file.name, shared=True, size=flat.numel(), dtype=torch.uint8).view(part.dtype).view(part.shape)


def away(params: Params, put: Put) -> Params:
    """A tree of frozen weights with the leaves of its layers in their place; what is there already stays."""
    if "layers" not in params:
        return params
    return params | {"layers": tree.map(lambda leaf: moved(leaf, put), params["layers"])}


def moved(leaf: Any, put: Put) -> Any:
    """A leaf with `put` applied to its tensors."""
    return leaf.moved(put) if quant.quantised(leaf) else put(leaf)


def brought(leaf: Any, device: torch.device) -> Any:
    """A leaf on a device, for what is computed of it once."""
    return moved(leaf, lambda part: shard.like(lambda own: own.to(device), part) if shard.distributed(part) else part.to(device))


def elsewhere(params: Params, device: torch.device) -> int:
    """Bytes of the leaves of a tree that are away from a device."""
    return sum(part.nbytes for leaf in tree.leaves(params) for part in _parts(leaf) if _is_away(part, device))


def far(leaf: Any, device: torch.device) -> bool:
    """Whether a leaf, or a part of it, is away from a device."""
    return any(_is_away(part, device) for part in _parts(leaf))


def those_away(parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors that are away from a device."""
    return [part for part in parts if _is_away(part, device)] if _Used.ever else []


def _is_away(part: Tensor, device: torch.device) -> bool:
    return part.device.type != device.type or _mapped(part)


def _parts(leaf: Any) -> list[Tensor]:
    """The tensors of a leaf that this process has."""
    return [shard.local(part) for part in leaf.parts()] if quant.quantised(leaf) else [shard.local(leaf)]


def arriving(layers: list[Params], device: torch.device) -> list[Params]:
    """The layers of a model for one pass over them and back, with a `Coming` in place of each leaf that is away from the device.

    The layers are those of a window of this pass. Where nothing is away they are returned as they are. Leaves in parts come by messages
    of the ranks (`gathers`).
    """
    if not _Used.ever:
        return layers
    gone = [{path: leaf for path, leaf in tree.items(layer) if shard.mesh_of(leaf) is None and far(leaf, device)} for layer in layers]
    if not any(gone):
        return layers
    lane = way(device)
    window = Window(len(gone), lambda index: _Present(gone[index], lane, device))

    def one(index: int, path: str, leaf: Any) -> Any:
        return Coming(window, index, path) if path in gone[index] else leaf

    return [tree.from_items((path, one(index, path, leaf)) for path, leaf in tree.items(layer)) for index, layer in enumerate(layers)]


def way(device: torch.device) -> Lane:
    """How tensors come to a device."""
    return Cuda(device) if device.type == "cuda" else Pages()


class _Present:
    """A layer on the device, or on its way to it."""

    def __init__(self, leaves: dict[str, Any], lane: Lane, device: torch.device):
        self.lane = lane
        self.parts = [part for leaf in leaves.values() for part in _parts(leaf) if _is_away(part, device)]
        copies, self.mark = lane.send(self.parts)
        came = {id(part): copy for part, copy in zip(self.parts, copies, strict=True)}
        self.leaves = {path: moved(leaf, lambda part: came.get(id(part), part)) for path, leaf in leaves.items()}
        self.waited = False

    def wait(self) -> dict[str, Any]:
        """The leaves, for what the device does from now on."""
        if not self.waited:
            self.waited = True
            self.lane.wait(self.mark)
        return self.leaves

    def __del__(self) -> None:
        # What nobody has waited for may be on its way still, and its memory must not be given to others before it has come.
        self.wait()
        self.lane.drop(self.parts)
