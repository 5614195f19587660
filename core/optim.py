"""Optimisers and schedules: an optimiser is a pair of functions over trees, a schedule maps a 0-d step to a 0-d lr.

`update(grads, state, params, lr, found_inf=None) -> (params, state)` CONSUMES its inputs: leaves and moments change in
place. Where `found_inf` (0-d float32) is 1 the whole update is skipped inside the kernel, without a host sync.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw as adamw_kernel

from treetune.core import optim_pages, rounding, shard, tree
from treetune.core.optimizer import Optimizer as Optimizer
from treetune.core.state import OptState, Params

LeafRules = Iterable[tuple[str, float]]
Moments = dict[str, Tensor]  # the optimiser's own state of one leaf, by name
Start = Callable[[Tensor], Moments]
Direction = Callable[[Tensor, Moments, Tensor], tuple[Tensor, Moments]]


class Rate(NamedTuple):
    """How fast a leaf moves: lr with the leaf's factor (0-d), and its decay."""

    lr: Tensor
    decay: float


class Rule(NamedTuple):
    """An optimiser on one leaf: start(leaf) -> moments; move(grad, moments, param, rate) -> (param, moments), nothing in place.

    `start` gets a leaf as it is placed, `move` the shards of this rank. The new param may be wider than the leaf, which rounds it.
    """

    start: Start
    move: Callable[[Tensor, Moments, Tensor, Rate], tuple[Tensor, Moments]]


class Leaf(NamedTuple):
    """A leaf that trains, as it is placed, the part of it on this rank, its decay, and the factor of its learning rate."""

    path: str
    placed: Tensor
    param: Tensor
    decay: float
    lr_scale: float


def plan(params: Params, weight_decay: float, decay: LeafRules, lr_scale: LeafRules) -> list[Leaf]:
    """Per-leaf decay and lr multiplier, from (regex, value) rules; vectors decay only where a rule says so."""
    decays = tree.leaves(tree.assign(params, decay, None))
    scales = tree.leaves(tree.assign(params, lr_scale, 1.0))
    leaves = []
    for (path, leaf), rule, lr in zip(tree.items(params), decays, scales, strict=True):
        default = weight_decay if leaf.ndim >= 2 else 0.0
        leaves.append(Leaf(path, leaf, shard.local(leaf), default if rule is None else rule, lr))
    return leaves


def _groups(leaves: list[Leaf], *, paged: bool) -> list[list[int]]:
    """Indices of the leaves that one kernel call can take: equal decay, lr multiplier, dtype and device.

    A leaf is by itself where something of it is copied, its moments or, in 16 bits, its numbers.
    """
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        alone = paged or leaf.param.itemsize < 4
        groups.setdefault(i if alone else (leaf.decay, leaf.lr_scale, leaf.param.dtype, leaf.param.device), []).append(i)
    return list(groups.values())


def _locals(trees: Params) -> list[Tensor]:
    return [shard.local(leaf) for leaf in tree.leaves(trees)]


def _dense(params: Params) -> None:
    for path, leaf in tree.items(params):
        if shard.local(leaf).stride() != torch.zeros_like(shard.local(leaf)).stride():
            raise ValueError(f"{path} is a view into a larger tensor; clone it, because the optimiser writes whole blocks of memory")


def _laid_out(grad: Tensor, param: Tensor) -> Tensor:
    """The gradient in the memory order and dtype of its leaf: the fused kernel walks both as flat memory, whatever their strides."""
    same = grad.stride() == param.stride() and grad.dtype == param.dtype
    return grad if same else torch.empty_like(param).copy_(grad)


