"""Objectives of reward models: scores of whole answers, ranked in pairs, and classes of the steps of one.

N read rows, P pairs, C classes. scores(params, frozen, batch, plan) -> [N, C].
"""

from collections.abc import Callable

import torch
from torch import Tensor

from treetune.core.state import Batch, Metric, Objective, Params, Plan
from treetune.losses import reduce, reward

Scores = Callable[[Params, Params, Batch, Plan], Tensor]


def ranked(scores: Scores, *, centre: float = 0.0) -> Objective:
    """mean over pairs of -log sigma(r_c - r_r - margin) + centre (r_c + r_r)^2; one read row per sequence, a pair's rows side by side."""

    def counts(batch: Batch) -> dict[str, Tensor]:
        return {"pairs": reduce.whole_pairs(batch["seq_lens"]).sum()}

    def terms(params: Params, frozen: Params, batch: Batch, plan: Plan) -> tuple[dict, dict]:
        found = reduce.wide(scores(params, frozen, batch, plan)[:, 0])
        chosen, rejected = found[0::2], found[1::2]
        value = reward.bradley_terry(chosen, rejected, margin=batch["margin"][0::2] if "margin" in batch else 0.0)
        if centre:
            value = value + centre * reward.centring(chosen, rejected)
        return {"pairs": value.sum()}, _ranking(batch, chosen.detach(), rejected.detach())

    return Objective(counts, terms)


def _ranking(batch: Batch, chosen: Tensor, rejected: Tensor) -> dict[str, Metric]:
    every = torch.ones_like(chosen, dtype=torch.bool)
    both, count = torch.cat([chosen, rejected]), every.sum()
    worst = both.new_full((1,), torch.inf)
    return _tokens(batch) | {
        "mean_reward": reduce.masked_mean(both, torch.ones_like(both, dtype=torch.bool)),
        "min_reward": Metric(torch.cat([both, worst]).min(), count, "min"),
        "max_reward": Metric(torch.cat([both, -worst]).max(), count, "max"),
        "accuracy": reduce.masked_mean(chosen > rejected, every),
        "margin": reduce.masked_mean(chosen - rejected, every),
    }


def steps(scores: Scores) -> Objective:
    """Mean over judged steps of the cross entropy of their class."""

    def counts(batch: Batch) -> dict[str, Tensor]:
        return {"steps": batch["seq_lens"].sum()}

    def terms(params: Params, frozen: Params, batch: Batch, plan: Plan) -> tuple[dict, dict]:
        logits, classes = scores(params, frozen, batch, plan), batch["targets"]
        right = logits.detach().argmax(-1) == classes
        found = {"accuracy": reduce.masked_mean(right, torch.ones_like(right))}
        for name, kind in (("good", 1), ("bad", 0)):
            found[f"accuracy/{name}"] = reduce.masked_mean(right, classes == kind)
        return {"steps": reward.process_reward(logits, classes).sum()}, _tokens(batch) | found

    return Objective(counts, terms)


def _tokens(batch: Batch) -> dict[str, Metric]:
    count = batch["seq_lens"].sum()
    return {"num_tokens": Metric(reduce.real_tokens(batch), count, "sum"), "supervised_tokens": Metric(count, count, "sum")}
