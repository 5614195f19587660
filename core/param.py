"""`Param`: a leaf of an abstract tree, which drives initialisation, sharding, key mapping and counting."""

import hashlib
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from treetune.core import tree

Params = dict


class Param(NamedTuple):
    """A weight before it is allocated: shape, dtype, a name for each dimension, and its initialisation.

    `init` is "zeros", "ones", "normal:STD" or "kaiming" (uniform in +-1/sqrt(fan_in), what PEFT gives a LoRA A). `op` names what reads
    a matrix that a low-rank adapter may sit on: "linear" (y = x W^T in a layer), "embedding", "head", "router", or "experts", a stack of
    matrices; empty for all other leaves. `trains` is false for what no gradient reaches whatever the data, as a router's bias of choice.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    axes: tuple[str, ...] = ()
    init: str = "normal:0.02"
    op: Literal["linear", "embedding", "head", "router", "experts", ""] = ""
    trains: bool = True


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any printable parts: the only source of randomness is (seed, step, rank, purpose)."""
    digest = hashlib.blake2b("/".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch's generators take a signed 64-bit seed


def _start(path: str, param: Param, seed: int) -> Tensor:
    kind, _, value = param.init.partition(":")
    if kind in ("zeros", "ones"):
        return getattr(torch, kind)(param.shape, dtype=param.dtype)
    # On the CPU and by path: the same weights on every device, whatever other leaves the tree has.
    generator = torch.Generator().manual_seed(seed_of(seed, path))
    if kind == "normal":
        return (torch.randn(param.shape, generator=generator) * float(value)).to(param.dtype)
    if kind == "kaiming":
        bound = 1.0 / math.sqrt(param.shape[-1])
        return ((torch.rand(param.shape, generator=generator) * 2 - 1) * bound).to(param.dtype)
    raise ValueError(f"{path}: unknown init {param.init!r}; expected zeros, ones, normal:STD or kaiming")


def as_is(path: str, leaf: Tensor) -> Tensor:
    """The leaf itself."""
    return leaf


def init(abstract: Params, *, seed: int, keep: Callable[[str, Tensor], Tensor] = as_is) -> Params:
    """Tensors for an abstract tree; each leaf depends on the seed and its own path only. keep: what becomes of it as soon as it is made."""
    filled = iter([keep(path, _start(path, param, seed)) for path, param in tree.items(abstract)])
    return tree.map(lambda _: next(filled), abstract)


def count(params: Params) -> int:
    """Number of scalars in a tree of `Param`s or tensors."""
    return sum(math.prod(leaf.shape) for leaf in tree.leaves(params))
