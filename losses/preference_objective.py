"""The objective of preference pairs: sequence 2i of the stream is the chosen, 2i + 1 the rejected side of pair i.

N scored tokens, M scored prompt tokens, B = 2P sequences, P pairs. A pair with an empty side is left out of the term over pairs.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treetune.core import registry
from treetune.core.state import Batch, Logprob, Metric, Metrics, Objective, Params, Plan, Terms, TokenStats
from treetune.losses import limits, preference, presets, reduce
from treetune.losses.preference import Pairs

PairLoss = Callable[[Pairs], Tensor]
STATS = ("top1",)  # a mean of logits is differentiable, so it would cost the head its shortcut: evaluations report it


class Options(NamedTuple):
    """Terms and weights besides the loss of a pair: all off by default.

    nll_coef: weight of the chosen side's mean negative log-likelihood per token. prompts: count the prompt's tokens in it.
    ld_alpha: LD-DPO's weight of the tokens past the shorter side, None for 1. weighting: weigh pairs by `preference.wpo_weight`.
    """

    nll_coef: float = 0.0
    prompts: bool = False
    ld_alpha: float | None = None
    weighting: bool = False


PLAIN = Options()
Rewards = Callable[[Pairs], tuple[Tensor, Tensor]]  # of the chosen and the rejected side, [P] each


def pair_loss(name: str | presets.Entry, **options: Any) -> PairLoss:
    """The loss of a name of `presets.PAIR_LOSSES`, or of a row, with those of `options` that it takes (beta, score, ...)."""
    return registry.bind(presets.PAIR_LOSSES[name] if isinstance(name, str) else name, **options)


def weighted_loss(weights: Mapping[str, float], **options: Any) -> PairLoss | None:
    """The sum of losses by their names, or import paths, each times its weight; None for none."""
    terms = [(pair_loss(registry.choose(presets.PAIR_LOSSES, name), **options), weight) for name, weight in weights.items()]
    if len(terms) == 1 and terms[0][1] == 1:
        return terms[0][0]
    return preference.weighted(tuple(terms)) if terms else None


def implicit_rewards(beta: float) -> Rewards:
    """beta (log p - log p_ref) of each side, the reward that a policy implies; without a reference, beta log p."""

    def rewards(pairs: Pairs) -> tuple[Tensor, Tensor]:
        if pairs.ref_chosen is None or pairs.ref_rejected is None:
            return beta * pairs.chosen, beta * pairs.rejected
        return beta * limits.minus(pairs.chosen, pairs.ref_chosen), beta * limits.minus(pairs.rejected, pairs.ref_rejected)

    return rewards


def mean_rewards(beta: float) -> Rewards:
    """beta log p per token of each side, SimPO's reward."""

    def rewards(pairs: Pairs) -> tuple[Tensor, Tensor]:
        return beta * pairs.chosen / pairs.len_chosen.clamp(min=1), beta * pairs.rejected / pairs.len_rejected.clamp(min=1)

    return rewards


def objective(
    logprob: Logprob,
    loss: PairLoss | None,
    *,
    rewards: Rewards,
    options: Options = PLAIN,
    more: Callable[[Pairs], dict[str, Tensor]] | None = None,
    want: tuple[str, ...] = STATS,
) -> Objective:
    """mean_i loss(pair i) + nll_coef * mean over chosen tokens of -log p; `loss` None leaves the second alone.

    The reference comes with the batch as `ref_logp` [N], or not at all. rewards: what `rewards/*` report of a pair.
    more(pairs): further numbers to report, [P] each. want: statistics to report.
    """
    outputs = want + (("logsq",) if options.weighting else ())

    def counts(batch: Batch) -> Terms:
        pairs = {"pairs": reduce.whole_pairs(batch["seq_lens"]).sum()} if loss else {}
        return pairs | ({"nll": _nll_tokens(batch, options.prompts)} if options.nll_coef else {})

    def terms(params: Params, frozen: Params, batch: Batch, plan: Plan) -> tuple[Terms, Metrics]:
        read = _with_prompts(batch) if options.prompts else batch
        stats, prompt_logp = _apart(logprob(params, frozen, read, plan, want=outputs), batch["at"].shape[0], options.prompts)
        pairs = preference.pairs(stats.logp, batch.get("ref_logp"), batch["seq"], batch["seq_lens"], ld_alpha=options.ld_alpha)
        numerators, whole = {}, reduce.whole_pairs(batch["seq_lens"])
        if loss is not None:
            value = reduce.elementwise(loss(pairs), pairs.chosen, "loss of pairs")
            if options.weighting:
                assert stats.logsq is not None
                value = limits.times(preference.wpo_weight(stats.logp, stats.logsq, batch["seq"], batch["seq_lens"]), value)
            numerators["pairs"] = torch.where(whole, value, 0.0).sum()
        nll = _chosen_nll(stats.logp, batch) - (0.0 if prompt_logp is None else prompt_logp.sum())
        if options.nll_coef:
            numerators["nll"] = options.nll_coef * nll
        reported = metrics(stats, batch, pairs, rewards) | _averages(more(pairs) if more else {}, whole)
        tokens = _nll_tokens(batch, options.prompts)
        return numerators, reported | {"nll_loss": Metric(nll.detach() / tokens.clamp(min=1), tokens)}

    return Objective(counts, terms)


