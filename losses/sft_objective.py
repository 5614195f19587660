"""The supervised objective: a loss per scored token of a stream, averaged over all tokens of the step."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from treetune.core import registry
from treetune.core.state import Batch, Logprob, Metric, Metrics, Objective, Params, Plan, Terms, TokenStats
from treetune.losses import presets, reduce, sft

TokenLoss = Callable[[TokenStats], Tensor]  # -> [N]
STATISTICS = ("logp", "entropy", "lse", "mean_logit", "logsq", "top1", "topk_entropy")  # of TokenStats, that a loss takes by name


def token_loss(name: str | presets.Entry, *, z_loss_coef: float = 0.0, **options: Any) -> tuple[TokenLoss, tuple[str, ...]]:
    """The loss of a name of `presets.TOKEN_LOSSES`, or of a row, and the statistics that `objective` must be asked for (`want`).

    z_loss_coef: weight of the squared log-sum-exp that is added to it. options: what the function takes, as label_smoothing.
    """
    loss = registry.bind(presets.TOKEN_LOSSES[name] if isinstance(name, str) else name, **options)
    free = [p for p in inspect.signature(loss).parameters.values() if p.default is p.empty]
    names = [p.name for p in free if p.kind is not p.VAR_KEYWORD]
    if unknown := [name for name in names if name not in STATISTICS]:
        raise ValueError(f"the token loss takes {unknown[0]}; it is called with those that it names of {', '.join(STATISTICS)}")

    def of_stats(stats: TokenStats) -> Tensor:
        value = reduce.elementwise(loss(*(getattr(stats, key) for key in names)), stats.logp, "loss of scored tokens")
        if not z_loss_coef:
            return value
        assert stats.lse is not None
        return value + sft.z_loss(stats.lse, coef=z_loss_coef)

    return of_stats, tuple(key for key in names if key not in ("logp", "lse"))


def named(logprob: Logprob, name: str = "nll", *, z_loss_coef: float = 0.0, label_smoothing: float = 0.0) -> Objective:
    """The objective of a token loss by its name, or by the import path of a function.

    label_smoothing: of the likelihood, which is `smoothed` then.
    """
    row = registry.choose(presets.TOKEN_LOSSES, "smoothed" if name == "nll" and label_smoothing else name)
    loss, outputs = token_loss(row, z_loss_coef=z_loss_coef, label_smoothing=label_smoothing)
    return objective(logprob, loss, want=tuple(dict.fromkeys(("top1", *outputs))))


def objective(logprob: Logprob, token_loss: TokenLoss | None = None, *, want: tuple[str, ...] = ("top1",)) -> Objective:
    """sum_i w_i token_loss(stats)_i / sum_i w_i over the scored tokens i, where w is `batch["weight"]` (default 1).

    `token_loss(stats) -> [N]` takes the TokenStats of `logprob`, default nll; `want` names the statistics it needs and
    those to report. The reported loss and accuracy are means over tokens.
    """
    token_loss = token_loss or (lambda stats: sft.nll(stats.logp))

    def counts(batch: Batch) -> Terms:
        weight = batch.get("weight")
        return {"nll": batch["seq_lens"].sum() if weight is None else weight.sum()}

    def terms(params: Params, frozen: Params, batch: Batch, plan: Plan) -> tuple[Terms, Metrics]:
        stats = logprob(params, frozen, batch, plan, want=want)
        top, bottom = reduce.by_token(token_loss(stats), batch["seq"], batch["seq_lens"], weight=batch.get("weight"))
        return {"nll": top}, metrics(stats, batch, bottom)

    return Objective(counts, terms)


def metrics(stats: TokenStats, batch: Batch, weight: Tensor) -> Metrics:
    """Metrics of the step: nll (nats per scored token), token counts, and mean_token_accuracy and entropy where they were computed."""
    count = batch["seq_lens"].sum()
    reported = {"num_tokens": Metric(reduce.real_tokens(batch), count, "sum"), "supervised_tokens": Metric(count, count, "sum")}
    plain, total = reduce.by_token(-stats.logp.detach(), batch["seq"], batch["seq_lens"], weight=batch.get("weight"))
    reported["nll"] = Metric(plain / total.clamp(min=1e-38), weight)
    for name, value in (("mean_token_accuracy", stats.top1), ("entropy", stats.entropy)):
        if value is not None:
            reported[name] = Metric(value.detach().float().sum() / count.clamp(min=1), count)
    return reported
