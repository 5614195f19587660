"""One optimiser step and one evaluation, as compositions of pure functions.

A micro-batch is a Batch, or (Batch, Plan). Denominators are summed over all micro-batches and ranks before any backward,
so the gradient does not depend on how a step is cut up: g = sum over micro-batches, ranks and terms k of grad(terms[k]) / N[k].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from treetune.core import copies, loss_scale, optim_parts, shard, tree
from treetune.core.grad import value_and_grad
from treetune.core.optim import Optimizer, Schedule
from treetune.core.state import Metrics, MicroBatch, Objective, Params, Terms, TrainState, with_plan

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Step(Protocol):
    """One optimiser step over the micro-batches of a loader; consumes the state."""

    def __call__(self, state: TrainState, micro_batches: Sequence[Any], /) -> tuple[TrainState, dict[str, Tensor]]:
        """The state after the step and its metrics, 0-d tensors on the device."""
        ...


class Eval(Protocol):
    """The objective of a state over micro-batches, without a gradient."""

    def __call__(self, state: TrainState, micro_batches: Sequence[Any], /) -> dict[str, Tensor]:
        """Metrics, 0-d tensors on the device."""
        ...


class Prepare(Protocol):
    """What is global to a step or constant in it: reference and old log-probs, a baseline. Runs without gradients.

    A method's loader may give several streams a micro-batch; what comes back is one micro-batch for each.
    """

    def __call__(self, state: TrainState, micro_batches: list[Any], /) -> Sequence[MicroBatch]:
        """Micro-batches with the keys that the objective reads."""
        ...


class AfterStep(Protocol):
    """What is done on the host after each step: running means, a reference that follows, new weights for a sampler."""

    def __call__(self, state: TrainState, metrics: dict[str, Tensor], step: int, /) -> TrainState:
        """The state that the next step starts from."""
        ...


def prepare_in_sequence(*functions: Prepare | None) -> Prepare | None:
    """Several preparations of a step as one, each of what the one before it gave; None for none."""
    chosen = [function for function in functions if function is not None]

    def prepare(state: TrainState, micro_batches: list[Any], /) -> Sequence[MicroBatch]:
        for function in chosen:
            micro_batches = list(function(state, micro_batches))
        return micro_batches

    return prepare if chosen else None


def in_sequence(*functions: AfterStep | None) -> AfterStep | None:
    """Several functions after each step as one; None for none."""
    chosen = [function for function in functions if function is not None]

    def after_step(state: TrainState, metrics: dict[str, Tensor], step: int, /) -> TrainState:
        for function in chosen:
            state = function(state, metrics, step)
        return state

    return after_step if chosen else None


def totals(objective: Objective, micro_batches: Sequence[MicroBatch], mesh: DeviceMesh | None = None) -> Terms:
    """Global denominators by term: counts (or weights) summed over micro-batches and ranks; 1 where there is nothing to count."""
    counts = [objective.counts(with_plan(micro)[0]) for micro in micro_batches]
    names = list(counts[0])
    # float64: a float32 sum of weights would depend on how the step is cut into micro-batches.
    sums = [torch.stack([count[name].double() for count in counts]).sum() for name in names]
    return {name: torch.where(value > 0, value, 1.0) for name, value in zip(names, shard.all_sum(sums, mesh), strict=True)}


def _loss(objective: Objective) -> Callable:
    def loss(params, frozen, batch, plan, denominators):
        terms, metrics = objective.terms(params, frozen, batch, plan)
        value = sum(term / denominators[name].to(term.dtype) for name, term in terms.items())
        return value, metrics

    return loss


def _sum_copies(grads: Params, mesh: DeviceMesh) -> Params:
    """Sum gradients over ranks along axes on which the same parts of leaves are held."""
    leaves = tree.leaves(grads)
    out = list(leaves)
    known = [shard.axes(leaf) for leaf in leaves]
    for axes in dict.fromkeys(known):
        chosen = [i for i, own in enumerate(known) if own == axes]
        left = [axis for axis in shard.SUMMED if axis not in axes]
        for i, summed in zip(chosen, shard.all_sum([shard.local(leaves[i]) for i in chosen], mesh, left), strict=True):
            out[i] = shard.rewrap(summed, leaves[i])
    flat = iter(out)
    return tree.map(lambda _: next(flat), grads)


def square_norms(grads: Params, mesh: DeviceMesh | None = None) -> Tensor:
    """Sum of squares of every leaf [leaves], float32, over all shards; a replicated leaf counts once."""
    leaves = tree.leaves(grads)
    squares = torch.stack([n.float() for n in torch._foreach_norm([shard.local(leaf) for leaf in leaves])]).square()
    split = [shard.split_axes(leaf) for leaf in leaves]
    for axes in [one for one in dict.fromkeys(split) if one]:
        mask = torch.tensor([own == axes for own in split]).to(squares.device, non_blocking=True)
        squares = torch.where(mask, shard.all_sum([torch.where(mask, squares, 0.0)], mesh, axes)[0], squares)
    return squares


def _clip(grads: Params, norm: Tensor, limit: float | None) -> None:
    """Scale all gradients in place so that their global norm is at most `limit`; None leaves them."""
    if limit is not None:
        # A branch on the norm would wait for the device; a norm of nan leaves the gradients, and found_inf skips the update.
        factor = (limit / norm.clamp(min=limit)).nan_to_num(1.0)
        torch._foreach_mul_([shard.local(leaf) for leaf in tree.leaves(grads)], factor)


def reduce_metrics(collected: Sequence[Metrics], mesh: DeviceMesh | None = None) -> dict[str, Tensor]:
    """One number per metric over micro-batches and ranks: weighted means as sums over summed weights, never means of means.

    What has no weight anywhere, and so was not computed, is nan; but a sum of nothing is 0.
    """
    reduced: dict[str, Tensor] = {}
    for name, how in {name: metric.how for metrics in collected for name, metric in metrics.items()}.items():
        parts = [metrics[name] for metrics in collected if name in metrics]
        values = torch.stack([metric.value.detach().double() for metric in parts])
        weights = torch.stack([metric.weight.detach().double() for metric in parts])
        counted = weights != 0  # the value of what has no weight may be anything
        if how == "sum":
            reduced[name] = shard.all_sum([values.sum()], mesh)[0]
        elif how == "mean":
            top, bottom = shard.all_sum([torch.where(counted, values * weights, 0.0).sum(), weights.sum()], mesh)
            reduced[name] = torch.where(bottom == 0, torch.nan, top / bottom.clamp(min=1e-38))
        else:
            (total,) = shard.all_sum([weights.sum()], mesh)
            extreme = getattr(torch.where(counted, values, torch.inf if how == "min" else -torch.inf), how)()
            reduced[name] = torch.where(total == 0, torch.nan, shard.all_reduce(extreme, how, mesh))
    return reduced


def make_step(
    objective: Objective,
    optimizer: Optimizer,
    *,
    schedule: Schedule,
    clip: float | None = 1.0,
    prepare: Prepare | None = None,
    mesh: DeviceMesh | None = None,
    split_gradients: bool = False,
) -> Step:
    """A function `step(state, micro_batches) -> (state, metrics)`; metrics are 0-d tensors, nothing waits for the device.

    objective: denominators and numerators of the loss. optimizer, schedule: the update and its learning rate by step.
    clip: largest global gradient norm, None for no clipping. prepare: adds to the micro-batches, without gradients, what is global to
    the step. mesh: sums over its ranks; None for one process. split_gradients: of whole weights, each rank along `data` keeps the gradient
    of its part (`optim_parts`).
    metrics: loss, grad_norm (before clipping), learning_rate, skipped (1 where a non-finite loss or gradient left all
    weights as they were), dead_leaves (trainable leaves whose gradient is exactly 0), loss_scale (with an optimiser of
    `loss_scale.scaled`), and the objective's own.
    """
    loss_of = _loss(objective)
    gradient = last = value_and_grad(loss_of)
    if mesh is not None and split_gradients:
        gradient = last = value_and_grad(loss_of, optim_parts.collecting(shard.splitting(mesh)))
    elif mesh is not None:
        last = value_and_grad(loss_of, copies.summing(mesh))

    def step(state: TrainState, micro_batches: Sequence[Any]) -> tuple[TrainState, dict[str, Tensor]]:
        if prepare is not None:
            with torch.no_grad():
                micro_batches = prepare(state, list(micro_batches))
        denominators, scale = totals(objective, micro_batches, mesh), loss_scale.of(state.opt)
        # Ranks along `context` have the same rows, and the gradients of all of them are summed: each has its share of the loss.
        if (sharing := shard.size(mesh, "context")) > 1:
            denominators = {name: value * sharing for name, value in denominators.items()}
        if scale is not None:
            denominators = {name: value / scale for name, value in denominators.items()}
        losses, grads, collected = [], None, []
        for number, micro in enumerate(micro_batches, 1):
            one = last if number == len(micro_batches) else gradient
            (value, metrics), grads = one(state.params, state.frozen, *with_plan(micro), denominators, into=grads)
            losses.append(value)
            collected.append(metrics)
        assert grads is not None
        grads = _sum_copies(grads, mesh) if mesh is not None and split_gradients else grads
        loss = shard.all_sum([sum(losses[1:], losses[0])], mesh)[0]
        loss = loss * sharing if sharing > 1 else loss
        if scale is not None:
            loss = loss / scale
            torch._foreach_div_([shard.local(leaf) for leaf in tree.leaves(grads)], scale)
        squares, lr = square_norms(grads, mesh), schedule(state.step).float()
        norm = squares.sum().sqrt()
        # A flag for the kernel of the optimiser: an `if` here would wait for the device at every step.
        found_inf = (~(torch.isfinite(norm) & torch.isfinite(loss))).float()
        _clip(grads, norm, clip)
        report = {} if scale is None else {loss_scale.KEY: scale.clone()}  # that of this step: the update changes it
        params, opt = optimizer.update(grads, state.opt, state.params, lr, found_inf)
        report |= reduce_metrics(collected, mesh)
        report |= {"loss": loss, "grad_norm": norm, "learning_rate": lr, "skipped": found_inf, "dead_leaves": (squares == 0).sum()}
        return state._replace(params=params, opt=opt, step=state.step + 1), report

    return step


def make_eval(objective: Objective, *, prepare: Prepare | None = None, mesh: DeviceMesh | None = None) -> Eval:
    """A function `evaluate(state, micro_batches) -> metrics` with the same terms and denominators as a step, no gradients."""

    @torch.no_grad()
    def evaluate(state: TrainState, micro_batches: Sequence[Any]) -> dict[str, Tensor]:
        micro_batches = micro_batches if prepare is None else prepare(state, list(micro_batches))
        denominators = totals(objective, micro_batches, mesh)
        loss, collected = [], []
        for micro in micro_batches:
            value, metrics = _loss(objective)(state.params, state.frozen, *with_plan(micro), denominators)
            loss.append(value)
            collected.append(metrics)
        return reduce_metrics(collected, mesh) | {"loss": shard.all_sum([torch.stack(loss).sum()], mesh)[0]}

    return evaluate