def adamw(
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: LeafRules = (),
    lr_scale: LeafRules = (),
    paged: bool = False,
) -> Optimizer:
    """AdamW with decoupled decay, fused and in place: p -= lr (m_hat / (sqrt(v_hat) + eps) + decay p).

    `decay` and `lr_scale` are (regex, value) rules over paths; LoRA+ is lr_scale=[(r"\\.B$", ratio)]. `paged` keeps the moments in the
    host's memory (`optim_pages`).
    Source: Loshchilov & Hutter, arXiv 1711.05101, algorithm 2; LoRA+: Hayou et al., arXiv 2402.12354.
    """
    # Lists, because every update reads the rules again and an iterator could be read once only.
    decay, lr_scale = list(decay), list(lr_scale)

    def init(params: Params) -> OptState:
        plan(params, weight_decay, decay, lr_scale)  # a rule that matches nothing is an error now, not at the first step
        _dense(params)
        # One step tensor a leaf: the kernel increments each that it is given, so a shared one would count once a leaf.
        count = tree.map(lambda leaf: torch.zeros((), dtype=torch.float32, device=leaf.device), params)
        moments = {name: tree.map(zero, params) for name in ("mu", "nu")}
        return (optim_pages.home(moments) if paged else moments) | {"count": count}

    @torch.no_grad()
    def update(grads, state, params, lr, found_inf=None):
        leaves, draw = plan(params, weight_decay, decay, lr_scale), rounding.of(state)
        grad, mu, nu, count = _locals(grads), _locals(state["mu"]), _locals(state["nu"]), tree.leaves(state["count"])
        for chosen in _groups(leaves, paged=paged):
            c, leaf = [count[i] for i in chosen], leaves[chosen[0]]
            p = [rounding.wide(leaves[i].param) for i in chosen]
            g = [_laid_out(grad[i], one) for i, one in zip(chosen, p, strict=True)]
            with optim_pages.fetched([side[i] for side in (mu, nu) for i in chosen], leaf.param.device) as sides:
                # lr stays a tensor: compiled code specialises on a Python float and recompiles for every value of a schedule.
                adamw_kernel(
                    p, g, sides[: len(p)], sides[len(p) :], [], c, fused=True, found_inf=found_inf, amsgrad=False, beta1=b1, beta2=b2,
                    lr=lr * leaf.lr_scale, weight_decay=leaf.decay, eps=eps, maximize=False,
                )  # fmt: skip
            for one, moved in zip([leaves[i] for i in chosen], p, strict=True):
                if moved is not one.param:
                    one.param.copy_(rounding.into(one.path, one.placed, moved, draw))
        if paged:
            optim_pages.settle(params)
        return params, state

    return Optimizer(init, update, rounds=True)


def leafwise(
    rule: Callable[[str, Tensor], Rule], *, weight_decay: float, decay: LeafRules, lr_scale: LeafRules, paged: bool = False
) -> Optimizer:
    """An optimiser from the rule of each leaf, which may depend on its path.

    weight_decay, decay, lr_scale, paged: as of `adamw`.
    """
    decay, lr_scale = list(decay), list(lr_scale)

    def init(params: Params) -> OptState:
        plan(params, weight_decay, decay, lr_scale)
        moments = [(path, rule(path, leaf).start(leaf)) for path, leaf in tree.items(params)]
        names = dict.fromkeys(name for _, leaf in moments for name in leaf)
        state = {name: tree.from_items((path, leaf[name]) for path, leaf in moments if name in leaf) for name in names}
        return optim_pages.home(state) if paged else state

    @torch.no_grad()
    def update(grads, state, params, lr, found_inf=None):
        by_path, draw = {name: dict(tree.items(side)) for name, side in state.items()}, rounding.of(state)
        for leaf, grad in zip(plan(params, weight_decay, decay, lr_scale), _locals(grads), strict=True):
            names = [name for name, side in by_path.items() if leaf.path in side]
            with optim_pages.fetched([shard.local(by_path[name][leaf.path]) for name in names], grad.device) as here:
                moments, param = dict(zip(names, here, strict=True)), rounding.wide(leaf.param)
                # Out of place per leaf, so that a skipped step can keep the old values; one leaf at a time, so never a second tree.
                moving, rate = rule(leaf.path, leaf.placed), Rate(lr * leaf.lr_scale, leaf.decay)
                target, moved = moving.move(grad.contiguous().to(param.dtype), moments, param, rate)
                _keep(leaf.param, rounding.into(leaf.path, leaf.placed, target, draw), found_inf)
                for name, moment in moments.items():
                    _keep(moment, moved[name], found_inf)
        if paged:
            optim_pages.settle(params)
        return params, state

    return Optimizer(init, update, rounds=True)


def stepwise(
    start: Start, direction: Direction, *, weight_decay: float, decay: LeafRules, lr_scale: LeafRules, paged: bool = False
) -> Optimizer:
    """An optimiser from a pair of functions on one leaf, applied as p -= lr (step + decay p).

    start(leaf) -> moments: the state of a leaf before the first step, tensors by name, {} for none.
    direction(grad, moments, param) -> (step, new moments), of the shapes that it was given. It sees the shard of a leaf that this rank
    holds, and changes nothing in place: what it returns is kept only where the step is not skipped.
    weight_decay, decay, lr_scale, paged: as of `adamw`.
    """
    rule = Rule(start, along(direction))
    return leafwise(lambda path, leaf: rule, weight_decay=weight_decay, decay=decay, lr_scale=lr_scale, paged=paged)


def along(direction: Direction) -> Callable[[Tensor, Moments, Tensor, Rate], tuple[Tensor, Moments]]:
    """The move p - lr (step + decay p) of a direction."""

    def move(grad: Tensor, moments: Moments, param: Tensor, rate: Rate) -> tuple[Tensor, Moments]:
        step, moved = direction(grad, moments, param)
        return param - rate.lr * (step + rate.decay * param), moved

    return move


