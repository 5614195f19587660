"""Objectives over single completions that were judged good or bad, and what they need to know of a whole step.

N scored tokens, B sequences; desirable [B] bool.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from treetune.core.state import Batch, Metric, Objective, Params, Plan
from treetune.losses import limits, reduce

# loss(logp [B], ref_logp [B], desirable [B], batch) -> [B], summed log-probs in nats; batch has the step's scalars
UnpairedLoss = Callable[[Tensor, Tensor, Tensor, Batch], Tensor]
STATS = ("top1",)


def objective(logprob: Callable[..., Any], loss: UnpairedLoss, *, beta: float, want: tuple[str, ...] = STATS) -> Objective:
    """mean over the sequences with a scored token of loss; `ref_logp` [N] comes with the batch, and `baseline` where there is one."""

    def counts(batch: Batch) -> dict[str, Tensor]:
        return {"rows": (batch["seq_lens"] > 0).sum()}

    def terms(params: Params, frozen: Params, batch: Batch, plan: Plan) -> tuple[dict, dict]:
        stats = logprob(params, frozen, batch, plan, want=want)
        own, ref = (reduce.per_sequence(x, batch["seq"], batch["seq_lens"]) for x in (stats.logp, batch["ref_logp"]))
        value = loss(own, ref, _desirable(batch), batch)
        return {"rows": torch.where(batch["seq_lens"] > 0, value, 0.0).sum()}, metrics(
            stats, batch, own, beta * limits.minus(own, ref), beta
        )

    return Objective(counts, terms)


def _desirable(batch: Batch) -> Tensor:
    """[B] bool; a batch without documents has no such key."""
    return batch["desirable"] if "desirable" in batch else torch.zeros_like(batch["seq_lens"], dtype=torch.bool)


def metrics(stats: Any, batch: Batch, logp: Tensor, rewards: Tensor, beta: float) -> dict[str, Metric]:
    """The documented numbers, each class over its own rows; accuracies: rows whose reward is on their side of the baseline's."""
    good, filled, count = _desirable(batch), batch["seq_lens"] > 0, batch["seq_lens"].sum()
    zero = beta * batch["baseline"] if "baseline" in batch else batch.get("delta", rewards.new_zeros(()))
    out = {"num_tokens": Metric(reduce.real_tokens(batch), count, "sum"), "supervised_tokens": Metric(count, count, "sum")}
    for name, rows in (("chosen", good & filled), ("rejected", ~good & filled)):
        out[f"rewards/{name}"] = reduce.masked_mean(rewards, rows)
        out[f"logps/{name}"] = reduce.masked_mean(logp, rows)
        if stats.mean_logit is not None:
            out[f"logits/{name}"] = reduce.masked_mean(stats.mean_logit, rows[batch["seq"]])
    right = torch.where(good, rewards > zero, rewards < zero)
    out["rewards/accuracies"] = reduce.masked_mean(right, filled)
    out["rewards/mean"] = reduce.masked_mean(rewards, filled)
    out["rows"] = Metric(filled.sum(), filled.sum(), "sum")
    if stats.entropy is not None:
        out["entropy"] = reduce.masked_mean(stats.entropy, torch.ones_like(batch["seq"], dtype=torch.bool))
    if stats.top1 is not None:
        out["mean_token_accuracy"] = reduce.masked_mean(stats.top1, good[batch["seq"]])
    if "baseline" in batch:
        out["kl"] = Metric(batch["baseline"], filled.sum())
    return out
