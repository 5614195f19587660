"""Quantised leaves of which ranks have parts: whole rows of them, or whole blocks, with the statistics of these.

Such a leaf has DTensors: codes and scale with the rows of the leaf, [..., R, I / 2] and [..., R, I / block] in 4 bits; where a row is not
made of whole blocks these are [blocks, block / 2], the last one padded, and [blocks]. Maxima of maxima are split along `data`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from treetune.core import quant, quant_tables, shard
from treetune.core.quant import FOUR_BITS, NESTED_BLOCK, Quantised

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_CODES = {"int4": torch.uint8, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
PIECES = ("codes", "scale", "nested")  # the tensors of a leaf that ranks have parts of


def split(leaf: Any) -> bool:
    """Whether a leaf is quantised, and ranks have parts of it."""
    return quant.quantised(leaf) and shard.distributed(leaf.codes)


def pieces(leaf: Quantised) -> dict[str, Any]:
    """The tensors of a leaf that is split, by name."""
    return {name: part for name in PIECES if (part := getattr(leaf, name)) is not None}


def refusal(leaf: Quantised, dim: int, size: int) -> str:
    """Why a leaf is not split into so many parts along a dimension that layers compute with; empty where no block would be in two."""
    width, columns = leaf.shape[-1], dim == leaf.ndim - 1
    if leaf.kind in ("int8", "fp8") or (leaf.kind == "int4" and not columns) or width % (leaf.block * (size if columns else 1)) == 0:
        return ""
    each = f", and {width // size} of them are" if columns and width % leaf.block == 0 else " are"
    return f"its rows of {width} numbers{each} no whole blocks of {leaf.block}, as {leaf.kind} has"


def distribute(leaf: Quantised, device_mesh: DeviceMesh, specs: tuple) -> Quantised:
    """This rank's part of a whole leaf, placed as a dense one of its shape would be; one that is split is as it is.

    Along `tensor` that is to be what `refusal` has nothing against.
    """
    if split(leaf) or not any(spec.is_shard() for spec in specs):
        return leaf
    from torch.distributed.tensor import Replicate, Shard

    names = device_mesh.mesh_dim_names or ("",) * device_mesh.ndim
    tall = [spec if not spec.is_shard() or spec.dim == 0 or _by_rows(leaf) else Shard(0) for spec in specs]
    # The scale of a row belongs to all columns of it.
    scales = [Replicate() if spec.is_shard() and spec.dim >= leaf.scale.ndim and leaf.kind in ("int8", "fp8") else spec for spec in tall]
    maxima = [Replicate() if name == shard.TENSOR or not spec.is_shard() else Shard(0) for name, spec in zip(names, tall, strict=True)]
    codes, scale = _laid(leaf)
    placed = zip((codes, scale, leaf.nested), (tall, scales, maxima), strict=True)
    parts = [None if part is None else _apart(shard.distribute(part, device_mesh, tuple(spec))) for part, spec in placed]
    return leaf._replace(**dict(zip(PIECES, parts, strict=True)))


def _apart(part: Any) -> Any:
    """A part in memory of its own, not that of the whole tensor."""
    own = shard.local(part)
    return part if own.untyped_storage().nbytes() == own.nbytes else shard.rewrap(own.clone(), part)


def _by_rows(leaf: Quantised) -> bool:
    """Whether every row begins with a block."""
    return leaf.kind not in FOUR_BITS or leaf.shape[-1] % leaf.block == 0


def _laid(leaf: Quantised) -> tuple[Tensor, Tensor]:
    """Codes and scale of a whole leaf, as ranks split them."""
    if leaf.kind not in FOUR_BITS:
        return leaf.codes.view(torch.uint8), leaf.scale  # gloo sends no float8
    if _by_rows(leaf):
        return leaf.codes.view(*leaf.shape[:-1], -1), leaf.scale.view(*leaf.shape[:-1], -1)
    missing = len(leaf.scale) * leaf.block // 2 - len(leaf.codes)
    return torch.nn.functional.pad(leaf.codes, (0, missing)).view(len(leaf.scale), -1), leaf.scale


def own_box(leaf: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and first places of what the layers of this rank compute with: a leaf that is whole along all axes but `tensor`."""
    if not shard.split_along(leaf, shard.TENSOR):
        return tuple(leaf.shape), (0,) * leaf.ndim
    from torch.distributed.tensor import Replicate

    specs = [spec if name == shard.TENSOR else Replicate() for name, spec in zip(shard.axes(leaf), leaf.placements, strict=True)]
    return shard.part_of(tuple(leaf.shape), leaf.device_mesh, specs)


def joined(leaf: Quantised, of: Mapping[str, Tensor]) -> Quantised:
    """The leaf of pieces that are whole, or whole along all axes but `tensor`: the part of this rank's layers, a leaf by itself."""
    codes, scale, nested = of["codes"], of["scale"], of.get("nested")
    if leaf.kind not in FOUR_BITS:
        same = codes.shape[-1] == leaf.codes.shape[-1]
        width = leaf.shape[-1] if same else codes.shape[-1] * (2 if leaf.kind == "int4" else 1)
        return leaf._replace(shape=torch.Size((*codes.shape[:-1], width)), codes=codes.view(_CODES[leaf.kind]), scale=scale)
    if not _by_rows(leaf) or codes.shape == leaf.codes.shape:
        return leaf._replace(codes=codes.reshape(-1)[: -(-leaf.numel() // 2)], scale=scale.reshape(-1), nested=nested)
    shape = torch.Size((*codes.shape[:-1], codes.shape[-1] * 2))
    scale = scale if nested is None else _maxima(leaf, scale, nested)
    return leaf._replace(shape=shape, codes=codes.reshape(-1), scale=scale.reshape(-1), nested=None, offset=None)


def _maxima(leaf: Quantised, scale: Tensor, nested: Tensor) -> Tensor:
    """float32: the maxima of the blocks of a part of a leaf, of their codes in 8 bits."""
    size, first = own_box(leaf.scale)
    box = tuple(slice(begin, begin + count) for begin, count in zip(first, size, strict=True))
    largest = nested.repeat_interleave(NESTED_BLOCK)[: leaf.scale.numel()].view(leaf.scale.shape)[box]
    assert leaf.offset is not None
    return quant_tables.eight_bits(scale.device)[scale.int()] * largest + leaf.offset


def whole(leaf: Quantised) -> Quantised:
    """A leaf that every rank has whole: a collective where it is split."""
    return joined(leaf, {name: shard.full(part) for name, part in pieces(leaf).items()}) if split(leaf) else leaf


def own(leaf: Quantised, gather: Callable[[list[Any]], list[Tensor]]) -> Quantised:
    """What the layers of this rank compute with, of pieces that `gather` makes whole along all axes but `tensor`."""
    if not split(leaf):
        return leaf
    parts = pieces(leaf)
    return joined(leaf, dict(zip(parts, gather(list(parts.values())), strict=True)))
