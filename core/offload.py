"""Tensors of a forward pass that are elsewhere until the backward pass reads them: in host memory, or in files.

In host memory ("cpu") they are pinned, and copied in the order of the device's own work; of a model on the CPU they are there already
and stay as they are. In files ("disk") they are written once and read once, in a temporary folder that goes with the process.
"""

import functools
import itertools
import os
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

PLACES = ("cpu", "disk")
SMALL = 1 << 10  # bytes of a tensor that is not worth a copy


class Place(NamedTuple):
    """Where tensors go: take(put(x)) equals x, on the device of x."""

    put: Callable[[Tensor], Any]
    take: Callable[[Any], Tensor]


class _Shape(NamedTuple):
    """The geometry of a tensor, with which it comes back: kernels may sum in another order over other strides."""

    size: torch.Size
    stride: tuple[int, ...]
    device: torch.device

    @property
    def span(self) -> int:
        """Numbers from the first to the last in memory."""
        return 1 + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))


def _flat(tensor: Tensor) -> tuple[Tensor, _Shape]:
    """The numbers of a tensor in a row: as they lie in memory where there are no gaps between them."""
    shape = _Shape(tensor.shape, tensor.stride(), tensor.device)
    return (tensor.as_strided((shape.span,), (1,)) if shape.span <= tensor.numel() else tensor.reshape(-1)), shape


def _shaped(flat: Tensor, shape: _Shape) -> Tensor:
    """The inverse of `_flat`."""
    if shape.span <= flat.numel():
        return flat.as_strided(shape.size, shape.stride)
    return torch.empty_strided(shape.size, shape.stride, dtype=flat.dtype, device=flat.device).copy_(flat.view(shape.size))


class _Host(NamedTuple):
    flat: Tensor
    shape: _Shape


def _to_host(tensor: Tensor) -> Tensor | _Host:
    if tensor.device.type == "cpu" or tensor.nbytes < SMALL:
        return tensor
    flat, shape = _flat(tensor)
    copy = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
    # The device's allocator gives the memory of `tensor` away in stream order, hence after this copy.
    return _Host(copy.copy_(flat, non_blocking=True), shape)


def _from_host(stored: Tensor | _Host) -> Tensor:
    return _shaped(stored.flat.to(stored.shape.device, non_blocking=True), stored.shape) if isinstance(stored, _Host) else stored


class _File:
    """A tensor in a file, which goes when nobody needs it any more."""

    def __init__(self, tensor: Tensor, path: Path):
        flat, self.shape = _flat(tensor.detach())
        self.path, self.numbers, self.dtype = path, flat.numel(), flat.dtype
        path.write_bytes(flat.cpu().view(torch.uint8).numpy().data)
        weakref.finalize(self, _remove, str(path))


def _remove(path: str) -> None:
    if os.path.exists(path):  # with its folder, at the end of the process
        os.unlink(path)


@functools.cache
def _folder(process: int) -> tempfile.TemporaryDirectory:
    """The folder of this process: one that was forked makes its own."""
    return tempfile.TemporaryDirectory(prefix="treetune-activations-")


_numbers = itertools.count()


def _to_disk(tensor: Tensor) -> Tensor | _File:
    if tensor.nbytes < SMALL:
        return tensor
    return _File(tensor, Path(_folder(os.getpid()).name) / str(next(_numbers)))


def _from_disk(stored: Tensor | _File) -> Tensor:
    if not isinstance(stored, _File):
        return stored
    flat = torch.empty(stored.numbers, dtype=stored.dtype)
    with stored.path.open("rb") as file:
        file.readinto(flat.view(torch.uint8).numpy().data)
    return _shaped(flat.to(stored.shape.device), stored.shape)


def place(name: str) -> Place:
    """The place of a name. Errors: ValueError for another."""
    if name not in PLACES:
        raise ValueError(f"tensors are offloaded to {' or '.join(PLACES)}, got {name!r}")
    return Place(_to_host, _from_host) if name == "cpu" else Place(_to_disk, _from_disk)
