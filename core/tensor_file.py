"""Safetensors files whose tensors are made and written one after another, so that one of them is in memory at a time.

Such a file is a header (8 bytes of its length, then JSON) and the bytes of all tensors: with shapes and dtypes known beforehand, each
tensor can be written in its place as soon as it is there.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from treetune.core.param import Param


def write(path: Path, sizes: Mapping[str, Param], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """A safetensors file of tensors that come in any order, each with the shape and the dtype of its size."""
    header, places = _header(sizes)
    with path.open("wb") as file:
        file.write(header)
        for key, tensor in tensors:
            size = sizes.get(key)
            assert size is not None and tuple(tensor.shape) == tuple(size.shape) and tensor.dtype == size.dtype, key
            file.seek(len(header) + places.pop(key))
            file.write(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    assert not places, f"{min(places)} has not come"


def _header(sizes: Mapping[str, Param]) -> tuple[bytes, dict[str, int]]:
    """The header, and where behind it each tensor begins."""
    from safetensors.torch import save

    # The library says in which order tensors are and how it names their dtypes: a file of empty ones has both.
    empty = save({key: torch.empty(0, dtype=leaf.dtype) for key, leaf in sizes.items()}, metadata={"format": "pt"})
    table, end, places = json.loads(empty[8 : 8 + int.from_bytes(empty[:8], "little")]), 0, {}
    for key, entry in table.items():
        if key == "__metadata__":
            continue
        places[key], shape = end, list(sizes[key].shape)
        end += torch.Size(shape).numel() * sizes[key].dtype.itemsize
        entry |= {"shape": shape, "data_offsets": [places[key], end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places
