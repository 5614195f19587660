"""Objectives of reward models: ranked pairs of scores (a reward model), and classes of steps (a process reward model).

N scored positions, P pairs, C classes.
"""

import torch
from torch import Tensor

from treetune.core.state import Batch, Metric, Metrics, Objective, Params, Plan, Scores, Terms
from treetune.losses import reduce, reward


def ranked(scores: Scores, *, centre: float = 0.0) -> Objective:
    """mean over pairs of -log sigma(r_c - r_r - margin) + centre (r_c + r_r)^2; one scored position per sequence."""

    def counts(batch: Batch) -> Terms:
        return {"pairs": reduce.whole_pairs(batch["seq_lens"]).sum()}

    def terms(params: Params, frozen: Params, batch: Batch, plan: Plan) -> tuple[Terms, Metrics]:
        rewards = reduce.upcast(scores(params, frozen, batch, plan)[:, 0])
        chosen, rejected = rewards[0::2], rewards[1::2]
        value = reward.bradley_terry(chosen, rejected, margin=batch["margin"][0::2] if "margin" in batch else 0.0)
        if centre:
            value = value + centre * reward.centring(chosen, rejected)
        return {"pairs": value.sum()}, _ranking(batch, chosen.detach(), rejected.detach())

    # What is added to every score, as the bias of the last norm does, leaves differences as they are, and sums not.
    return Objective(counts, terms, None if centre else ranked(scores, centre=1.0).terms)


def _ranking(batch: Batch, chosen: Tensor, rejected: Tensor) -> Metrics:
    every = torch.ones_like(chosen, dtype=torch.bool)
    scores, count = torch.cat([chosen, rejected]), every.sum()
    edge = scores.new_full((1,), torch.inf)
    return _tokens(batch) | {
        "mean_reward": reduce.masked_mean(scores, torch.ones_like(scores, dtype=torch.bool)),
        "min_reward": Metric(torch.cat([scores, edge]).min(), count, "min"),
        "max_reward": Metric(torch.cat([scores, -edge]).max(), count, "max"),
        "accuracy": reduce.masked_mean(chosen > rejected, every),
        "margin": reduce.masked_mean(chosen - rejected, every),
    }


def steps(scores: Scores) -> Objective:
    """Mean over judged steps of the cross entropy of their class."""

    def counts(batch: Batch) -> Terms:
        return {"steps": batch["seq_lens"].sum()}

    def terms(params: Params, frozen: Params, batch: Batch, plan: Plan) -> tuple[Terms, Metrics]:
        logits, classes = scores(params, frozen, batch, plan), batch["targets"]
        right = logits.detach().argmax(-1) == classes
        accuracy = {"accuracy": reduce.masked_mean(right, torch.ones_like(right))}
        for name, label in (("good", 1), ("bad", 0)):
            accuracy[f"accuracy/{name}"] = reduce.masked_mean(right, classes == label)
        return {"steps": reward.process_reward(logits, classes).sum()}, _tokens(batch) | accuracy

    return Objective(counts, terms)


def _tokens(batch: Batch) -> Metrics:
    count = batch["seq_lens"].sum()
    return {"num_tokens": Metric(reduce.real_tokens(batch), count, "sum"), "supervised_tokens": Metric(count, count, "sum")}
