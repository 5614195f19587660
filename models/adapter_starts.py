"""How the pairs of a fresh adapter start: as nothing at all, or as the strongest part of their weight.

W [O, I], A [r, I], B [O, r], s the scale. "default" is PEFT's: A uniform, B zero. PiSSA takes the r largest singular values of W,
s B A = U S V^T, and OLoRA r rows of W = Q R; what trains is then W - s B0 A0 + s B A, see `lora_use`. LoftQ takes those of what
quantising loses, s B A = SVD_r(W - Q), and is the only one that moves the model: towards the dense one.
Source: Meng et al. (PiSSA), arXiv 2404.02948; Büyükakyüz (OLoRA), arXiv 2406.01775; Li et al. (LoftQ), arXiv 2310.08659, one round.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from treetune.core import lora, param, quant, shard, tree
from treetune.core.lora import Lora
from treetune.core.param import Params
from treetune.core.quant import Quantised
from treetune.models.quantised import See

Init = Literal["default", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "pissa_niter_16", "olora", "loftq"]
Pair = tuple[Tensor, Tensor]
Reread = Callable[[See], object]  # reads a model again, and tells of each leaf that is quantised
MOVED = ("pissa", "pissa_niter_4", "pissa_niter_16", "olora")  # starts that are taken off the weight again
OVERSAMPLED = 8  # further directions of a randomised decomposition


def check(init: str, paths: list[str], *, ranks: Mapping[str, int], dropout: float, start: str | None) -> None:
    """Raise ValueError, naming the option, for a start that these leaves, ranks or options cannot have."""
    if init in ("default", "gaussian"):
        return
    if start is not None:
        raise ValueError(f"lora_init {init}: an adapter that is trained further has its start; leave it out")
    if odd := [path for path in paths if not lora.in_layer(path)]:
        raise ValueError(f"lora_init {init} is computed on linear layers only, and {odd[0]} is none: leave it out of the targets")
    if init == "orthogonal" and (odd := [path for path in paths if ranks[path] % 2]):
        raise ValueError(f"lora_init orthogonal needs an even rank, and that of {odd[0]} is {ranks[odd[0]]}")
    if init in MOVED and dropout:
        raise ValueError(f"lora_init {init} needs lora_dropout 0, got {dropout:g}: dropout would drop parts of the weight itself")


def start(model: Params, low: Lora, *, init: str, seed: int, reread: Reread | None = None) -> tuple[Params, Params]:
    """The pairs of a fresh adapter by `init`, and of them those that are taken off their weight again (empty where none are).

    reread: for LoftQ. Errors: ValueError for a rank that a weight does not have, and for LoftQ on a model that is not quantised.
    """
    pairs, scales = lora.pairs(low.tree), {path: low.scale * ratio for path, ratio in low.ratios}
    if init == "loftq":
        return _loftq(low, scales, reread), {}
    leaves, starts = dict(tree.items(model)), {}
    for path, (a, b) in pairs.items():
        scale = scales.get(path, low.scale)
        if init in ("gaussian", "orthogonal"):
            starts[path] = _random(init, path, a, b, seed)
        else:
            weight = shard.gather(leaves[path], torch.float32)
            _check_rank(init, path, a, b)
            starts[path] = (
                _qr(weight, a.shape[0]) if init == "olora" else _largest(weight, a.shape[0], scale, init, param.seed_of(seed, path))
            )
    tree_ = lora.of(starts, low.tree)
    return tree_, tree_ if init in MOVED else {}


def _check_rank(init: str, path: str, a: Tensor, b: Tensor) -> None:
    if a.shape[0] > (most := min(a.shape[1], b.shape[0])):
        raise ValueError(f"lora_init {init}: rank {a.shape[0]} on {path}, which has rank {most} at most")


def _random(init: str, path: str, a: Tensor, b: Tensor, seed: int) -> Pair:
    """PEFT's random starts, on the CPU and by path. gaussian: A of deviation 1 / r; orthogonal: B A = 0 though neither is."""
    if path == "embed_tokens":
        return a, b
    rank, generator = a.shape[-2], torch.Generator().manual_seed(param.seed_of(seed, path, init))
    if init == "gaussian":
        return torch.randn(a.shape, generator=generator) / rank, b
    basis = torch.linalg.qr(torch.randn(rank, rank, generator=generator))[0]
    left, right = (torch.randn(size, rank // 2, generator=generator) / 10 for size in (a.shape[1], b.shape[0]))
    return (left @ basis[0::2]).T.contiguous(), right @ basis[1::2]


def _largest(weight: Tensor, rank: int, scale: float, init: str, seed: int) -> Pair:
    """(A, B) with s B A the best approximation of a weight by this rank, each with the roots of the singular values."""
    u, s, v = _singular(weight, rank, init, seed)
    # The signs of a decomposition are the library's choice: the largest number of each column of U is positive.
    sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    root = (s / scale).sqrt()
    return (root[:, None] * (v * sign).T).contiguous(), (u * sign * root).contiguous()


def _singular(weight: Tensor, rank: int, init: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [O, r], S [r], V [I, r] of a weight; by `niter` rounds of subspace iteration from random directions where init says so."""
    if "_niter_" not in init:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :rank], s[:rank], v[:rank].T
    width, rounds = min(rank + OVERSAMPLED, *weight.shape), int(init.rpartition("_")[2])
    drawn = torch.randn(weight.shape[1], width, generator=torch.Generator().manual_seed(seed)).to(weight.device)
    basis = torch.linalg.qr(weight @ drawn)[0]
    for _ in range(rounds):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis)[0])[0]
    u, s, v = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], v[:rank].T


def _qr(weight: Tensor, rank: int) -> Pair:
    """(A, B): the first r rows of R and columns of Q, W = Q R."""
    q, r = torch.linalg.qr(weight)
    return r[:rank].contiguous(), q[:, :rank].contiguous()


def _loftq(low: Lora, scales: Mapping[str, float], reread: Reread | None) -> Params:
    pairs, starts = lora.pairs(low.tree), {}

    def see(path: str, leaf: Tensor, kept: Quantised) -> None:
        if path in pairs:
            a, b = pairs[path]
            _check_rank("loftq", path, a, b)
            starts[path] = _largest(leaf.float() - quant.dense(kept, torch.float32), a.shape[0], scales.get(path, low.scale), "loftq", 0)

    if reread is not None:
        reread(see)
    if odd := next((path for path in pairs if path not in starts), None):
        raise ValueError(
            f"lora_init loftq starts from what quantising loses, and {odd} was not quantised as it was read: give quant and a dense model"
        )
    return lora.of(starts, low.tree)


def ratios(low: Lora, ranks: Mapping[str, int], alphas: Mapping[str, float], *, rslora: bool) -> tuple[tuple[str, float], ...]:
    """(path, scale of its rank and alpha over the common one), of the paths where it is another."""
    scales = {path: lora.scale(rank=ranks[path], alpha=alphas[path], rslora=rslora) for path in ranks}
    return tuple((path, scale / low.scale) for path, scale in scales.items() if not math.isclose(scale, low.scale, rel_tol=1e-12))
