"""The leaves of a checkpoint in parts: each rank writes those that it holds, and reads those that it will hold.

`state.safetensors` has whole leaves. Where ranks hold parts of leaves, each writes its own into `state-00001-of-00004.safetensors` (the
first one also leaves that are whole), and `state.index.json` has the shape of every leaf and the boxes that it is cut into: the file of
each, where it begins along every dimension, and its shape.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treetune.core import fields, manifest, shard, tensor_file, tree
from treetune.core.durable import fsync
from treetune.core.param import Param
from treetune.core.state import Params, TrainState

WHOLE, INDEX = "state.safetensors", "state.index.json"


class Part(NamedTuple):
    """What a rank writes of a leaf, and where that begins in the leaf."""

    values: Tensor
    first: tuple[int, ...]


class Own(NamedTuple):
    """A state as one rank saves it: the parts that it writes, the shapes of all leaves, and whether ranks hold parts of leaves."""

    parts: dict[str, Part]
    shapes: dict[str, tuple[int, ...]]
    split: bool


class Box(NamedTuple):
    """A part of a leaf in a checkpoint: the name of its file, where it begins, its shape."""

    file: str
    first: tuple[int, ...]
    shape: tuple[int, ...]


class Saved(NamedTuple):
    """A leaf in a checkpoint."""

    shape: tuple[int, ...]
    boxes: list[Box]


def trees(state: TrainState) -> Params:
    """What of a state is in checkpoints, one tree."""
    return {"params": state.params, "opt": state.opt, "extra": state.extra}


def own(state: TrainState, rank: int) -> Own:
    """The parts that a rank writes, which share storage with the state: of equal parts of several ranks the first one's alone."""
    leaves = dict(tree.items(trees(state)))
    split = any(shard.parts(leaf) > 1 for leaf in leaves.values())
    held = {path: leaf for path, leaf in leaves.items() if _writes(leaf, rank, split)}
    parts = {path: Part(shard.local(leaf).detach(), shard.first_places(leaf)) for path, leaf in held.items()}
    return Own(parts, {path: tuple(leaf.shape) for path, leaf in leaves.items()}, split)


def _writes(leaf: Tensor, rank: int, split: bool) -> bool:
    """Whether a rank writes the part that it holds of a leaf."""
    if not split or not shard.distributed(leaf):
        return rank == 0
    coordinate = leaf.device_mesh.get_coordinate()
    if coordinate is None or not shard.local(leaf).numel():
        return False
    if int(leaf.device_mesh.mesh.min()) > 0:
        return False  # one of several meshes with the same parts, of which the first has rank 0
    return all(place == 0 for place, spec in zip(coordinate, leaf.placements, strict=True) if not spec.is_shard())


def on_host(held: Own) -> tuple[Own, Callable[[], None]]:
    """Copies of all parts in host memory, and a function that returns when they are there: later changes of the state do not reach them.

    On CUDA the copies are queued behind the work of now, and nothing waits for them here.
    """
    copies = {path: part._replace(values=_copy(part.values)) for path, part in held.parts.items()}
    devices = {part.values.device for part in held.parts.values() if part.values.is_cuda}
    events = [torch.cuda.current_stream(device).record_event() for device in devices]

    def ready() -> None:
        for event in events:
            event.synchronize()

    return held._replace(parts=copies), ready


def _copy(values: Tensor) -> Tensor:
    if not values.is_cuda:
        return values.clone(memory_format=torch.contiguous_format)
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)


def file_name(held: Own, rank: int, world: int) -> str:
    """The name of the file that a rank writes."""
    return f"state-{rank + 1:05d}-of-{world:05d}.safetensors" if held.split else WHOLE


def write(folder: Path, name: str, held: Own) -> dict[str, Any] | None:
    """Write a rank's parts, one after another, and flush them; None where it has none.

    Returns JSON: the file's name, its entry in the manifest, and {path: [where the part begins, its shape]}.
    """
    if not held.parts:
        return None
    sizes = {path: Param(tuple(part.values.shape), part.values.dtype) for path, part in held.parts.items()}
    tensor_file.write(folder / name, sizes, ((path, part.values) for path, part in held.parts.items()))
    fsync(folder / name)
    boxes = {path: [part.first, tuple(part.values.shape)] for path, part in held.parts.items()}
    return {"name": name, "entry": manifest.entry(folder / name), "boxes": boxes}


