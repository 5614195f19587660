"""The objective of KTO, BCO and APO-zero over single completions that are labelled desirable or not, and what it adds to a step.

N scored tokens, B sequences; desirable [B] bool. KTO has a baseline over the whole step; BCO the running mean of the rewards of the steps
before, so that no split of a step into micro-batches changes it.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from treetune.core import registry
from treetune.core.state import Batch, Logprob, Metric, Metrics, Objective, Params, Plan, Terms, TokenStats, TrainState
from treetune.losses import kto, limits, presets, reduce

STATS = ("top1",)
Referenced = Callable[[TrainState, Batch, Plan], Batch]  # the batch with `ref_logp` [N]
Sum = Callable[[list[Tensor]], list[Tensor]]  # of each tensor over ranks


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


def baseline_preparer(logprob: Logprob, referenced: Referenced, total: Sum) -> Callable[[TrainState, list[Any]], list[tuple[Batch, Plan]]]:
    """`prepare` of a step whose micro-batches have a second stream, of completions of other prompts: the first with their baseline."""

    def prepare(state: TrainState, micro_batches: list[Any]) -> list[tuple[Batch, Plan]]:
        ratios = [_log_ratios(logprob, state, referenced(state, *foreign), foreign[1]) for _, foreign in micro_batches]
        value = step_baseline(torch.cat(ratios), total)
        return [(batch | {"baseline": value}, plan) for (batch, plan), _ in micro_batches]

    return prepare


def _log_ratios(logprob: Logprob, state: TrainState, batch: Batch, plan: Plan) -> Tensor:
    """log p - log p_ref summed over each completion, without dropout: [B]."""
    quiet = {key: value for key, value in batch.items() if key != "seed"}
    logp = logprob(state.params, state.frozen, quiet, plan).logp
    return reduce.per_sequence(limits.minus(logp, quiet["ref_logp"]), quiet["seq"], quiet["seq_lens"])


def step_baseline(ratios: Tensor, total: Sum) -> Tensor:
    """max(0, mean of the log-ratios of all micro-batches and ranks)."""
    sums, count = total([ratios.double().sum(), ratios.new_full((), len(ratios), dtype=torch.float64)])
    return kto.baseline((sums / count.clamp(min=1)).reshape(1), sums.new_zeros(1)).float()


def zero_mean(device: torch.device) -> dict[str, Any]:
    """The state of BCO before the first step, of `TrainState.extra`."""
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return {"bco": kto.Running(zero, zero.long())._asdict()}


def prepare_mean(state: TrainState, micro_batches: Sequence[tuple[Batch, Plan]]) -> list[tuple[Batch, Plan]]:
    """Micro-batches with BCO's mean of the rewards so far."""
    return [(batch | {"delta": state.extra["bco"]["mean"]}, plan) for batch, plan in micro_batches]


def update_mean(state: TrainState, metrics: dict[str, Tensor], step: int) -> TrainState:
    """The state with the mean over the rewards of the step that ends, too."""
    running = kto.merge(kto.Running(**state.extra["bco"]), metrics["rewards/mean"], metrics["rows"])
    return state._replace(extra=state.extra | {"bco": running._asdict()})
