"""Optimisers that see a leaf as a matrix: Adafactor and Muon. They need whole matrices, so leaves must not be split among ranks.

A stack of experts [E, O, I] is E matrices.
"""

import re

import torch
from torch import Tensor

from treetune.core import optim_blocks, shard
from treetune.core.optim import LeafRules, Moments, Optimizer, Rate, Rule, along, leafwise, zero

HIDDEN = r"(^|\.)layers\.\d+\."  # in the path of a hidden matrix; embeddings and heads are outside of layers
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS, SMALLEST_NORM = 5, 1e-7


def require_whole(path: str, leaf: Tensor, name: str) -> None:
    """Raise ValueError for a leaf that is split among ranks; name: of the optimiser."""
    if shard.sharded(leaf):
        raise ValueError(f"{name} needs whole matrices, and {path} {tuple(leaf.shape)} is split among ranks: use adamw, or sharding none")


def _rms(numbers: Tensor) -> Tensor:
    return numbers.norm() / numbers.numel() ** 0.5


def adafactor(
    *,
    decay_rate: float = -0.8,
    clip_threshold: float = 1.0,
    scale_parameter: bool = False,
    weight_decay: float = 0.0,
    decay: LeafRules = (),
    lr_scale: LeafRules = (),
    paged: bool = False,
) -> Optimizer:
    """Adafactor at a given learning rate: a second moment by row and column, u = g / sqrt(v), p -= lr (u / max(1, rms(u) / d) + decay p).

    decay_rate: v decays by 1 - t^decay_rate. clip_threshold: d. scale_parameter: lr is relative to the rms of a leaf, at least 1e-3.
    Source: Shazeer & Stern, arXiv 1804.04235, algorithms 4 and 5; without a first moment, as transformers has it.
    """
    if decay_rate >= 0 or clip_threshold <= 0:
        raise ValueError(f"adafactor needs decay_rate below 0 and clip_threshold above 0, got {decay_rate} and {clip_threshold}")

    def start(leaf: Tensor) -> Moments:
        count, own = {"count": torch.zeros((), device=leaf.device)}, shard.local(leaf)
        if leaf.ndim < 2:
            return count | {"nu": zero(leaf)}
        return count | {"row": own.new_zeros(own.shape[:-1]), "column": own.new_zeros((*own.shape[:-2], own.shape[-1]))}

    def second(square: Tensor, moments: Moments, kept: Tensor) -> tuple[Tensor, Moments]:
        """1 / sqrt(v), and the moments."""
        if "nu" in moments:
            nu = moments["nu"] * kept + square * (1 - kept)
            return nu.rsqrt(), {"nu": nu}
        row = moments["row"] * kept + square.mean(-1) * (1 - kept)
        column = moments["column"] * kept + square.mean(-2) * (1 - kept)
        scale = (row / row.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1) * column.rsqrt().unsqueeze(-2)
        return scale, {"row": row, "column": column}

    def move(grad: Tensor, moments: Moments, param: Tensor, rate: Rate) -> tuple[Tensor, Moments]:
        count = moments["count"] + 1
        kept = (1 - count.double() ** decay_rate).to(grad.dtype)
        inverse, moved = second(grad.square() + 1e-30, moments, kept)
        step = inverse * grad
        step = step / (_rms(step) / clip_threshold).clamp(min=1.0)
        lr = rate.lr * _rms(param).clamp(min=1e-3) if scale_parameter else rate.lr
        return param - lr * (step + rate.decay * param), moved | {"count": count}

    def rule(path: str, leaf: Tensor) -> Rule:
        require_whole(path, leaf, "adafactor")
        return Rule(start, move)

    return leafwise(rule, weight_decay=weight_decay, decay=decay, lr_scale=lr_scale, paged=paged)


def orthogonal(matrix: Tensor) -> Tensor:
    """bfloat16 [..., O, I]: near U V^T of the matrix U S V^T, by Newton and Schulz's iteration. Source: Jordan et al., the Muon post."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    add = torch.addmm if x.ndim == 2 else torch.baddbmm  # a sum is rounded to bfloat16 once
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = add(x, add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _adjusted(rows: int, columns: int, adjust: str) -> float:
    """The factor of the learning rate: match_rms_adamw gives a step the rms of AdamW's, original that of a square matrix."""
    return 0.2 * max(rows, columns) ** 0.5 if adjust == "match_rms_adamw" else max(1.0, rows / columns) ** 0.5


def muon(
    *,
    momentum: float = 0.95,
    adjust: str = "match_rms_adamw",
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 0.0,
    decay: LeafRules = (),
    lr_scale: LeafRules = (),
    paged: bool = False,
) -> Optimizer:
    """Muon for matrices of layers (those of adapters, too), AdamW for all else: p -= lr (factor U V^T of the momentum + decay p).

    The momentum is Nesterov's. adjust: "match_rms_adamw", with which both sides take the learning rate of AdamW, or "original".
    Source: Jordan et al., https://kellerjordan.github.io/posts/muon; Liu et al., arXiv 2502.16982, section 2.2.
    """
    if adjust not in ("match_rms_adamw", "original"):
        raise ValueError(f"muon needs adjust match_rms_adamw or original, got {adjust!r}")

    def direction(grad: Tensor, moments: Moments, param: Tensor) -> tuple[Tensor, Moments]:
        grad = grad.to(moments["mu"].dtype)
        mu = moments["mu"].lerp(grad, 1 - momentum)
        factor = _adjusted(param.shape[-2], param.shape[-1], adjust)
        return factor * orthogonal(grad.lerp(mu, momentum)).to(mu.dtype), {"mu": mu}

    hidden, rest = Rule(lambda leaf: {"mu": zero(leaf)}, along(direction)), optim_blocks.dense_adamw(b1, b2, 1e-8)

    def rule(path: str, leaf: Tensor) -> Rule:
        if not is_hidden(path, leaf):
            return rest
        require_whole(path, leaf, "muon")
        return hidden

    return leafwise(rule, weight_decay=weight_decay, decay=decay, lr_scale=lr_scale, paged=paged)


def is_hidden(path: str, leaf: Tensor) -> bool:
    """Whether a leaf is a matrix of a layer, or a stack of its experts."""
    stacked = leaf.ndim == 3 and re.search(r"(^|\.)experts(\.|$)", path) is not None
    return (leaf.ndim == 2 or stacked) and re.search(HIDDEN, path) is not None
