"""One optimiser step and one evaluation, as compositions of pure functions.

A micro-batch is a Batch, or (Batch, Plan). Denominators are summed over all micro-batches and ranks before any backward,
so the gradient does not depend on how a step is cut up: g = sum over micro-batches, ranks and terms k of grad(terms[k]) / N[k].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from treetune.core import shard, tree
from treetune.core.grad import value_and_grad
from treetune.core.optim import Optimizer, Schedule
from treetune.core.state import Batch, Metric, Objective, Params, Plan, Terms, TrainState

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def _pair(micro: Batch | tuple[Batch, Plan]) -> tuple[Batch, Plan]:
    return micro if isinstance(micro, tuple) else (micro, None)


def totals(objective: Objective, micro_batches: list, mesh: DeviceMesh | None = None) -> Terms:
    """Global denominators by term: counts (or weights) summed over micro-batches and ranks; 1 where there is nothing to count."""
    counted = [objective.counts(_pair(micro)[0]) for micro in micro_batches]
    names = list(counted[0])
    sums = [torch.stack([counts[name].double() for counts in counted]).sum() for name in names]
    return {name: torch.where(value > 0, value, 1.0) for name, value in zip(names, shard.all_sum(sums, mesh), strict=True)}


def _loss(objective: Objective) -> Callable:
    def loss(params, frozen, batch, plan, denominators):
        terms, metrics = objective.terms(params, frozen, batch, plan)
        value = sum(term / denominators[name].to(term.dtype) for name, term in terms.items())
        return value, metrics

    return loss


def _accumulate(gradient: Callable, total: Params | None, params: Params, *args) -> tuple[tuple, Params]:
    """(value, metrics) of a micro-batch, and total += its gradient in fp32, in place from the second micro-batch on."""
    wide = all(leaf.dtype in (torch.float32, torch.float64) for leaf in tree.leaves(params))
    found, grads = gradient(params, *args, into=total if wide else None)
    if wide:
        return found, grads
    if total is None:
        return found, tree.map(lambda g: g if g.dtype in (torch.float32, torch.float64) else g.float(), grads)
    tree.map(lambda t, g: shard.local(t).add_(shard.local(g)), total, grads)
    return found, total


def _sum_plain(grads: Params, mesh: DeviceMesh | None) -> Params:
    """Sum the gradients of whole leaves over ranks; those of sharded leaves were summed on the way."""
    if mesh is None:
        return grads
    paths = [(path, leaf) for path, leaf in tree.items(grads)]
    plain = [i for i, (_, leaf) in enumerate(paths) if not shard.distributed(leaf)]
    summed = dict(zip(plain, shard.all_sum([paths[i][1] for i in plain], mesh), strict=True))
    flat = iter([summed.get(i, leaf) for i, (_, leaf) in enumerate(paths)])
    return tree.map(lambda _: next(flat), grads)


def square_norms(grads: Params, mesh: DeviceMesh | None = None) -> Tensor:
    """Sum of squares of every leaf [leaves], float32, over all shards; a replicated leaf counts once."""
    leaves = tree.leaves(grads)
    squares = torch.stack([n.float() for n in torch._foreach_norm([shard.local(leaf) for leaf in leaves])]).square()
    sharded = [shard.sharded(leaf) for leaf in leaves]
    if mesh is None or not any(sharded):
        return squares
    mask = torch.tensor(sharded, device=squares.device)
    return torch.where(mask, shard.all_sum([torch.where(mask, squares, 0.0)], mesh)[0], squares)


def _clip(grads: Params, norm: Tensor, limit: float | None) -> None:
    """Scale all gradients in place so that their global norm is at most `limit`; None leaves them."""
    if limit is not None:
        factor = (limit / norm.clamp(min=limit)).nan_to_num(1.0)
        torch._foreach_mul_([shard.local(leaf) for leaf in tree.leaves(grads)], factor)


def reduce_metrics(collected: list[dict[str, Metric]], mesh: DeviceMesh | None = None) -> dict[str, Tensor]:
    """One number per metric over micro-batches and ranks: weighted means as sums over summed weights, never means of means.

    What has no weight anywhere, and so was not computed, is nan; but a sum of nothing is 0.
    """
    out = {}
    for name, how in {name: metric.how for metrics in collected for name, metric in metrics.items()}.items():
        found = [metrics[name] for metrics in collected if name in metrics]
        values = torch.stack([metric.value.detach().double() for metric in found])
        weights = torch.stack([metric.weight.detach().double() for metric in found])
        counted = weights != 0  # the value of what has no weight may be anything
        if how == "sum":
            out[name] = shard.all_sum([values.sum()], mesh)[0]
        elif how == "mean":
            top, bottom = shard.all_sum([torch.where(counted, values * weights, 0.0).sum(), weights.sum()], mesh)
            out[name] = torch.where(bottom == 0, torch.nan, top / bottom.clamp(min=1e-38))
        else:
            (total,) = shard.all_sum([weights.sum()], mesh)
            extreme = getattr(torch.where(counted, values, torch.inf if how == "min" else -torch.inf), how)()
            out[name] = torch.where(total == 0, torch.nan, shard.all_reduce(extreme, how, mesh))
    return out


def make_step(
    objective: Objective,
    optimizer: Optimizer,
    *,
    schedule: Schedule,
    clip: float | None = 1.0,
    prepare: Callable | None = None,
    mesh: DeviceMesh | None = None,
) -> Callable[[TrainState, list], tuple[TrainState, dict[str, Tensor]]]:
    """A function `step(state, micro_batches) -> (state, metrics)`; metrics are 0-d tensors, nothing waits for the device.

    metrics: loss, grad_norm (before clipping), learning_rate, skipped (1 where a non-finite loss or gradient left all
    weights as they were), dead_leaves (trainable leaves whose gradient is exactly 0), and the objective's own.
    """
    gradient = value_and_grad(_loss(objective))

    def step(state: TrainState, micro_batches: list) -> tuple[TrainState, dict[str, Tensor]]:
        if prepare is not None:
            with torch.no_grad():
                micro_batches = prepare(state, micro_batches)
        denominators = totals(objective, micro_batches, mesh)
        loss, grads, collected = None, None, []
        for micro in micro_batches:
            (value, metrics), grads = _accumulate(gradient, grads, state.params, state.frozen, *_pair(micro), denominators)
            loss = value if loss is None else loss + value
            collected.append(metrics)
        loss, grads = shard.all_sum([loss], mesh)[0], _sum_plain(grads, mesh)
        squares, lr = square_norms(grads, mesh), schedule(state.step)
        norm = squares.sum().sqrt()
        found_inf = (~(torch.isfinite(norm) & torch.isfinite(loss))).float()
        _clip(grads, norm, clip)
        params, opt = optimizer.update(grads, state.opt, state.params, lr, found_inf)
        report = reduce_metrics(collected, mesh)
        report |= {"loss": loss, "grad_norm": norm, "learning_rate": lr, "skipped": found_inf, "dead_leaves": (squares == 0).sum()}
        return state._replace(params=params, opt=opt, step=state.step + 1), report

    return step


def make_eval(
    objective: Objective, *, prepare: Callable | None = None, mesh: DeviceMesh | None = None
) -> Callable[[TrainState, list], dict[str, Tensor]]:
    """A function `evaluate(state, micro_batches) -> metrics` with the same terms and denominators as a step, no gradients."""

    @torch.no_grad()
    def evaluate(state: TrainState, micro_batches: list) -> dict[str, Tensor]:
        micro_batches = micro_batches if prepare is None else prepare(state, micro_batches)
        denominators = totals(objective, micro_batches, mesh)
        loss, collected = [], []
        for micro in micro_batches:
            value, metrics = _loss(objective)(state.params, state.frozen, *_pair(micro), denominators)
            loss.append(value)
            collected.append(metrics)
        return reduce_metrics(collected, mesh) | {"loss": shard.all_sum([torch.stack(loss).sum()], mesh)[0]}

    return evaluate
