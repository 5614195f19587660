"""Counter-based noise: a pure function of integer keys, so packing, order and restarts never change it.

T tokens, C columns. key[t] identifies a token of the data set at a step; `stream` separates uses within a model.
Dropout on CUDA is one kernel, which reads x once, writes the result once and makes the numbers on the way: T C (2 + 2) bytes in bfloat16,
where the formula's passes over int64 [T, C] move 80 times that. Its backward pass makes them again and keeps the keys only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from treetune.ops import backend
from treetune.ops.backend import tl

BLOCK = 1024  # numbers of a program

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


def _columns(key: Tensor, columns: int, stream: int, first: int = 0) -> Tensor:
    """int64 [C]: what tells the columns of a stream apart."""
    offset = torch.full((), stream + 1, device=key.device) * _GOLD  # wraps, as a Python integer would not
    return _mix(torch.arange(first, first + columns, device=key.device) + offset)


def uniform(key: Tensor, columns: int, *, stream: int = 0, first: int = 0) -> Tensor:
    """float32 in [0, 1) with 24 random bits: key [T] -> [T, columns], those of the columns from `first` on."""
    bits = _mix(key[:, None] ^ _columns(key, columns, stream, first)) >> 40  # [T, C], 24 bits, signed
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


@backend.jit
def _dropout_kernel(x, key, column, out, columns, rate, share, BLOCK: tl.constexpr):
    blocks = tl.cdiv(columns, BLOCK)  # of a row
    row = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    at, inside = row * columns + c, c < columns
    z = tl.load(key + row) ^ tl.load(column + c, inside, 0)
    # `_mix`, whose constants a kernel cannot read from the module.
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    z = z ^ ((z >> 31) & 0x1FFFFFFFF)
    uniform = ((z >> 40) & 0xFFFFFF).to(tl.float32) * (1 / 16777216)
    value = tl.load(x + at, inside, 0).to(tl.float32) / share
    tl.store(out + at, tl.where(uniform >= rate, value, 0.0), inside)


def dropout_triton(x: Tensor, key: Tensor, rate: float, stream: int, first: int = 0) -> Tensor:
    """What `dropout` gives, by one kernel."""
    x, (tokens, columns) = x.contiguous(), x.shape
    out = torch.empty_like(x)
    if x.numel():
        launch = backend.launch(_dropout_kernel, (tokens * -(-columns // BLOCK),))
        launch(x, key.contiguous(), _columns(key, columns, stream, first), out, columns, rate, 1.0 - rate, BLOCK=BLOCK)
    return out


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(x, key, rate, stream, first):
        return dropout_triton(x, key, rate, stream, first)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])
        ctx.options = inputs[2:]

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return dropout_triton(g, ctx.saved_tensors[0], *ctx.options), None, None, None, None


def dropout(x: Tensor, key: Tensor, *, rate: float, stream: int = 0, first: int = 0) -> Tensor:
    """x [T, C] with each entry zeroed with probability `rate` and the rest scaled by 1 / (1 - rate).

    first: the column of the stream that x begins with, where it is a part of more.
    """
    if backend.use_triton(x):
        return _Dropout.apply(x, key, rate, stream, first)
    keep = uniform(key, x.shape[-1], stream=stream, first=first) >= rate
    return torch.where(keep, x / (1.0 - rate), 0.0)
