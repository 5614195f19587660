"""More adaptive optimisers: Adagrad, ADOPT, and schedule-free AdamW, whose weights to evaluate are an average of those that train."""

import torch
from torch import Tensor

from treetune.core import shard, tree
from treetune.core.optim import LeafRules, Moments, Optimizer, Rate, Rule, leafwise, stepwise, zero
from treetune.core.state import OptState, Params


def _count(leaf: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float32, device=leaf.device)


def adagrad(
    *,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    decay: LeafRules = (),
    lr_scale: LeafRules = (),
    paged: bool = False,
) -> Optimizer:
    """Adagrad with decoupled decay: v += g^2; p -= lr (g / (sqrt(v) + eps) + decay p). Source: Duchi et al. 2011."""

    def direction(grad: Tensor, moments: Moments, param: Tensor) -> tuple[Tensor, Moments]:
        nu = moments["nu"] + grad.square()
        return grad / (nu.sqrt() + eps), {"nu": nu}

    return stepwise(lambda leaf: {"nu": zero(leaf)}, direction, weight_decay=weight_decay, decay=decay, lr_scale=lr_scale, paged=paged)


def adopt(
    *,
    b1: float = 0.9,
    b2: float = 0.9999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    decay: LeafRules = (),
    lr_scale: LeafRules = (),
    paged: bool = False,
) -> Optimizer:
    """ADOPT: m <- b1 m + (1 - b1) clip(g / max(sqrt(v), eps), t^(1/4)); p -= lr (m + decay p); then v <- b2 v + (1 - b2) g^2.

    The first step only makes v = g^2, and decays. Source: Taniguchi et al., arXiv 2411.02853, algorithm 2 with the clipping of section 4.
    """

    def start(leaf: Tensor) -> Moments:
        return {"mu": zero(leaf), "nu": zero(leaf), "count": _count(leaf)}

    def direction(grad: Tensor, moments: Moments, param: Tensor) -> tuple[Tensor, Moments]:
        mu, nu, count = moments["mu"], moments["nu"], moments["count"]
        first, limit = count == 0, count.to(grad.dtype) ** 0.25
        scaled = torch.clamp(grad / nu.sqrt().clamp(min=eps), -limit, limit)  # 0 at the first step, whose limit is 0
        mu = b1 * mu + (1 - b1) * scaled
        nu = torch.where(first, grad.square(), b2 * nu + (1 - b2) * grad.square())
        return mu, {"mu": mu, "nu": nu, "count": count + 1}

    return stepwise(start, direction, weight_decay=weight_decay, decay=decay, lr_scale=lr_scale, paged=paged)


def schedule_free_adamw(
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: LeafRules = (),
    lr_scale: LeafRules = (),
    paged: bool = False,
) -> Optimizer:
    """Schedule-free AdamW: gradients at y = (1 - b1) z + b1 x, steps of z, and their average x, which is evaluated and saved.

    z -= lr (g / (sqrt(v_hat) + eps) + decay y); x <- (1 - c) x + c z, c = lr_max^2 over its sum. Params hold y, the state z.
    Source: Defazio et al., arXiv 2405.15682, algorithm 1 and section 4.2 (weights by lr^2).
    """
    if not 0 < b1 < 1:
        raise ValueError(f"schedule_free_adamw needs adam_beta1 between 0 and 1, got {b1}: it says how near to the average y is")

    def start(leaf: Tensor) -> Moments:
        scalars = {name: _count(leaf) for name in ("count", "largest", "total")}
        return {"z": shard.like(_wide_copy, leaf.detach()), "nu": zero(leaf)} | scalars

    def move(grad: Tensor, moments: Moments, y: Tensor, rate: Rate) -> tuple[Tensor, Moments]:
        z, count, largest = moments["z"], moments["count"] + 1, torch.maximum(moments["largest"], rate.lr.float())
        total = moments["total"] + largest.square()
        # While the learning rate is 0 nothing moves, and nothing is averaged.
        share = torch.where(total > 0, largest.square() / total, 0.0).to(y.dtype)
        nu = b2 * moments["nu"] + (1 - b2) * grad.square()
        corrected = nu / (1 - b2 ** count.double()).to(nu.dtype)
        step = grad / (corrected.sqrt() + eps) + rate.decay * y
        moved = y.lerp(z.to(y.dtype), share) - rate.lr * (1 - b1 * (1 - share)) * step
        return moved, {"z": z - rate.lr * step, "nu": nu, "count": count, "largest": largest, "total": total}

    def averaged(params: Params, state: OptState) -> Params:
        """x, of y and z."""
        return tree.map(lambda y, z: shard.like(lambda own: _average(own.detach(), shard.local(z), b1), y), params, state["z"])

    rule = Rule(start, move)
    rules = {"weight_decay": weight_decay, "decay": decay, "lr_scale": lr_scale, "paged": paged}
    return leafwise(lambda path, leaf: rule, **rules)._replace(averaged=averaged)


def _wide_copy(leaf: Tensor) -> Tensor:
    return leaf.to(torch.promote_types(leaf.dtype, torch.float32), copy=True)


def _average(y: Tensor, z: Tensor, b1: float) -> Tensor:
    """x, in the dtype of y."""
    return torch.lerp(y.to(z.dtype), z.to(y.device), 1 - 1 / b1).to(y.dtype)
