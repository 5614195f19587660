"""The supervised objective: a per-token loss over the scored rows of a stream, averaged over all tokens of the step."""

from collections.abc import Callable

from torch import Tensor

from treetune.core.state import Batch, Metric, Objective, Params, Plan
from treetune.losses import reduce, sft

# logprob(params, frozen, batch, plan, want=...) -> TokenStats of the scored rows
Logprob = Callable[..., tuple]


def objective(logprob: Logprob, token_loss: Callable[..., Tensor] | None = None, *, want: tuple[str, ...] = ("top1",)) -> Objective:
    """sum_i w_i token_loss(stats)_i / sum_i w_i over the scored tokens i, where w is `batch["weight"]` (default 1).

    `token_loss(stats) -> [N]` takes the TokenStats of `logprob`, default nll; `want` names the statistics it needs and
    those to report. The reported loss and accuracy are means over tokens.
    """
    token_loss = token_loss or (lambda stats: sft.nll(stats.logp))

    def counts(batch: Batch) -> dict[str, Tensor]:
        weight = batch.get("weight")
        return {"nll": batch["seq_lens"].sum() if weight is None else weight.sum()}

    def terms(params: Params, frozen: Params, batch: Batch, plan: Plan) -> tuple[dict, dict]:
        stats = logprob(params, frozen, batch, plan, want=want)
        top, bottom = reduce.by_token(token_loss(stats), batch["seq"], batch["seq_lens"], weight=batch.get("weight"))
        return {"nll": top}, metrics(stats, batch, bottom)

    return Objective(counts, terms)


def metrics(stats: tuple, batch: Batch, weight: Tensor) -> dict[str, Metric]:
    """nll (nats per scored token), and where they were computed mean_token_accuracy and entropy (nats); token counts."""
    count = batch["seq_lens"].sum()
    out = {"num_tokens": Metric(reduce.real_tokens(batch), count, "sum"), "supervised_tokens": Metric(count, count, "sum")}
    plain, total = reduce.by_token(-stats.logp.detach(), batch["seq"], batch["seq_lens"], weight=batch.get("weight"))
    out["nll"] = Metric(plain / total.clamp(min=1e-38), weight)
    for name, value in (("mean_token_accuracy", stats.top1), ("entropy", stats.entropy)):
        if value is not None:
            out[name] = Metric(value.detach().float().sum() / count.clamp(min=1), count)
    return out
