"""Rewards of energy-based fine-tuning by the names of options: how features are pooled and compared, scores, advantages.

N rows of B sequences; P groups (a prompt, or an anchor of a document), n rollouts of each, of G tokens at an anchor; phi [P, n, D] features
of the rollouts, y [P, D] those of the truth.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from treetune.losses import ebft

NORMS = {"per_layer": ebft.per_layer, "joint": ebft.joint, "raw": ebft.raw}
POOLS = {"last_token": ebft.last_token, "mean_pooling": ebft.mean_pooling, "concat": ebft.concat}
WHITEN = {"features": ebft.whiten_features, "rows": ebft.whiten_rows}
ADVANTAGES = {"rloo": ebft.rloo, "group_norm": ebft.group_norm, "reinforce": ebft.reinforce}


class Comparison(NamedTuple):
    """How rollouts are scored: features are whitened over a space, or else compared as they are or at unit_length."""

    alignment_coef: float = 1.0
    diversity_coef: float = 1.0
    whitening: str | None = None
    unit_length: bool = False


def pool(x: Tensor, seq: Tensor, seq_lens: Tensor, prompt_lens: Tensor, *, method: str) -> Tensor:
    """One vector for each sequence: x [N, D] -> [B, D]; the first prompt_lens [B] rows of each count unless the method leaves them out."""
    if method == "completion_mean":
        return ebft.completion_mean(x, seq, seq_lens, prompt_lens)
    return POOLS[method](x, seq, seq_lens)


def compare(phi: Tensor, y: Tensor, comparison: Comparison) -> ebft.Scores:
    """Scores of rollouts against the truth."""
    if comparison.whitening is not None:
        phi, y = WHITEN[comparison.whitening](phi, y)
    elif comparison.unit_length:
        phi, y = ebft.unit(phi), ebft.unit(y)
    return ebft.scores(phi, y, alignment_coef=comparison.alignment_coef, diversity_coef=comparison.diversity_coef)


def stacked(scores: ebft.Scores) -> Tensor:
    """alignment, diversity and cfm of each rollout side by side: [P, n, 3]; cfm is the same for all rollouts of a group."""
    return torch.stack([scores.alignment, scores.diversity, scores.cfm[:, None].expand_as(scores.alignment)], -1)


def advantages(scores: ebft.Scores, estimator: str, comparison: Comparison) -> Tensor:
    """Advantages [P, n]; the reward itself for one rollout, which nothing can be compared with."""
    if estimator == "rloo_paired":
        return ebft.rloo_paired(scores, alignment_coef=comparison.alignment_coef, diversity_coef=comparison.diversity_coef)
    return ADVANTAGES[estimator](scores.reward)


def of_blocks(phi: Tensor, y: Tensor, tokens: Tensor, true: Tensor, *, estimator: str, comparison: Comparison) -> dict[str, Tensor]:
    """Scores and advantages [P, n] by their keys in a batch, equal for equal rollouts: tokens [P, n, G], the true ones [P, G]."""
    scores = equal_scores(compare(equal_features(phi, y, tokens, true), y, comparison), tokens)
    rewards = {"alignment": scores.alignment, "diversity": scores.diversity, "ebft_reward": scores.reward}
    gains = advantages(scores, estimator, comparison)
    return rewards | {"advantage": gains, "cfm": scores.cfm[:, None].expand_as(scores.reward)}


def equal_features(phi: Tensor, y: Tensor, tokens: Tensor, true: Tensor) -> Tensor:
    """The features with those of equal rollouts, tokens [P, n, G], made equal: to the truth's where they say what it does, true [P, G].

    In bfloat16 where a rollout stands in the stream moves its features by 1e-3, which whitening would scale up to a direction.
    """
    phi = phi.gather(1, _first_equal(tokens)[:, :, None].expand_as(phi))
    return torch.where((tokens == true[:, None]).all(-1)[:, :, None], y[:, None], phi)


def equal_scores(scores: ebft.Scores, tokens: Tensor) -> ebft.Scores:
    """The scores with those of equal rollouts of a group made equal to the bit: tokens [P, n, G].

    Rounding tells their features apart, and an advantage that divides by the deviation of a group would make it a signal.
    """
    first = _first_equal(tokens)
    reward, near, alike = (value.gather(1, first) for value in (scores.reward, scores.alignment, scores.diversity))
    return scores._replace(reward=reward, alignment=near, diversity=alike)


def _first_equal(tokens: Tensor) -> Tensor:
    """The first rollout of the same tokens, for each: [P, n, G] -> [P, n]."""
    return (tokens[:, :, None] == tokens[:, None]).all(-1).int().argmax(-1)
