"""Evaluation of an objective over documents that are held out."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from treetune.core import step
from treetune.core.data import loader
from treetune.core.run.ranks import ALONE, Ranks
from treetune.core.state import Objective, TrainState


def of_documents(
    objective: Objective,
    documents: Sequence[Any],
    collate: Callable[..., Any],
    batching: Mapping[str, Any],
    *,
    ranks: Ranks = ALONE,
    prepare: step.Prepare | None = None,
) -> Callable[[TrainState], dict[str, torch.Tensor]] | None:
    """A function from a state to metrics over all documents, shared between ranks; None where there are none.

    collate(documents) -> micro-batch. batching: how documents form micro-batches, as `loader.epoch_plan` takes it.
    """
    if not documents:
        return None
    groups = loader.epoch_plan([len(document.tokens) for document in documents], shuffle=False, **batching)
    accum = -(-len(groups) // ranks.world)
    mine, _ = loader.next_step(groups, loader.PlanCursor(), accum=accum, world=ranks.world, rank=ranks.rank)
    evaluate = step.make_eval(objective, prepare=prepare, mesh=ranks.mesh)
    return lambda state: evaluate(state, [collate([documents[i] for i in group]) for group in mine])


def describe(metrics: Mapping[str, float]) -> dict[str, str]:
    """Lines by name for the metrics of supervised tokens."""
    return {
        "loss": f"{metrics['loss']:.6f} nats per supervised token",
        "perplexity": f"{math.exp(min(metrics['loss'], 700.0)):.4f}",  # e^709 is the largest float64
        "accuracy": f"{metrics['mean_token_accuracy']:.4f} (the likeliest token is the target)",
        "entropy": f"{metrics['entropy']:.4f} nats per supervised token",
        "tokens": f"{int(metrics['supervised_tokens'])} supervised of {int(metrics['num_tokens'])}",
    }
