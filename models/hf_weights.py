"""Weights in the folders of Hugging Face: safetensors, in one file or several with an index. Pickled ones are never read.

Every file is memory-mapped, every key and shape checked before the first tensor is read, and each leaf kept as it is asked for.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from treetune.core import fields, machine, manifest, quant, quant_parts, tree
from treetune.core.param import Param, Params
from treetune.models import MODELS, bnb_files, expert_files, folder, hf_keys, quant_config, quantised
from treetune.models.quantised import Keep

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MAPPED = 1 << 26  # bytes of a file that are read before it is mapped anew
FLOATS = ("F32", "BF16", "F16", "F64")


class Rows(NamedTuple):
    """What is read of a tensor: from the first of each pair of rows to before the second, and of these some columns or all."""

    spans: Sequence[tuple[int, int]]
    columns: slice = slice(None)


NO_ROWS: Mapping[str, Rows] = MappingProxyType({})


def read_leaves(
    root: Path,
    family: str,
    leaves: dict[str, Param],
    *,
    optional: dict[str, Param] | None = None,
    unread: Iterable[str] = (),
    device: torch.device | str = "cpu",
    keep: Keep = quantised.AS_READ,
) -> Params:
    """The tree of leaves by path, and of those optional ones that the folder has; each is kept as `keep` says as soon as it is read.

    Of leaves that are split among ranks, only the rows and columns of this one are read.
    """
    leaves = keep.wide(leaves)
    every = leaves | (optional or {})
    groups = hf_keys.groups(family, every)
    own = {key: boxes for key, paths in groups.items() if (boxes := _own_boxes(keep, {path: every[path] for path in paths}))}

    def store(key: str, tensor: Any) -> dict[str, Any]:
        if key not in own:
            return {path: keep(path, leaf) for path, leaf in hf_keys.blocks(family, groups[key], tensor, every).items()}
        read = {path: _some(every[path], box) for path, box in zip(groups[key], own[key], strict=True)}
        return {path: keep.joined(path, leaf, every[path]) for path, leaf in hf_keys.blocks(family, groups[key], tensor, read).items()}

    wanted, extra = (hf_keys.sizes(family, part) for part in (leaves, optional or {}))
    rows = {key: _in_tensor(some, [every[path].shape[0] for path in groups[key]]) for key, some in own.items()}
    kept = read_tensors(root, wanted, optional=extra, unread=unread, parts=parts(family, leaves), device=device, keep=store, rows=rows)
    return tree.from_items(item for leaf in kept.values() for item in leaf.items())


def _own_boxes(keep: Keep, leaves: Mapping[str, Param]) -> Sequence[tuple[slice, ...]]:
    """What is read of each of the leaves in one tensor; nothing where one of them is read whole, or columns of several."""
    boxes = [keep.part(path, leaf) for path, leaf in leaves.items()]
    known = [box for box in boxes if box is not None and (len(box) == 1 or len(boxes) == 1)]
    return known if len(known) == len(boxes) else ()


def _some(leaf: Param, box: tuple[slice, ...]) -> Param:
    return leaf._replace(shape=(*(side.stop - side.start for side in box), *leaf.shape[len(box) :]))


def _in_tensor(boxes: Sequence[tuple[slice, ...]], sizes: Sequence[int]) -> Rows:
    """Parts of leaves of so many rows, as those of the tensor that holds one behind the other."""
    before = itertools.accumulate(sizes, initial=0)
    spans = [(first + box[0].start, first + box[0].stop) for box, first in zip(boxes, before, strict=False)]
    return Rows(spans, *boxes[0][1:2])


def checked_keys(root: Path) -> set[str]:
    """The keys of a folder's tensors. Raises ValueError for files that cannot be read, are damaged, or hold other numbers than floats."""
    files = _open(root)
    for key, file in files.items():
        piece = file.get_slice(key)
        _check_tensor(root, piece, key, Param(tuple(piece.get_shape())))
    return set(files)


def parts(family: str, sizes: Params) -> expert_files.Parts:
    """{Hugging Face key of a stacked leaf: keys of its parts in older files}; of families with experts."""
    table = getattr(MODELS[family], "HF_PARTS", {})
    return {hf_keys.hf_key(family, path): names for path, names in expert_files.parts_of(table, sizes).items()}


