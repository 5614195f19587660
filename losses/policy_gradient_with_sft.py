"""A policy-gradient objective with an SFT term: the likelihood of true completions, from the same forward pass as the sampled ones.

N scored tokens of B sampled completions, M of the true ones. A true completion is a sequence of kind 1 in the stream; `aside` moves it
to `prompt_at` and `prompt_targets`, so that the policy loss, its denominators and its metrics are those of the sampled ones alone.
"""

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from treetune.core.state import AXES, Batch, Logprob, LogprobBeside, Metric, Metrics, Objective, Params, Plan, Terms
from treetune.losses import sft


def aside(batch: Batch) -> Batch:
    """The batch without its sequences of kind 1, whose rows are read by `prompt_at` and `prompt_targets` [M] instead.

    A batch without `kind` comes back as it is. Errors: ValueError where the rows of prompts are read already.
    """
    if "kind" not in batch:
        return batch
    if "prompt_at" in batch:
        raise ValueError("a batch with true completions reads prompt_at already: collate it without prompts")
    sampled = batch["kind"] == 0  # [B]
    scored = sampled[batch["seq"]]  # [N]
    masks = {"B": sampled, "N": scored}
    rest = {key: value[masks[axis]] if (axis := AXES[key]) in masks else value for key, value in batch.items() if key != "kind"}
    number = sampled.cumsum(0) - 1
    return rest | {"seq": number[rest["seq"]], "prompt_at": batch["at"][~scored], "prompt_targets": batch["targets"][~scored]}


def aside_collate(collate: Callable[..., Batch]) -> Callable[..., Batch]:
    """`collate` of documents of which some have true completions, with these set aside."""
    return lambda documents, **options: aside(collate(documents, **options))


def objective(
    logprobs: LogprobBeside,
    make: Callable[[Logprob], Objective],
    *,
    coef: float,
    name: str = "ce_loss",
    want: tuple[str, ...] = ("entropy",),
) -> Objective:
    """The terms of make(logprob), and coef * mean of -log p over the true tokens of the step, at temperature 1.

    logprobs: statistics of `targets` [N] and of `prompt_targets` [M]. make: from a logprob of the first alone to an objective, which
    asks for the statistics `want` at most. coef: weight of the likelihood. name: of that mean's metric.
    """
    plain = make(_no_logprob)

    def counts(batch: Batch) -> Terms:
        return plain.counts(batch) | {"ce": _tokens(batch)}

    def terms(params: Params, frozen: Params, batch: Batch, plan: Plan) -> tuple[Terms, Metrics]:
        sampled, truth = logprobs(params, frozen, batch, plan, want=want)
        assert truth is not None
        numerators, metrics = make(lambda *_, **__: sampled).terms(params, frozen, batch, plan)
        nll, count = sft.nll(truth.logp).sum(), _tokens(batch)
        return numerators | {"ce": coef * nll}, metrics | {name: Metric(nll.detach() / count.clamp(min=1), count)}

    return Objective(counts, terms)


def _no_logprob(*_: object, **__: object) -> NoReturn:
    raise AssertionError("denominators need no log-probs")


def _tokens(batch: Batch) -> Tensor:
    return torch.full((), batch["prompt_at"].shape[0], device=batch["prompt_at"].device)