def _with_prompts(batch: Batch) -> Batch:
    """The batch with the prompts' tokens [M] read after its own [N], in one pass of the head."""
    return batch | {name: torch.cat([batch[name], batch[f"prompt_{name}"]]) for name in ("at", "targets")}


def _apart(stats: TokenStats, n: int, prompts: bool) -> tuple[TokenStats, Tensor | None]:
    """The statistics of the first n rows, and the log-probs of the prompts' tokens behind them where these were read."""
    if not prompts:
        return stats, None
    rows = {name: None if value is None else value[:n] for name, value in stats._asdict().items()}
    return stats._replace(**rows), stats.logp[n:]


def _nll_tokens(batch: Batch, prompts: bool) -> Tensor:
    tokens = batch["seq_lens"][0::2].sum()
    return tokens + batch["prompt_at"].shape[0] if prompts else tokens


def _chosen_nll(logp: Tensor, batch: Batch) -> Tensor:
    return torch.where(batch["seq"] % 2 == 0, -reduce.upcast(logp), 0.0).sum()


def _averages(values: dict[str, Tensor], whole: Tensor) -> Metrics:
    count = whole.sum()
    return {name: Metric(torch.where(whole, x.detach(), 0.0).sum() / count.clamp(min=1), count) for name, x in values.items()}


def metrics(stats: TokenStats, batch: Batch, pairs: Pairs, rewards: Rewards) -> Metrics:
    """Metrics of the step: rewards/*, logps/* (nats, summed over a side), logits/* (token means), accuracy of chosen tokens."""
    chosen, rejected = rewards(pairs)
    numbers = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": limits.minus(chosen, rejected),
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
        "logps/chosen": pairs.chosen,
        "logps/rejected": pairs.rejected,
    }
    if pairs.ref_chosen is not None and pairs.ref_rejected is not None:
        tokens = (pairs.len_chosen + pairs.len_rejected).clamp(min=1)
        moved = (limits.minus(pairs.chosen, pairs.ref_chosen), limits.minus(pairs.rejected, pairs.ref_rejected))
        numbers["kl"] = limits.minus(moved[0], -moved[1]) / tokens
    return _averages(numbers, reduce.whole_pairs(batch["seq_lens"])) | token_metrics(stats, batch)


def token_metrics(stats: TokenStats, batch: Batch) -> Metrics:
    """Token means of the statistics that were computed, and counts of tokens."""
    side, count = batch["seq"] % 2 == 0, batch["seq_lens"].sum()
    reported = {"num_tokens": Metric(reduce.real_tokens(batch), count, "sum"), "supervised_tokens": Metric(count, count, "sum")}
    for name, mask in (("chosen", side), ("rejected", ~side)):
        if stats.mean_logit is not None:
            reported[f"logits/{name}"] = reduce.masked_mean(stats.mean_logit, mask)
    if stats.entropy is not None:
        reported["entropy"] = reduce.masked_mean(stats.entropy, torch.ones_like(side))
    if stats.top1 is not None:
        reported["mean_token_accuracy"] = reduce.masked_mean(stats.top1, side)
    return reported
