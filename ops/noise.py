"""Counter-based noise: a pure function of integer keys, so packing, order and restarts never change it.

T tokens, C columns. key[t] identifies a token of the data set at a step; `stream` separates uses within a model.
"""

import torch
from torch import Tensor

_MUL1, _MUL2, _GOLD = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, -0x61C8864680B583EB  # splitmix64, as signed int64
_MASKS = {30: (1 << 34) - 1, 27: (1 << 37) - 1, 31: (1 << 33) - 1}


def _mix(z: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64 (products wrap; shifts are made logical by a mask). Source: Steele et al. 2014."""
    z = (z ^ ((z >> 30) & _MASKS[30])) * _MUL1
    z = (z ^ ((z >> 27) & _MASKS[27])) * _MUL2
    return z ^ ((z >> 31) & _MASKS[31])


def keys(*parts: Tensor | int) -> Tensor:
    """One int64 key from several integer parts, broadcast together: keys(seed, document [T], branch [T], position [T]) -> [T]."""
    tensors = [torch.as_tensor(part, dtype=torch.int64) for part in parts]
    device = next((t.device for t in tensors if t.ndim), tensors[0].device)
    key = torch.zeros((), dtype=torch.int64, device=device)
    for part in tensors:
        part = part.to(device, non_blocking=device.type == "cuda")  # a copy to the host must be whole before it is read
        key = _mix((key ^ part) + _GOLD)
    return key


def uniform(key: Tensor, columns: int, *, stream: int = 0) -> Tensor:
    """float32 in [0, 1) with 24 random bits: key [T] -> [T, columns]."""
    offset = torch.full((), stream + 1, device=key.device) * _GOLD  # wraps, as a Python integer would not
    column = _mix(torch.arange(columns, device=key.device) + offset)  # [C]
    bits = _mix(key[:, None] ^ column) >> 40  # [T, C], 24 bits, signed
    return ((bits & 0xFFFFFF).float()) * 2.0**-24


def normal(key: Tensor, columns: int) -> Tensor:
    """Standard normal float32: key [T] -> [T, columns]. Source: Box & Muller 1958."""
    radius = (-2 * torch.log1p(-uniform(key, columns))).sqrt()  # of 1 - u, which is never 0
    return radius * torch.cos(2 * torch.pi * uniform(key, columns, stream=1))


def words(key: Tensor, columns: int, *, first: int = 0) -> Tensor:
    """int32 in [0, 65536): key [T] -> [T, columns], those of the columns from `first` on, four of each hash."""
    begin, end = first // 4, -(-(first + columns) // 4)
    column = _mix(torch.arange(begin, end, device=key.device) + _GOLD)
    bits = _mix(key[:, None] ^ column)  # [T, hashes]
    return bits.view(torch.int16)[:, first - 4 * begin : first - 4 * begin + columns].int() & 0xFFFF


def dropout(x: Tensor, key: Tensor, *, rate: float, stream: int = 0) -> Tensor:
    """x [T, C] with each entry zeroed with probability `rate` and the rest scaled by 1 / (1 - rate)."""
    keep = uniform(key, x.shape[-1], stream=stream) >= rate
    return torch.where(keep, x / (1.0 - rate), 0.0)
