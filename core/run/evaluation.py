"""Evaluation of an objective over documents that are held out, and of rewards over prompts."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from treetune.core import step
from treetune.core.data import loader
from treetune.core.data.prompts import Prompt
from treetune.core.rollout.group import Group, PromptSampler
from treetune.core.rollout.rewards import Rewards
from treetune.core.rollout.sampler import fatal_errors
from treetune.core.run.ranks import ALONE, Ranks
from treetune.core.run.rollouts import gather_groups
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
    accum = -(-len(groups) // ranks.row_ranks)
    mine, _ = loader.next_step(groups, loader.PlanCursor(), accum=accum, world=ranks.row_ranks, rank=ranks.row_rank)
    evaluate = step.make_eval(objective, prepare=prepare, mesh=ranks.mesh)
    return lambda state: evaluate(state, [collate([documents[i] for i in group]) for group in mine])


def of_prompts(
    prompts: Sequence[Prompt],
    sample: PromptSampler,
    rewards: Rewards,
    further: Callable[[TrainState], dict[str, torch.Tensor]] | None = None,
    *,
    ranks: Ranks = ALONE,
) -> Callable[[TrainState], dict[str, torch.Tensor]] | None:
    """A function from a state to metrics of completions of each prompt, always with the same randomness; None where there are no prompts.

    Ranks share the prompts. further(state) -> more metrics.
    """
    if not prompts:
        return None
    ranks = ranks if len(prompts) >= ranks.row_ranks else ALONE
    indices = range(ranks.row_rank, len(prompts), ranks.row_ranks)

    def evaluate(state: TrainState) -> dict[str, torch.Tensor]:
        with fatal_errors():
            sampled = sample(state, [prompts[i] for i in indices], list(indices))
            rows = zip(indices, sampled.completions, strict=True)
            groups = [Group(prompts[i], i, tuple(completions), sampled.version) for i, completions in rows]
            scores = rewards.score(groups)
        groups = [group._replace(rewards=values) for group, values in zip(groups, scores, strict=True)]
        metrics = rewards.measure(gather_groups(ranks, groups))
        shown = {name: value for name, value in metrics.items() if not name.startswith("frac") and value == value}
        return {name: torch.tensor(value) for name, value in shown.items()} | ({} if further is None else further(state))

    return evaluate


def describe(metrics: Mapping[str, float]) -> dict[str, str]:
    """Lines by name for the metrics of supervised tokens."""
    return {
        "loss": f"{metrics['loss']:.6f} nats per supervised token",
        "perplexity": f"{math.exp(min(metrics['loss'], 700.0)):.4f}",  # e^709 is the largest float64
        "accuracy": f"{metrics['mean_token_accuracy']:.4f} (the likeliest token is the target)",
        "entropy": f"{metrics['entropy']:.4f} nats per supervised token",
        "tokens": f"{int(metrics['supervised_tokens'])} supervised of {int(metrics['num_tokens'])}",
    }