def write_index(folder: Path, shapes: dict[str, tuple[int, ...]], written: list[dict[str, Any]]) -> None:
    """Write where each leaf is: written has what `write` has returned on the ranks."""
    boxes: dict[str, dict[tuple[int, ...], list]] = {path: {} for path in shapes}
    for number, file in enumerate(written):
        for path, (begin, shape) in file["boxes"].items():
            boxes[path].setdefault(tuple(begin), [number, begin, shape])  # a part that several ranks have written is read once
    leaves = {path: {"shape": shape, "parts": list(boxes[path].values())} for path, shape in shapes.items()}
    text = json.dumps({"files": [file["name"] for file in written], "leaves": leaves}, separators=(",", ":"))
    (folder / INDEX).write_text(text, encoding="utf-8")


class Reader:
    """The leaves of a checkpoint, of which slices are read; each file is opened when it is needed first. Close it."""

    def __init__(self, folder: Path):
        self.folder, self.files = folder, contextlib.ExitStack()
        self._open: dict[str, Any] = {}
        self.leaves = self._index() if (folder / INDEX).is_file() else self._whole()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.files.close()

    def _index(self) -> dict[str, Saved]:
        file = self.folder / INDEX
        with fields.reading(file):
            index = json.loads(file.read_bytes())
            names = index["files"]
            out = {}
            for path, leaf in index["leaves"].items():
                boxes = [Box(names[number], tuple(first), tuple(shape)) for number, first, shape in leaf["parts"]]
                out[path] = Saved(tuple(leaf["shape"]), boxes)
            return out

    def _whole(self) -> dict[str, Saved]:
        file = self._file(WHOLE)
        shapes = {path: tuple(file.get_slice(path).get_shape()) for path in file.keys()}
        return {path: Saved(shape, [Box(WHOLE, (0,) * len(shape), shape)]) for path, shape in shapes.items()}

    def _file(self, name: str) -> Any:
        from safetensors import safe_open

        if name not in self._open:
            self._open[name] = self.files.enter_context(safe_open(self.folder / name, framework="pt"))
        return self._open[name]

    @torch.no_grad()
    def read(self, path: str, like: Tensor, *, in_place: bool = False) -> Tensor:
        """The leaf as `like` is placed: its dtype, device and sharding, in memory of its own, or in that of `like`.

        Only this rank's part is read.
        """
        here = shard.local(like)
        out = here if in_place else torch.empty(here.shape, dtype=like.dtype, device=here.device, pin_memory=here.is_pinned())
        first, boxes = shard.first_places(like), self.leaves[path].boxes
        if sum(math.prod(box.shape) for box in boxes) != like.numel():
            raise ValueError(f"{self.folder / INDEX} is damaged ({path} is not whole)")
        for box in boxes:
            if (common := overlap(box, first, tuple(out.shape))) is not None:
                theirs, ours = common
                file = self._file(box.file)
                whole = all((side.start, side.stop) == (0, size) for side, size in zip(theirs, box.shape, strict=True))
                out[ours] = file.get_tensor(path) if whole else file.get_slice(path)[theirs]
        return like if in_place else shard.rewrap(out, like)


def overlap(box: Box, first: tuple[int, ...], shape: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where a box and the part of this shape that begins at `first` have the same numbers: in the box, in the part. None: nowhere."""
    sides = list(zip(box.first, box.shape, first, shape, strict=True))
    spans = [(max(begin, own), min(begin + size, own + length)) for begin, size, own, length in sides]
    if any(start >= end for start, end in spans):
        return None
    theirs = tuple(slice(start - begin, end - begin) for (start, end), (begin, *_) in zip(spans, sides, strict=True))
    return theirs, tuple(slice(start - own, end - own) for (start, end), (_, _, own, _) in zip(spans, sides, strict=True))


@contextlib.contextmanager
def reading(folder: Path, fix: str) -> Iterator[Reader]:
    """A reader of a checkpoint. Errors: ValueError, with the fix, for files that are damaged."""
    from safetensors import SafetensorError

    try:
        with Reader(folder) as reader:
            yield reader
    except SafetensorError as error:
        name = INDEX if (folder / INDEX).is_file() else WHOLE
        raise ValueError(f"{folder / name} is damaged ({error}): {fix}") from error
