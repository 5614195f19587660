"""The objective of KTO, BCO and APO-zero over single completions that are labelled desirable or not.

N scored tokens, B sequences; desirable [B] bool.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from treetune.core import registry
from treetune.core.state import Batch, Logprob, Metric, Metrics, Objective, Params, Plan, Terms, TokenStats
from treetune.losses import limits, presets, reduce

STATS = ("top1",)


class CompletionLoss(Protocol):
    """A loss of single completions."""

    def __call__(self, logp: Tensor, ref_logp: Tensor, desirable: Tensor, batch: Batch, /) -> Tensor:
        """Loss [B] of summed log-probs (nats, [B]); the batch has the scalars of the step."""
        ...


def completion_loss(name: str | presets.KtoEntry, **options: Any) -> CompletionLoss:
    """The loss of a name of `presets.KTO_LOSSES`, or of a row, with those of `options` that it takes (beta, desirable_weight, ...)."""
    entry = presets.KTO_LOSSES[name] if isinstance(name, str) else name
    fn = registry.bind(entry, **options)

    def loss(logp: Tensor, ref_logp: Tensor, desirable: Tensor, batch: Batch, /) -> Tensor:
        scalar = () if entry.scalar is None else (batch[entry.scalar].to(logp.dtype),)
        return fn(logp, ref_logp, desirable, *scalar)

    return loss


def objective(logprob: Logprob, loss: CompletionLoss, *, beta: float, want: tuple[str, ...] = STATS) -> Objective:
    """mean over the sequences with a scored token of loss; `ref_logp` [N] comes with the batch, and `baseline` where there is one."""

    def counts(batch: Batch) -> Terms:
        return {"rows": (batch["seq_lens"] > 0).sum()}

    def terms(params: Params, frozen: Params, batch: Batch, plan: Plan) -> tuple[Terms, Metrics]:
        stats = logprob(params, frozen, batch, plan, want=want)
        logp, ref_logp = (reduce.per_sequence(x, batch["seq"], batch["seq_lens"]) for x in (stats.logp, batch["ref_logp"]))
        value = reduce.elementwise(loss(logp, ref_logp, _desirable(batch), batch), logp, "loss of completions")
        rewards = beta * limits.minus(logp, ref_logp)
        return {"rows": torch.where(batch["seq_lens"] > 0, value, 0.0).sum()}, metrics(stats, batch, logp, rewards, beta)

    return Objective(counts, terms)


def _desirable(batch: Batch) -> Tensor:
    """[B] bool; a batch without documents has no such key."""
    return batch["desirable"] if "desirable" in batch else torch.zeros_like(batch["seq_lens"], dtype=torch.bool)


def metrics(stats: TokenStats, batch: Batch, logp: Tensor, rewards: Tensor, beta: float) -> Metrics:
    """Metrics of the step, each class over its own rows; accuracies: rows whose reward is on their side of the baseline's."""
    good, filled, count = _desirable(batch), batch["seq_lens"] > 0, batch["seq_lens"].sum()
    zero = beta * batch["baseline"] if "baseline" in batch else batch.get("delta", rewards.new_zeros(()))
    reported = {"num_tokens": Metric(reduce.real_tokens(batch), count, "sum"), "supervised_tokens": Metric(count, count, "sum")}
    for name, rows in (("chosen", good & filled), ("rejected", ~good & filled)):
        reported[f"rewards/{name}"] = reduce.masked_mean(rewards, rows)
        reported[f"logps/{name}"] = reduce.masked_mean(logp, rows)
        if stats.mean_logit is not None:
            reported[f"logits/{name}"] = reduce.masked_mean(stats.mean_logit, rows[batch["seq"]])
    right = torch.where(good, rewards > zero, rewards < zero)
    reported["rewards/accuracies"] = reduce.masked_mean(right, filled)
    reported["rewards/mean"] = reduce.masked_mean(rewards, filled)
    reported["rows"] = Metric(filled.sum(), filled.sum(), "sum")
    if stats.entropy is not None:
        reported["entropy"] = reduce.masked_mean(stats.entropy, torch.ones_like(batch["seq"], dtype=torch.bool))
    if stats.top1 is not None:
        reported["mean_token_accuracy"] = reduce.masked_mean(stats.top1, good[batch["seq"]])
    if "baseline" in batch:
        reported["kl"] = Metric(batch["baseline"], filled.sum())
    return reported
