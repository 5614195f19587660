"""How the entropy of a policy is steered from step to step: a bonus of adaptive weight, and training on tokens of high entropy alone.

N scored tokens of a micro-batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treetune.core.state import Batch, Logprob, Plan, TrainState
from treetune.losses import correction, policy

Prepare = Callable[[TrainState, list[tuple[Batch, Plan]]], list[tuple[Batch, Plan]]]


class Bonus(NamedTuple):
    """An adaptive bonus: its first weight, the entropy to hold (nats per token), and the step size and upper bound of the weight."""

    coef: float
    target: float
    delta: float
    high: float


def start(bonus: Bonus, device: torch.device) -> dict[str, Any]:
    """The state before the first step, of `TrainState.extra`."""
    return {"entropy": {name: value.to(device) for name, value in policy.adaptive(bonus.coef)._asdict().items()}}


def bonus_preparer(bonus: Bonus) -> Prepare:
    """`prepare` of a step: micro-batches with the weight of the bonus."""

    def prepare(state: TrainState, micro_batches: list[tuple[Batch, Plan]]) -> list[tuple[Batch, Plan]]:
        coef = policy.applied(policy.Adaptive(**state.extra["entropy"]), target=bonus.target).float()
        return [(batch | {"entropy_coef": coef}, plan) for batch, plan in micro_batches]

    return prepare


def adapter(bonus: Bonus) -> Callable[[TrainState, dict[str, Tensor], int], TrainState]:
    """The weight of the bonus after a step of this mean entropy."""

    def after_step(state: TrainState, metrics: dict[str, Tensor], step: int) -> TrainState:
        bounds = {"target": bonus.target, "delta": bonus.delta, "low": 0.0, "high": bonus.high}
        adaptive = policy.update(policy.Adaptive(**state.extra["entropy"]), metrics["entropy"], **bounds)
        return state._replace(extra=state.extra | {"entropy": adaptive._asdict()})

    return after_step


def mask_preparer(quantile: float, logprob: Logprob, all_rows: Callable[[Tensor], Tensor]) -> Prepare:
    """`prepare` of a step: micro-batches that know which of their tokens are among those of the highest entropy of the whole step.

    quantile: share of tokens to keep. all_rows: the values [N] of all ranks.
    """

    def prepare(state: TrainState, micro_batches: list[tuple[Batch, Plan]]) -> list[tuple[Batch, Plan]]:
        entropies = [_entropy(logprob, state, batch, plan) for batch, plan in micro_batches]
        least = correction.entropy_threshold(all_rows(torch.cat(entropies)), quantile=quantile)
        masks = [correction.entropy_mask(entropy, least) for entropy in entropies]
        return [(batch | {"entropy_keep": mask}, plan) for mask, (batch, plan) in zip(masks, micro_batches, strict=True)]

    return prepare


def _entropy(logprob: Logprob, state: TrainState, batch: Batch, plan: Plan) -> Tensor:
    """The entropy at each scored token [N], without dropout."""
    quiet = {key: value for key, value in batch.items() if key != "seed"}
    stats = logprob(state.params, state.frozen, quiet, plan, want=("entropy",))
    assert stats.entropy is not None
    return stats.entropy
