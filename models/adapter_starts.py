"""How the pairs of a fresh adapter start: as nothing at all, or as the strongest part of their weight.

W [O, I], A [r, I], B [O, r], s the scale. "default" is PEFT's: A uniform, B zero. PiSSA takes the r largest singular values of W,
s B A = U S V^T, and OLoRA r rows of W = Q R; what trains is then W - s B0 A0 + s B A, see `lora_use`. CorDA takes W by the covariance
C of its inputs, W C = U S V^T and s B A = U_r S_r V_r^T C^-1: of the r least singular values (knowledge of these rows is kept), or by "ipm"
of the r largest (these rows are learned). LoftQ and QERA move the model, towards the dense one: by what quantising loses, L = W - Q,
s B A = SVD_r(L), and by what it loses as inputs of covariance C = R R see it, s B A = SVD_r(L R) R^-1, which is U U^T L with U the r
leading eigenvectors of L C L^T.
Source: Meng et al. (PiSSA), arXiv 2404.02948; Büyükakyüz (OLoRA), arXiv 2406.01775; Li et al. (LoftQ), arXiv 2310.08659, one round; Zhang
et al. (QERA, the exact form), arXiv 2410.06040; Yang et al. (CorDA), arXiv 2406.05223.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from treetune.core import lora, param, quant, shard, tree
from treetune.core.lora import Lora
from treetune.core.param import Params
from treetune.core.quant import Quantised
from treetune.models.quantised import See

Init = Literal[
    "default", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "pissa_niter_16", "olora", "loftq", "qera", "corda", "corda_ipm"
]  # fmt: skip
Pair = tuple[Tensor, Tensor]
Reread = Callable[[See], object]  # reads a model again, and tells of each leaf that is quantised
Inputs = Callable[[Sequence[str]], Iterable[tuple[str, Tensor]]]  # the covariance [I, I] of the inputs of each linear layer
MOVED = ("pissa", "pissa_niter_4", "pissa_niter_16", "olora", "corda", "corda_ipm")  # starts that are taken off the weight again
HEALING = ("loftq", "qera")  # starts that move a quantised model towards the dense one
OVERSAMPLED = 8  # further directions of a randomised decomposition
ROUNDS, AT_ONCE = 20, 2**32  # of subspace iteration; bytes of covariances that wait for their weights
DAMPING, INVERSE_ERROR = 0.01, 0.05  # PEFT's: of the mean variance; of C C^-1


class Given(NamedTuple):
    """What starts are computed from besides weights. reread: for LoftQ and QERA; inputs: for CorDA and QERA."""

    reread: Reread | None = None
    inputs: Inputs | None = None


WEIGHTS_ALONE = Given()


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


def start(model: Params, low: Lora, *, init: str, seed: int, given: Given = WEIGHTS_ALONE) -> tuple[Params, Params]:
    """The pairs of a fresh adapter by `init`, and of them those that are taken off their weight again (empty where none are).

    Errors: ValueError for a rank that a weight does not have, for LoftQ or QERA on a model that is not quantised, and for CorDA or QERA
    without rows.
    """
    pairs, scales = lora.pairs(low.tree), {path: low.scale * ratio for path, ratio in low.ratios}
    if init == "loftq":
        return _loftq(low, scales, given.reread), {}
    if init == "qera":
        return _qera(low, scales, given), {}
    if init.startswith("corda"):
        tree_ = _corda(model, low, scales, init, given.inputs)
        return tree_, tree_
    leaves, starts = dict(tree.items(model)), {}
    for path, (a, b) in pairs.items():
        scale = scales.get(path, low.scale)
        if init in ("gaussian", "orthogonal"):
            starts[path] = _random(init, path, a, b, seed)
        else:
            weight = shard.whole(leaves[path], torch.float32)
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
    return _split(*_singular(weight, rank, init, seed), scale)


def _split(u: Tensor, s: Tensor, v: Tensor, scale: float) -> Pair:
    """(A, B) with s B A = U S V^T, each with the roots of the singular values."""
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


def _corda(model: Params, low: Lora, scales: Mapping[str, float], init: str, inputs: Inputs | None) -> Params:
    pairs, leaves, starts = lora.pairs(low.tree), dict(tree.items(model)), {}
    for path, (a, b) in pairs.items():
        _check_rank(init, path, a, b)
    for path, covariance in _measured(init, inputs)(list(pairs)):
        weight, rank = shard.whole(leaves[path], covariance.dtype), pairs[path][0].shape[0]
        fixed, inverse = _inverted(covariance)
        u, s, vh = torch.linalg.svd(weight @ fixed, full_matrices=False)
        chosen = slice(0, rank) if init == "corda_ipm" else slice(len(s) - rank, len(s))
        starts[path] = _split(u[:, chosen], s[chosen], (vh[chosen] @ inverse).T, scales.get(path, low.scale))
    return lora.of({path: (a.float(), b.float()) for path, (a, b) in starts.items()}, low.tree)


def _measured(init: str, inputs: Inputs | None) -> Inputs:
    if inputs is None:
        other = "loftq" if init in HEALING else "pissa"
        raise ValueError(f"lora_init {init} starts from rows of the training data, and there are none: choose {other}, which needs no rows")
    return inputs


def _inverted(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """C and C^-1, damped until one undoes the other."""
    damping, one = DAMPING, torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    while True:
        fixed = covariance + damping * covariance.diagonal().mean() * one
        inverse = torch.linalg.inv(fixed)
        if torch.dist(fixed @ inverse, one) < INVERSE_ERROR:
            return fixed, inverse
        damping *= 2


def _loftq(low: Lora, scales: Mapping[str, float], reread: Reread | None) -> Params:
    pairs, starts = lora.pairs(low.tree), {}

    def see(path: str, leaf: Tensor, kept: Quantised) -> None:
        if path in pairs:
            rank = _rank("loftq", path, pairs)
            starts[path] = _largest(leaf.float() - quant.dense(kept, torch.float32), rank, scales.get(path, low.scale), "loftq", 0)

    if reread is not None:
        reread(see)
    return _healing("loftq", low, starts)


def _qera(low: Lora, scales: Mapping[str, float], given: Given) -> Params:
    """As many covariances at a time as `input_covariances` measures at once: the dense weights are read again for each lot."""
    pairs, starts, waiting = lora.pairs(low.tree), {}, dict[str, Tensor]()

    def see(path: str, leaf: Tensor, kept: Quantised) -> None:
        if path in waiting:
            lost, rank = leaf.double() - quant.dense(kept, torch.float64), _rank("qera", path, pairs)
            starts[path] = _projected(lost, waiting.pop(path).double(), rank, scales.get(path, low.scale), param.seed_of(0, path))

    for path, covariance in _measured("qera", given.inputs)(list(pairs)):
        waiting[path] = covariance
        if given.reread is not None and (len(waiting) + len(starts) == len(pairs) or sum(c.nbytes for c in waiting.values()) > AT_ONCE):
            given.reread(see)
    return _healing("qera", low, {path: (a.float(), b.float()) for path, (a, b) in starts.items()})


def _projected(lost: Tensor, covariance: Tensor, rank: int, scale: float, seed: int) -> Pair:
    """(A, B) with s B A = U U^T L, U by subspace iteration on L C L^T [O, O], which is never made; A and B of equal norms."""
    width = min(rank + OVERSAMPLED, lost.shape[0])
    start = torch.randn(lost.shape[0], width, generator=torch.Generator().manual_seed(seed), dtype=lost.dtype).to(lost.device)
    basis = torch.linalg.qr(start)[0]
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(lost @ (covariance @ (lost.T @ basis)))[0]
    seen = basis.T @ lost
    u = basis @ torch.linalg.eigh(seen @ covariance @ seen.T)[1].flip(1)[:, :rank]
    v = lost.T @ u
    norms = v.norm(dim=0).clamp(min=torch.finfo(v.dtype).tiny)
    return _split(u, norms, v / norms, scale)


def _rank(init: str, path: str, pairs: Mapping[str, Pair]) -> int:
    _check_rank(init, path, *pairs[path])
    return pairs[path][0].shape[0]


def _healing(init: str, low: Lora, starts: Mapping[str, Pair]) -> Params:
    if odd := next((path for path in lora.pairs(low.tree) if path not in starts), None):
        raise ValueError(
            f"lora_init {init} starts from what quantising loses, and {odd} was not quantised as it was read: give quant and a dense model"
        )
    return lora.of(starts, low.tree)


def ratios(low: Lora, ranks: Mapping[str, int], alphas: Mapping[str, float], *, rslora: bool) -> tuple[tuple[str, float], ...]:
    """(path, scale of its rank and alpha over the common one), of the paths where it is another."""
    scales = {path: lora.scale(rank=ranks[path], alpha=alphas[path], rslora=rslora) for path in ranks}
    return tuple((path, scale / low.scale) for path, scale in scales.items() if not math.isclose(scale, low.scale, rel_tol=1e-12))
