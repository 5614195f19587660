"""What is wrong with a step: the weights, rows or leaves that are not finite, and leaves that get no gradient. Replays the step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from treetune.core import check, shard, tree
from treetune.core.grad import value_and_grad
from treetune.core.state import Batch, MicroBatch, Objective, Plan, Terms, TrainState, with_plan


def find_not_finite(objective: Objective, state: TrainState, micro_batches: Sequence[MicroBatch]) -> str:
    """Replay a skipped step and name what is not finite: weights, the rows whose loss is not, or the gradient's leaves."""
    if bad := check.not_finite(state.params) or check.not_finite(state.frozen):
        return f"weights are not finite: {', '.join(bad[:3])}"
    replays = [_replay(objective, state, batch, plan) for batch, plan in map(with_plan, micro_batches)]
    # A sharded gradient is summed over ranks, so where a loss is bad the gradients of innocent rows are too.
    losses, grads = ([text for text in side if text] for side in zip(*replays, strict=True))
    bad_loss = shard.any_flag(bool(losses), state.step.device) if torch.distributed.is_initialized() else bool(losses)
    return "; ".join(losses if bad_loss else grads) or "no micro-batch here shows it: one of another rank does, or the sum overflowed"


@torch.no_grad()
def find_not_finite_loss(objective: Objective, state: TrainState, micro_batches: Sequence[MicroBatch]) -> str:
    """The rows whose loss is not finite, empty where all is well. All ranks must do the same work."""
    values = [_sum(objective.terms(state.params, state.frozen, batch, plan)[0]) for batch, plan in map(with_plan, micro_batches)]
    texts = [
        f"the loss of rows {sorted(set(batch['row'].tolist()))} is {value.item()}"
        for (batch, _), value in zip(map(with_plan, micro_batches), values, strict=True)
        if not torch.isfinite(value)
    ]
    bad = shard.any_flag(bool(texts), state.step.device) if torch.distributed.is_initialized() else bool(texts)
    return "; ".join(texts) or "the loss of another rank is not finite" * bad


def _sum(terms: Terms) -> Tensor:
    first, *others = terms.values()
    return sum(others, first)


def _replay(objective: Objective, state: TrainState, batch: Batch, plan: Plan) -> tuple[str | None, str | None]:
    """What is wrong with the loss, and with the gradient, of a micro-batch. All ranks must do the same work: sharded leaves meet."""

    def total(params):
        terms, _ = objective.terms(params, state.frozen, batch, plan)
        return _sum(terms), None

    (value, _), grads = value_and_grad(total)(state.params)
    rows, bad = sorted(set(batch["row"].tolist())), check.not_finite(grads)
    loss = None if torch.isfinite(value) else f"the loss of rows {rows} is {value.item()}"
    return loss, f"rows {rows} give a gradient that is not finite in {', '.join(bad[:3])}" if bad else None


def dead_leaves(objective: Objective, state: TrainState, micro_batches: Sequence[MicroBatch]) -> list[str]:
    """Paths of the trainable leaves that get no gradient from these micro-batches."""
    alive, terms = set(), objective.reaching or objective.terms
    for batch, plan in map(with_plan, micro_batches):
        _, grads = value_and_grad(lambda p, b=batch, s=plan: (_sum(terms(p, state.frozen, b, s)[0]), None))(state.params)
        alive |= {path for path, leaf in tree.items(grads) if bool((leaf != 0).any())}
    return [path for path, _ in tree.items(state.params) if path not in alive]
