"""The tables of quantised leaves: the numbers in [-1, 1] that 4-bit and 8-bit codes stand for, on each device once."""

import functools

import torch
from torch import Tensor

# Quantiles of a normal distribution with a zero. Source: Dettmers et al., arXiv 2305.14314, appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434,
    0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# A sign, two bits of exponent and one of mantissa, over the largest.
FP4 = tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))
CELLS = 65535  # of the grid that bitsandbytes' kernel for CPUs reads codes of 8 bits from


@functools.cache
def four_bits(kind: str, device: torch.device) -> Tensor:
    """float32 [16]: what the codes of a kind stand for."""
    return torch.tensor(NF4 if kind == "nf4" else FP4, dtype=torch.float32, device=device)


@functools.cache
def pairs(kind: str, device: torch.device) -> Tensor:
    """float32 [256, 2]: the two numbers in a byte of codes of 4 bits, the higher half first."""
    table, byte = four_bits(kind, device), torch.arange(256, device=device)
    return torch.stack([table[byte >> 4], table[byte & 15]], dim=1)


@functools.cache
def whole_pairs(device: torch.device) -> Tensor:
    """float32 [256, 2]: the two whole numbers from -8 to 7 in a byte, that of the lower half first."""
    byte = torch.arange(256, device=device)
    return torch.stack([byte & 15, byte >> 4], dim=1).float() - 8


@functools.cache
def eight_bits(device: torch.device, signed: bool = True) -> Tensor:
    """float32 [256], sorted: numbers of a moving exponent and what is left of 7 bits (unsigned: 8) for the fraction.

    Source: Dettmers, arXiv 1511.04561; Dettmers et al., arXiv 2110.02861, section 1.3.
    """
    return torch.tensor(_dynamic(7, 7 if signed else 8, signed), dtype=torch.float32, device=device)


def _dynamic(exponents: int, bits: int, signed: bool) -> list[float]:
    """Sorted: 0, 1, and the middles of equal parts of [0.1, 1], at each smaller exponent of half as many."""
    numbers = [0.0, 1.0]
    for exponent in range(exponents):
        bounds = torch.linspace(0.1, 1, 2 ** (exponent + bits - exponents) + 1, dtype=torch.float32)
        means = 10.0 ** (exponent - exponents + 1) * ((bounds[:-1] + bounds[1:]) / 2)
        numbers += [*means.tolist(), *((-means).tolist() if signed else ())]
    return sorted(numbers)


@functools.cache
def four_bit_moments(device: torch.device, signed: bool) -> Tensor:
    """float32 [16], sorted: what 4-bit codes of a moment stand for, dynamic where it is signed, and evenly in (0, 1] where it is not.

    Source: Li et al., arXiv 2309.01507, section 4.
    """
    numbers = _dynamic(3, 3, signed) if signed else torch.linspace(0, 1, 17)[1:].tolist()
    return torch.tensor(numbers, dtype=torch.float32, device=device)


@functools.cache
def grid_codes(signed: bool = True) -> Tensor:
    """uint8 [65536]: the code of eight_bits nearest to each of as many numbers evenly between -1 and 1."""
    table = eight_bits(torch.device("cpu"), signed)
    return nearest(torch.arange(CELLS + 1, dtype=torch.float32) * (2 / CELLS) - 1, table)


def nearest(numbers: Tensor, table: Tensor) -> Tensor:
    """uint8: the entry of a sorted table nearest to each number, the lower one of two."""
    return torch.bucketize(numbers, (table[:-1] + table[1:]) / 2, out_int32=True).to(torch.uint8)


@functools.cache
def fp8(device: torch.device) -> Tensor:
    """float32 [256]: what the bytes of float8 e4m3 stand for. On a CPU a cast takes three times as long."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)
