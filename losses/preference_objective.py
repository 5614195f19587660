"""Objectives over packed pairs: sequence 2i of the stream is the chosen, 2i + 1 the rejected side of pair i.

N scored tokens, M prompt tokens that are read too, B = 2P sequences, P pairs. A pair with an empty side is left out of the term over pairs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treetune.core.state import Batch, Metric, Objective, Params, Plan
from treetune.losses import limits, preference, reduce
from treetune.losses.preference import Pairs

PairLoss = Callable[[Pairs], Tensor]
STATS = ("top1",)  # a mean of logits is differentiable, so it would cost the head its shortcut: evaluations report it


class Options(NamedTuple):
    """What of a pair counts, besides its loss: all off by default.

    nll_coef: weight of the chosen side's mean negative log-likelihood per token, on the prompt's tokens too where `prompts`.
    ld_alpha: LD-DPO's weight of the tokens past the shorter side. weighting: WPO.
    """

    nll_coef: float = 0.0
    prompts: bool = False
    ld_alpha: float | None = None
    weighting: bool = False


PLAIN = Options()
Rewards = Callable[[Pairs], tuple[Tensor, Tensor]]


def implicit_rewards(beta: float) -> Rewards:
    """beta (log p - log p_ref) of each side, the reward that a policy implies; without a reference, beta log p."""

    def rewards(pairs: Pairs) -> tuple[Tensor, Tensor]:
        if pairs.ref_chosen is None:
            return beta * pairs.chosen, beta * pairs.rejected
        return beta * limits.minus(pairs.chosen, pairs.ref_chosen), beta * limits.minus(pairs.rejected, pairs.ref_rejected)

    return rewards


def mean_rewards(beta: float) -> Rewards:
    """beta log p per token of each side, SimPO's reward."""

    def rewards(pairs: Pairs) -> tuple[Tensor, Tensor]:
        return beta * pairs.chosen / pairs.len_chosen.clamp(min=1), beta * pairs.rejected / pairs.len_rejected.clamp(min=1)

    return rewards


def objective(
    logprob: Callable[..., Any],
    loss: PairLoss | None,
    *,
    rewards: Rewards,
    options: Options = PLAIN,
    more: Callable[[Pairs], dict[str, Tensor]] | None = None,
    want: tuple[str, ...] = STATS,
) -> Objective:
    """mean_i loss(pair i) + nll_coef * mean over chosen tokens of -log p; `loss` None leaves the second alone.

    logprob(params, frozen, batch, plan, want=...) -> TokenStats. The reference comes with the batch as `ref_logp` [N], or not at all.
    `more(pairs)` gives further numbers to report, [P] each.
    """
    needed = want + (("logsq",) if options.weighting else ())

    def counts(batch: Batch) -> dict[str, Tensor]:
        found = {"pairs": reduce.whole_pairs(batch["seq_lens"]).sum()} if loss else {}
        return found | ({"nll": _nll_tokens(batch, options.prompts)} if options.nll_coef else {})

    def terms(params: Params, frozen: Params, batch: Batch, plan: Plan) -> tuple[dict, dict]:
        stats, prompt_logp = _stats(logprob, params, frozen, batch, plan, needed, options.prompts)
        pairs = preference.pairs(stats.logp, batch.get("ref_logp"), batch["seq"], batch["seq_lens"], ld_alpha=options.ld_alpha)
        found, ok = {}, reduce.whole_pairs(batch["seq_lens"])
        if loss is not None:
            value = loss(pairs)
            if options.weighting:
                value = limits.times(preference.wpo_weight(stats.logp, stats.logsq, batch["seq"], batch["seq_lens"]), value)
            found["pairs"] = torch.where(ok, value, 0.0).sum()
        nll = _chosen_nll(stats.logp, batch) - (prompt_logp.sum() if options.prompts else 0.0)
        if options.nll_coef:
            found["nll"] = options.nll_coef * nll
        reported = metrics(stats, batch, pairs, rewards) | _averages(more(pairs) if more else {}, ok)
        tokens = _nll_tokens(batch, options.prompts)
        return found, reported | {"nll_loss": Metric(nll.detach() / tokens.clamp(min=1), tokens)}

    return Objective(counts, terms)


def _stats(logprob, params, frozen, batch, plan, want, prompts: bool):
    """The statistics of the scored rows, and the log-probs of the prompts' tokens where these are read too."""
    if not prompts:
        return logprob(params, frozen, batch, plan, want=want), None
    both = batch | {name: torch.cat([batch[name], batch[f"prompt_{name}"]]) for name in ("at", "targets")}
    stats, n = logprob(params, frozen, both, plan, want=want), batch["at"].shape[0]
    return type(stats)(*[None if value is None else value[:n] for value in stats]), stats.logp[n:]


def _nll_tokens(batch: Batch, prompts: bool) -> Tensor:
    tokens = batch["seq_lens"][0::2].sum()
    return tokens + batch["prompt_at"].shape[0] if prompts else tokens


def _chosen_nll(logp: Tensor, batch: Batch) -> Tensor:
    return torch.where(batch["seq"] % 2 == 0, -reduce.wide(logp), 0.0).sum()


def _averages(values: dict[str, Tensor], ok: Tensor) -> dict[str, Metric]:
    count = ok.sum()
    return {name: Metric(torch.where(ok, x.detach(), 0.0).sum() / count.clamp(min=1), count) for name, x in values.items()}


def metrics(stats: Any, batch: Batch, pairs: Pairs, rewards: Rewards) -> dict[str, Metric]:
    """The documented numbers: rewards/*, logps/* (nats, summed over a side), logits/* (token means), accuracy of chosen tokens."""
    ok, (chosen, rejected) = reduce.whole_pairs(batch["seq_lens"]), rewards(pairs)
    out = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": limits.minus(chosen, rejected),
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
        "logps/chosen": pairs.chosen,
        "logps/rejected": pairs.rejected,
    }
    if pairs.ref_chosen is not None:
        tokens = (pairs.len_chosen + pairs.len_rejected).clamp(min=1)
        moved = (limits.minus(pairs.chosen, pairs.ref_chosen), limits.minus(pairs.rejected, pairs.ref_rejected))
        out["kl"] = limits.minus(moved[0], -moved[1]) / tokens
    return _averages(out, ok) | token_metrics(stats, batch)


def token_metrics(stats: Any, batch: Batch) -> dict[str, Metric]:
    """Token means of the statistics that there are, and how many tokens were read and scored."""
    side, count = batch["seq"] % 2 == 0, batch["seq_lens"].sum()
    out = {"num_tokens": Metric(reduce.real_tokens(batch), count, "sum"), "supervised_tokens": Metric(count, count, "sum")}
    for name, mask in (("chosen", side), ("rejected", ~side)):
        if stats.mean_logit is not None:
            out[f"logits/{name}"] = reduce.masked_mean(stats.mean_logit, mask)
    if stats.entropy is not None:
        out["entropy"] = reduce.masked_mean(stats.entropy, torch.ones_like(side))
    if stats.top1 is not None:
        out["mean_token_accuracy"] = reduce.masked_mean(stats.top1, side)
    return out