def _keep(old: Tensor, new: Tensor, found_inf: Tensor | None) -> None:
    """old <- new, unless found_inf; `where`, because 0 * nan is nan."""
    old.copy_(new if found_inf is None else torch.where(found_inf > 0, old, new.to(old.dtype)))


def zero(leaf: Tensor) -> Tensor:
    """A moment of the shape and placement of a leaf, in float32 or wider."""
    return shard.like(lambda own: torch.zeros_like(own, dtype=torch.promote_types(own.dtype, torch.float32)), leaf)


def sgd(
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    decay: LeafRules = (),
    lr_scale: LeafRules = (),
    paged: bool = False,
) -> Optimizer:
    """Gradient descent with heavy-ball momentum: m <- momentum m + g; p -= lr (m + decay p). No state without momentum."""

    def start(leaf: Tensor) -> Moments:
        return {"mu": zero(leaf)} if momentum else {}

    def direction(grad: Tensor, moments: Moments, param: Tensor) -> tuple[Tensor, Moments]:
        if not momentum:
            return grad, {}
        mu = momentum * moments["mu"] + grad
        return mu, {"mu": mu}

    return stepwise(start, direction, weight_decay=weight_decay, decay=decay, lr_scale=lr_scale, paged=paged)


def lion(
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
    decay: LeafRules = (),
    lr_scale: LeafRules = (),
    paged: bool = False,
) -> Optimizer:
    """Lion: p -= lr (sign(b1 m + (1 - b1) g) + decay p); m <- b2 m + (1 - b2) g. Source: Chen et al., arXiv 2302.06675, algorithm 2."""

    def direction(grad: Tensor, moments: Moments, param: Tensor) -> tuple[Tensor, Moments]:
        mu = moments["mu"]
        return torch.sign(b1 * mu + (1 - b1) * grad), {"mu": b2 * mu + (1 - b2) * grad}

    return stepwise(lambda leaf: {"mu": zero(leaf)}, direction, weight_decay=weight_decay, decay=decay, lr_scale=lr_scale, paged=paged)


# A 0-d step to a 0-d rate in float64, which a step of training rounds once; the shapes of `core.schedules` are further ones.
Schedule = Callable[[Tensor], Tensor]


def constant(peak: float, steps: int = 1) -> Schedule:
    """lr(step) = peak, whatever the `steps`, which other shapes take."""
    return lambda step: torch.full((), peak, dtype=torch.float64, device=step.device)


def linear(peak: float, steps: int, *, min_ratio: float = 0.0) -> Schedule:
    """Linear decay from peak at step 0 to min_ratio * peak at `steps`, constant after."""
    return lambda step: peak * (1 - (1 - min_ratio) * progress(step, steps))


def cosine(peak: float, steps: int, *, min_ratio: float = 0.0, num_cycles: float = 0.5) -> Schedule:
    """`num_cycles` waves of a cosine from peak at step 0, by default half of one, which ends at min_ratio * peak at `steps`.

    Source: Loshchilov & Hutter, arXiv 1608.03983, eq. 5.
    """
    return lambda step: peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + torch.cos(2 * math.pi * num_cycles * progress(step, steps))))


def progress(step: Tensor, steps: int) -> Tensor:
    """The part of `steps` that are done before a step, from 0 to 1, float64."""
    return (step.double() / max(steps, 1)).clamp(0, 1)


def warmup(schedule: Schedule, steps: int, *, power: int = 1) -> Schedule:
    """A rise over `steps` steps to the first value of `schedule`, which then starts; the rate of step 0 is above 0. power 1: linear."""
    if steps <= 0:
        return schedule

    def lr(step: Tensor) -> Tensor:
        rising = ((step.double() + 1) / (steps + 1)).clamp(max=1.0) ** power
        return rising * schedule((step - steps).clamp(min=0))

    return lr


def restarting(schedule: Schedule, every: int, warmup: int, anneal: int = 0) -> Schedule:
    """The schedule, times a rise over the first `warmup` steps of every cycle of `every` but the first, and a fall over its last `anneal`.

    No factor is 0: (k + 1) / (warmup + 1) at the k-th step of a cycle, (every - k) / (anneal + 1) at its end.
    """

    def lr(step: Tensor) -> Tensor:
        cycle = (step % every).float()
        rising = torch.where(step < every, 1.0, ((cycle + 1) / (warmup + 1)).clamp(max=1.0))
        return schedule(step) * rising * ((every - cycle) / (anneal + 1)).clamp(max=1.0)

    return lr
