"""ReLoRA: after every N steps an adapter is folded into its base and starts anew, so that what is learned is a sum of low ranks.

W <- W + s B A, rounded to the dtype of W; A is drawn again, B is 0; moments of the adapter are pruned. The learning rate rises again after
each restart (`optim.restarting`). The base that moves is in checkpoints: folding the same pairs into it again would round otherwise on
another machine. Source: Lialin et al., arXiv 2307.05695, algorithm 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from treetune.core import lora, lora_use, param, quant, shard, tree
from treetune.core.lora import Lora
from treetune.core.optim import Optimizer
from treetune.core.param import Params
from treetune.core.state import OptState, TrainState
from treetune.models import adapter_starts
from treetune.models.policy import Policy, without_tree
from treetune.ops import magnitude

HELD, ROUNDING = "base", "relora_rounding"  # the part of a state with the weights that move; the metric of what rounding loses


class Restarts(NamedTuple):
    """When and how an adapter starts anew.

    every: steps between restarts. prune_ratio: the part of each moment that is forgotten, where its numbers are smallest; 1 forgets all.
    init, seed: how the pairs start, as of `adapter_starts.start`.
    """

    every: int
    prune_ratio: float = 1.0
    init: str = "default"
    seed: int = 0


def base(policy: Policy) -> Params:
    """The weights that move: those of the frozen model under an adapter. Errors: ValueError, naming one that cannot."""
    leaves, adapted = dict(tree.items(policy.frozen["model"])), lora.pairs(policy.params["lora"])
    for path in adapted:
        if path not in leaves or (path == "embed_tokens" and policy.cfg.tied):
            raise ValueError(f"relora_steps: {path} of a tied model has one tensor for embedding and head: leave it out of the targets")
        if quant.quantised(leaves[path]):
            raise ValueError(
                f"relora_steps: {path} is quantised, and most updates are smaller than a step between its codes: quantising the merged "
                "weight again would lose them; train on the unquantised model"
            )
    return tree.from_items((path, leaves[path]) for path in adapted)


def check(optimizer: Optimizer, params: Params, restarts: Restarts) -> None:
    """Raise ValueError for an optimiser whose state cannot be pruned, or is an average over the whole run."""
    if optimizer.averaged is not None:
        raise ValueError("relora_steps: the optimizer averages weights over the whole run, and restarts replace them: take adamw")
    if restarts.prune_ratio == 1:
        return
    shapes = {path: leaf.shape for path, leaf in tree.items(params)}
    for name, part in optimizer.init(params).items():
        for path, leaf in tree.items(part):
            if _of_adapter(path) and leaf.ndim and (leaf.shape != shapes.get(path) or leaf.dtype.itemsize < 2):
                raise ValueError(
                    f"relora_prune_ratio {restarts.prune_ratio:g} forgets a part of each moment, and {name} of this optimizer is no such "
                    "tensor: give 1, which forgets all"
                )


def restarter(policy: Policy, optimizer: Optimizer, restarts: Restarts) -> Callable[[TrainState, dict, int], TrainState]:
    """After every so many steps: the adapter folded into the base, IN PLACE, fresh pairs, and moments without a past."""
    low = without_tree(policy.lora)
    assert low is not None, "an adapter trains"

    @torch.no_grad()
    def after_step(state: TrainState, metrics: dict, step: int) -> TrainState:
        if step % restarts.every:
            return state
        metrics[ROUNDING] = _fold(low, state)
        _start_anew(low, state, restarts, step // restarts.every)
        return state._replace(opt=forgotten(optimizer, state, restarts.prune_ratio))

    return after_step


def _fold(low: Lora, state: TrainState) -> Tensor:
    """W <- W + s B A for each adapted weight; the norm of what rounding loses of all updates over that of the updates."""
    trained, leaves = lora_use.in_use(low, tree.map(shard.whole, state.params["lora"])), dict(tree.items(state.frozen["model"]))
    lost, moved = [], []
    for path in lora.pairs(trained.tree):
        before = shard.whole(leaves[path], torch.float32)
        after = lora.merged(path, before, trained.tree, trained.scale)
        _put(leaves[path], after)
        lost.append((shard.whole(leaves[path], torch.float32) - after).square().sum())
        moved.append((after - before).square().sum())
    return (torch.stack(lost).sum() / torch.stack(moved).sum().clamp(min=1e-38)).sqrt()


def _start_anew(low: Lora, state: TrainState, restarts: Restarts, number: int) -> None:
    """Pairs drawn for this restart, and magnitudes of the weights as they are."""
    old, weights = state.params["lora"], state.frozen["model"]
    ranks = {path: a.shape[-2] for path, (a, _) in lora.pairs(old).items()}
    seed = param.seed_of(restarts.seed, "restart", number)
    drawn = low._replace(tree=lora.init(weights, ranks, rank=ranks, seed=seed))
    pairs = drawn.tree if restarts.init == "default" else adapter_starts.start(weights, drawn, init=restarts.init, seed=seed)[0]
    fresh, leaves = dict(tree.items(pairs)), dict(tree.items(weights))
    for path, leaf in tree.items(old):
        if path in fresh:
            _put(leaf, fresh[path].to(leaf.device))
    for path, length in lora.magnitudes(old).items():
        a, b = (fresh[f"{path}.{name}"].to(length.device) for name in "AB")
        _put(length, magnitude.norms(shard.whole(leaves[path]), a, b, low.scale))


def forgotten(optimizer: Optimizer, state: TrainState, prune_ratio: float) -> OptState:
    """The optimiser's state with that of the adapter as at its start, or with this part of its moments 0, where the first is smallest.

    All moments of a weight lose the same places: a first moment over a second that is 0 would make a step of any size.
    """
    if prune_ratio == 1:
        fresh = dict(tree.items(optimizer.init(state.params)))
        return tree.from_items((path, fresh[path] if _of_adapter(path) else leaf) for path, leaf in tree.items(state.opt))
    flat = [(name, dict(tree.items(part))) for name, part in state.opt.items()]
    for path, leaf in tree.items({"lora": state.params["lora"]}):
        moments = [part[path] for _, part in flat if path in part and part[path].shape == leaf.shape]
        if moments:
            size = shard.full(moments[0]).abs()
            count = round(prune_ratio * size.numel())
            kept = size > size.flatten().kthvalue(count).values if count else torch.ones_like(size)
            for moment in moments:
                _put(moment, shard.full(moment) * kept)
    return state.opt


def _of_adapter(path: str) -> bool:
    return "lora" in path.split(".")


def _put(leaf: Tensor, whole: Tensor) -> None:
    """Write a whole leaf, the same on every rank, into the part of a placed one that this rank holds."""
    part = shard.distribute(whole, leaf.device_mesh, leaf.placements) if shard.distributed(leaf) else whole
    shard.local(leaf).copy_(shard.local(part))
