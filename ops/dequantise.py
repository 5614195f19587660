"""Codes of 4 bits to numbers: w = table[code] * absmax of its block.

n numbers, n / 2 bytes of codes, the earlier number in the higher half. Bytes moved: n / 2 and 4 n / block read, n of the result's dtype
written; the table of 16 stays in registers. One program makes some bytes' worth of numbers; no reduction, so it is repeatable.
Source: Dettmers et al., arXiv 2305.14314, equation 6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from treetune.ops import backend
from treetune.ops.backend import tl

BYTES = 1024  # of codes that a program reads


def four_bits_ref(codes: Tensor, absmax: Tensor, table: Tensor, shape: torch.Size, block: int, dtype: torch.dtype) -> Tensor:
    """The formula."""
    numbers = torch.stack([table[(codes >> 4).int()], table[(codes & 15).int()]], dim=1).view(-1)[: shape.numel()]
    return (numbers * absmax.repeat_interleave(block)[: numbers.numel()]).to(dtype).view(shape)


@backend.jit
def _four_bits_kernel(codes, absmax, table, out, count, BLOCK: tl.constexpr, BYTES: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    byte = tl.load(codes + at, 2 * at < count, 0).to(tl.int32)
    scale = tl.load(absmax + 2 * at // BLOCK, 2 * at < count, 0)  # blocks have even sizes: the halves of a byte are in the same
    numbers = tl.interleave(tl.load(table + (byte >> 4)) * scale, tl.load(table + (byte & 15)) * scale)
    at_number = tl.program_id(0).to(tl.int64) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    tl.store(out + at_number, numbers, at_number < count)


def four_bits_triton(codes: Tensor, absmax: Tensor, table: Tensor, shape: torch.Size, block: int, dtype: torch.dtype) -> Tensor:
    """The formula by one kernel."""
    out, n = torch.empty(shape, dtype=dtype, device=codes.device), shape.numel()
    programs = -(-codes.numel() // BYTES)
    backend.launch(_four_bits_kernel, (programs,))(codes, absmax, table, out, n, BLOCK=block, BYTES=BYTES)
    return out


def by_kernel(codes: Tensor) -> bool:
    """Whether codes become numbers all at once: by a kernel, or where they are only counted."""
    return codes.is_cuda or backend.counted()


def four_bits(codes: Tensor, absmax: Tensor, table: Tensor, shape: torch.Size, block: int, dtype: torch.dtype) -> Tensor:
    """codes uint8 [ceil(n / 2)], absmax float32 [ceil(n / block)], table float32 [16] -> numbers of a shape, rounded once to dtype."""
    if backend.counted():
        out = torch.empty(shape, dtype=dtype, device=codes.device)
        backend.tell("four_bits", codes, absmax, out)
        return out
    run = four_bits_triton if backend.use_triton(absmax) else four_bits_ref
    return run(codes, absmax, table, shape, block, dtype)