def read_tensors(
    root: Path,
    wanted: dict[str, Param],
    *,
    optional: dict[str, Param] | None = None,
    unread: Iterable[str] = (),
    parts: expert_files.Parts | None = None,
    device: torch.device | str = "cpu",
    keep: Callable[[str, Any], Any] = quantised.AS_READ,
    rows: Mapping[str, Rows] = NO_ROWS,
) -> dict[str, Any]:
    """{key: keep(key, tensor)} of a folder's safetensors: all that is wanted, whole or in `parts`, and what it has of the optional keys.

    rows: of some tensors by key, the only rows that are read.
    Raises ValueError for a key that is missing, one that is in no argument (`unread` names those to leave be), or another shape.
    """
    optional = optional or {}
    files = _open(root)
    split = {key: names for key, names in (parts or {}).items() if key in wanted and key not in files}
    pieces = {name: expert_files.part(wanted[key], len(names)) for key, names in split.items() for name in names}
    needed = {key: leaf for key, leaf in wanted.items() if key not in split} | pieces
    extra = {key for key in files if not key.endswith("rotary_emb.inv_freq")} - {*needed, *optional, *unread}
    _check_keys(root, set(needed) - set(files), extra)
    needed |= {key: leaf for key, leaf in optional.items() if key in files}
    for key, leaf in needed.items():  # all of them before the first is read, so that nothing of a wrong size takes memory
        _check_tensor(root, files[key].get_slice(key), key, leaf)
    tensors = {key: keep(key, _read(files[key], key, leaf, device, rows.get(key))) for key, leaf in needed.items() if key not in pieces}
    tensors |= {key: keep(key, _read_parts(files, names, wanted[key], device, rows.get(key))) for key, names in split.items()}
    # In the order of the model, whatever the layout: sums over leaves follow it.
    return {key: tensors[key] for key in (*wanted, *optional) if key in tensors}


class _File:
    """A safetensors file, memory-mapped: anew from time to time, because pages that were read count for memory of this process."""

    def __init__(self, path: Path):
        self.path = path
        self._map()

    def _map(self) -> None:
        from safetensors import safe_open

        self.file, self.read = safe_open(self.path, framework="pt"), 0

    def keys(self) -> list[str]:
        """The keys of its tensors."""
        return self.file.keys()

    def get_slice(self, key: str) -> Any:
        """What tells the shape and the dtype of a tensor."""
        return self.file.get_slice(key)

    def get_tensor(self, key: str) -> torch.Tensor:
        """A tensor in the mapped file; a mapping goes with the last of its tensors."""
        machine.trim()  # of what the leaves before were made from
        if self.read > MAPPED:
            self._map()
        return self._count(self.file.get_tensor(key))

    def get_rows(self, key: str, first: int, end: int, columns: slice = slice(None)) -> torch.Tensor:
        """Some rows of a tensor in the mapped file, or some columns of them."""
        machine.trim()
        if self.read > MAPPED:
            self._map()
        piece = self.file.get_slice(key)
        return self._count(piece[first:end] if columns == slice(None) else piece[first:end, columns])

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        self.read += tensor.nbytes
        return tensor


def _open(root: Path) -> dict:
    """{key: safetensors file that has it} of a folder, memory-mapped; quantised weights are one tensor each."""
    from safetensors import SafetensorError

    names = _weight_files(root)
    manifest.check(root)
    files: dict = {}
    for name in names:
        try:
            file = _File(root / name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{root / name} cannot be read as safetensors ({error}): download or save the model again") from error
        if repeated := sorted(files.keys() & set(file.keys())):
            raise ValueError(f"{root}: {name} has the tensor {repeated[0]}, which another file of the folder has too: download it again")
        files |= dict.fromkeys(file.keys(), file)
    stored = quant_config.of_folder(root)
    return files if stored is None else bnb_files.assembled(str(root), files, stored)


def _weight_files(root: Path) -> list[str]:
    if (root / INDEX).is_file():
        return _indexed(root)
    if (root / SINGLE).is_file():
        return [SINGLE]
    if pickled := sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in root.glob(pattern)):
        raise ValueError(
            f"{root} holds pickled weights only ({pickled[0]}), which can run code when they are read. Convert them where you trust "
            "them: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) writes safetensors"
        )
    raise ValueError(f"{root} holds no {SINGLE} and no {INDEX}; expected a model folder with safetensors weights")


