"""Quantised leaves from their parts, cut by rows and put together: what files hold otherwise than a model has it."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from treetune.core import quant
from treetune.core.quant import FOUR_BITS, Kind, Origin, Quantised

UNKNOWN = Origin("", torch.zeros(0))


def leaf(
    kind: Kind,
    shape: Sequence[int],
    dtype: torch.dtype,
    codes: Tensor,
    scale: Tensor,
    *,
    nested: Tensor | None = None,
    offset: Tensor | None = None,
    block: int = quant.BLOCK,
) -> Quantised:
    """A leaf of these tensors. What it was quantised from is not known: its origin is the parts, with numbers of its dense form."""
    return _with_origin(Quantised(kind, torch.Size(shape), dtype, codes, scale, nested, offset, UNKNOWN, block))


def split(whole: Quantised, rows: Sequence[int]) -> list[Quantised | Tensor]:
    """Blocks of consecutive rows [r, I] of a matrix; dense ones where a block of 4-bit codes, or a byte, would be in two of them."""
    width = whole.shape[1]
    if whole.kind not in FOUR_BITS:
        parts = zip(rows, whole.codes.split(list(rows)), whole.scale.split(list(rows)), strict=True)
        return [leaf(whole.kind, (r, width), whole.dtype, c.clone(), s.clone(), block=whole.block) for r, c, s in parts]
    if any(count * width % whole.block for count in rows):
        return [part.clone() for part in quant.dense(whole).split(list(rows))]
    codes = whole.codes.split([count * width // 2 for count in rows])
    scale = quant.absmax(whole).split([count * width // whole.block for count in rows])
    cut = zip(rows, codes, scale, strict=True)
    return [leaf(whole.kind, (r, width), whole.dtype, c.clone(), s.clone(), block=whole.block) for r, c, s in cut]


def joined(parts: Sequence[Quantised | Tensor], shape: Sequence[int]) -> Quantised | Tensor:
    """Matrices of one width, their rows one after another, as a leaf of this shape; dense where they do not fit together in codes."""
    first = parts[0]
    alike = quant.quantised(first) and all(quant.quantised(part) and _alike(part, first) for part in parts)
    leaves = [part for part in parts if quant.quantised(part)]
    if not quant.quantised(first) or not alike:
        return torch.cat([_dense(part) for part in parts]).view(*shape)
    if len(leaves) == 1:
        return _shaped(first, shape)
    codes = torch.cat([part.codes for part in leaves])
    if first.kind in FOUR_BITS:
        scale = torch.cat([quant.absmax(part) for part in leaves])
        return leaf(first.kind, shape, first.dtype, codes, scale, block=first.block)
    scale = torch.cat([part.scale for part in leaves])
    return _shaped(leaf(first.kind, (len(scale), shape[-1]), first.dtype, codes, scale, block=first.block), shape)


def _dense(part: Quantised | Tensor) -> Tensor:
    return part if isinstance(part, Tensor) else quant.dense(part)


def _alike(part: Quantised, first: Quantised) -> bool:
    whole = part.kind not in FOUR_BITS or part.numel() % part.block == 0
    return part[:1] == first[:1] and part.block == first.block and whole


def _shaped(one: Quantised, shape: Sequence[int]) -> Quantised:
    if one.kind in FOUR_BITS:
        return one._replace(shape=torch.Size(shape))
    codes, scale = (part.view(*shape[:-1], *part.shape[1:]) for part in (one.codes, one.scale))
    return one._replace(shape=torch.Size(shape), codes=codes, scale=scale)


def _with_origin(made: Quantised) -> Quantised:
    total = hashlib.sha256(f"{made.kind} {tuple(made.shape)} {made.block}".encode())
    for part in made.parts():
        total.update(part.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return made._replace(origin=Origin(total.hexdigest(), quant.spread(quant.dense(made, torch.float32))))
