"""Online RL beside the likelihood of true completions: both from one forward pass of a prompt with all of its continuations.

N scored tokens of B sampled completions, M of the true ones. A true completion is a sequence of kind 1 in the stream that was made of
the documents; `aside` takes it out of the sequences, so that nothing of the policy loss, its denominators or its metrics sees it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from treetune.core.state import AXES, Batch, Metric, Objective, Params, Plan
from treetune.losses import sft


def aside(batch: Batch) -> Batch:
    """The batch without its sequences of kind 1, whose rows are read by `prompt_at` and `prompt_targets` [M] instead.

    A batch without `kind` comes back as it is. Errors: ValueError where the rows of prompts are read already.
    """
    if "kind" not in batch:
        return batch
    if "prompt_at" in batch:
        raise ValueError("a batch with true completions reads prompt_at already: collate it without prompts")
    own = batch["kind"] == 0  # [B]
    read = own[batch["seq"]]  # [N]
    keep = {"B": own, "N": read}
    out = {key: value[keep[axis]] if (axis := AXES[key]) in keep else value for key, value in batch.items() if key != "kind"}
    number = own.cumsum(0) - 1
    return out | {"seq": number[out["seq"]], "prompt_at": batch["at"][~read], "prompt_targets": batch["targets"][~read]}


def objective(
    logprobs: Callable[..., tuple[Any, Any]],
    make: Callable[[Callable], Objective],
    *,
    coef: float,
    name: str = "ce_loss",
    want: tuple[str, ...] = ("entropy",),
) -> Objective:
    """The terms of make(logprob), and coef * mean of -log p over the true tokens of the step, at temperature 1.

    logprobs(params, frozen, batch, plan, want=...) -> (TokenStats of `targets` [N], TokenStats of `prompt_targets` [M]);
    make: from a logprob of the first alone to an objective, which asks for the statistics `want` at most. name: of that mean's metric.
    """
    plain = make(lambda *_, **__: None)

    def counts(batch: Batch) -> dict[str, Tensor]:
        return plain.counts(batch) | {"ce": _tokens(batch)}

    def terms(params: Params, frozen: Params, batch: Batch, plan: Plan) -> tuple[dict, dict]:
        own, truth = logprobs(params, frozen, batch, plan, want=want)
        found, metrics = make(lambda *_, **__: own).terms(params, frozen, batch, plan)
        nll, count = sft.nll(truth.logp).sum(), _tokens(batch)
        return found | {"ce": coef * nll}, metrics | {name: Metric(nll.detach() / count.clamp(min=1), count)}

    return Objective(counts, terms)


def _tokens(batch: Batch) -> Tensor:
    return torch.tensor(batch["prompt_at"].shape[0], device=batch["prompt_at"].device)