def _indexed(root: Path) -> list[str]:
    """The file names in an index. They must be names inside the folder: an index of others could have any file read."""
    places = fields.inner(fields.mapping(folder.read_json(root / INDEX), str(root / INDEX)), "weight_map")
    names = sorted({fields.text(places, key) for key in places.values})
    if not names:
        raise ValueError(f"{root / INDEX}: weight_map is empty; expected the file of each tensor")
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{root / INDEX}: weight_map names the file {fields.shown(name)}; expected a .safetensors file of this folder")
        if not (root / name).is_file():
            raise ValueError(f"{root / INDEX}: weight_map names {name}, which is not in the folder: download or save the model again")
    return names


def _check_keys(root: Path, missing: set[str], unexpected: set[str]) -> None:
    if quantised_parts := [key for key in unexpected if key.endswith((bnb_files.ABSMAX, ".SCB", ".weight_scale"))]:
        raise ValueError(
            f"{root}: {min(quantised_parts)} is a part of a quantised weight, and config.json has no quantization_config: download or "
            "quantise the model again"
        )
    for keys, problem in ((missing, "lacks"), (unexpected, "has besides those of its family")):
        if keys:
            raise ValueError(f"{root}: the file {problem} {len(keys)} tensors, the first is {min(keys)}; config.json is of another model")


def _check_tensor(root: Path, piece, key: str, leaf: Param) -> None:
    if tuple(piece.get_shape()) != tuple(leaf.shape):
        raise ValueError(f"{root}: {key} has shape {list(piece.get_shape())}; config.json implies {list(leaf.shape)}")
    if piece.get_dtype() not in FLOATS:
        raise ValueError(f"{root}: {key} has dtype {piece.get_dtype()}; expected one of {', '.join(FLOATS)}: take the unquantised model")


def _read(file, key: str, leaf: Param, device: torch.device | str, rows: Rows | None = None) -> Any:
    if rows is not None:
        return _read_rows(file, key, leaf, device, rows)
    tensor = file.get_tensor(key)
    if quant.quantised(tensor):
        return tensor.moved(lambda part: part.to(device))._replace(dtype=leaf.dtype)
    # A copy even without a cast: a view of the mapped file would be unaligned, and would die with the file.
    return tensor.to(device=device, dtype=leaf.dtype, copy=True)


def _read_rows(file, key: str, leaf: Param, device: torch.device | str, rows: Rows) -> torch.Tensor:
    """Some rows of a tensor, or some columns of them, end to end."""
    lens = [end - first for first, end in rows.spans]
    rest = list(leaf.shape[1:]) if rows.columns == slice(None) else [rows.columns.stop - rows.columns.start]
    whole = torch.empty((sum(lens), *rest), dtype=leaf.dtype, device=device)
    for place, (first, end) in zip(whole.split(lens), rows.spans, strict=True):
        if end > first:
            place.copy_(file.get_rows(key, first, end, rows.columns))
    return whole


def _read_parts(files: dict, names: tuple[str, ...], leaf: Param, device: torch.device | str, rows: Rows | None = None) -> Any:
    """A stacked leaf, or some rows of it, filled part by part, so that it is in memory once."""
    if rows is not None and len(names) == 1 and len(leaf.shape) == 2:
        return _read_rows(files[names[0]], names[0], leaf, device, rows)
    if rows is not None:
        (first, end), each = rows.spans[0], len(names) // leaf.shape[0]
        if each * leaf.shape[0] != len(names):  # a part has rows of many experts
            return _read_parts(files, names, leaf, device)[first:end].clone()
        names, leaf = names[first * each : end * each], _some(leaf, (slice(first, end),))
        if not names:
            return torch.empty(leaf.shape, dtype=leaf.dtype, device=device)
    if any(isinstance(files[name], bnb_files.Packed) for name in names):
        return quant_parts.joined([_read(files[name], name, leaf, device) for name in names], leaf.shape)
    whole = torch.empty(leaf.shape, dtype=leaf.dtype, device=device)
    for name, place in expert_files.cut(whole, names).items():
        place.copy_(files[name].get_tensor(name))
    return whole
