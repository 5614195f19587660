"""Weights and masks of tokens that another policy than the trained one wrote: constants, without a gradient.

N scored tokens, B sequences: logp, old_logp, sampler_logp [N] are log-probs (nats) of the policy now, of the trainer at sampling
time, and as the sampler reported them (nan where it could not); seq [N] is the sequence of each token, seq_lens [B] the tokens of each.
g = old_logp - sampler_logp, 0 where the sampler's is nan; rho = e^g. Denominators count masked tokens, too.
"""

import math

import torch
from torch import Tensor

from treetune.core.state import Metric
from treetune.losses import limits
from treetune.losses.reduce import masked_mean, per_sequence, upcast


def token_truncate(
    old_logp: Tensor,
    sampler_logp: Tensor,
    seq: Tensor,
    seq_lens: Tensor,
    *,
    low: float | None = None,
    high: float | None = 3.0,
    mean: bool = False,
) -> Tensor:
    """clip(rho_t, low, high), truncated importance sampling: [N]. No bound applies unless given; `mean` is for sequences only.

    Source: Yao et al., Your efficient RL framework secretly brings you off-policy RL training, 2025.
    """
    _token_level(mean)
    return _truncated(_gap(old_logp, sampler_logp).exp(), low, high)


def token_mask(
    old_logp: Tensor,
    sampler_logp: Tensor,
    seq: Tensor,
    seq_lens: Tensor,
    *,
    low: float | None = None,
    high: float | None = 3.0,
    mean: bool = False,
) -> Tensor:
    """rho_t where low <= rho_t <= high, else 0: [N]. With both bounds known as IcePop."""
    _token_level(mean)
    return _masked(_gap(old_logp, sampler_logp).exp(), low, high)


def sequence_truncate(
    old_logp: Tensor,
    sampler_logp: Tensor,
    seq: Tensor,
    seq_lens: Tensor,
    *,
    low: float | None = None,
    high: float | None = 3.0,
    mean: bool = False,
) -> Tensor:
    """clip(e^(sum_t g), low, high) at every token of the sequence: [N]; `mean` takes the mean over its tokens, not the sum.

    A bias of 0.0012 nats per token over 1000 tokens gives a ratio of 3.3: with long completions consider `mean`.
    """
    return _truncated(_sequence_ratio(old_logp, sampler_logp, seq, seq_lens, mean), low, high)[seq]


def sequence_mask(
    old_logp: Tensor,
    sampler_logp: Tensor,
    seq: Tensor,
    seq_lens: Tensor,
    *,
    low: float | None = None,
    high: float | None = 3.0,
    mean: bool = False,
) -> Tensor:
    """rho = e^(sum_t g) at every token where low <= rho <= high, else 0: [N]; `mean` as in `sequence_truncate`."""
    return _masked(_sequence_ratio(old_logp, sampler_logp, seq, seq_lens, mean), low, high)[seq]


def off_policy_mask(logp: Tensor, sampler_logp: Tensor, advantage: Tensor, seq: Tensor, seq_lens: Tensor, *, threshold: float) -> Tensor:
    """Tokens to keep, [N] bool: A >= 0, or mean_t(sampler_logp - logp) <= threshold (nats per token) over the sequence.

    advantage [N]. A sequence that has become more likely has a mean below 0 and stays. Pass old_logp for sampler_logp where
    there is none. A logp or advantage of nan is kept, so that the loss shows it. Source: DeepSeek-V3.2, arXiv 2512.02556.
    """
    drift = -per_sequence(limits.capped(_gap(logp, sampler_logp)), seq, seq_lens) / seq_lens.clamp(min=1)  # [B]
    return ~((advantage.detach() < 0) & (drift[seq] > threshold))


def entropy_threshold(entropy: Tensor, *, quantile: float) -> Tensor:
    """The entropy (nats) that the share `quantile` of tokens reaches, interpolated between two: [N] -> 0-d; -inf for N = 0.

    quantile is 1 for all tokens, 0 for the highest only. The result depends on what is passed: pass all tokens of the step.
    Source: Wang et al. (Beyond the 80/20 rule), arXiv 2506.01939.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile={quantile!r}: expected the share of tokens to keep, from 0 to 1, 0.2 for instance")
    ordered = upcast(entropy.detach()).sort().values  # torch.quantile refuses more than 16 million
    if ordered.numel() == 0:
        return ordered.new_full((), -torch.inf)
    # Rounded, because (1 - 0.7) * 10 is above 3, which would put the threshold above the very token that reaches it.
    rank = round((1 - quantile) * (len(ordered) - 1), 6)
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (rank - below) * (ordered[above] - ordered[below])


def entropy_mask(entropy: Tensor, threshold: Tensor) -> Tensor:
    """Tokens to keep, [N] bool: entropy >= threshold (0-d, of `entropy_threshold`). nan is kept, so that the loss shows it."""
    return ~(upcast(entropy.detach()) < threshold)


def stats(
    old_logp: Tensor, sampler_logp: Tensor, correction: Tensor, seq: Tensor, seq_lens: Tensor, *, by_sequence: bool = False
) -> dict[str, Metric]:
    """|g| and the correction [N] that came of it, weighted by count: per token, or `by_sequence` once per sequence with tokens.

    Tokens that the sampler could not score are left out of |g|, and count with the ratio that they got.
    """
    scored, gap = ~sampler_logp.isnan(), _gap(old_logp, sampler_logp).abs()
    weights = correction.detach()
    if by_sequence:
        weights = weights[(seq_lens.cumsum(0) - seq_lens)[seq_lens > 0]]  # the first token of each sequence
    every = torch.ones_like(weights, dtype=torch.bool)
    name, ratio = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"
    return {
        f"{name}/mean": masked_mean(gap, scored),
        f"{name}/max": Metric(_extreme(torch.where(scored, gap, -torch.inf), "amax"), scored.sum(), "max"),
        f"{ratio}/min": Metric(_extreme(weights, "amin"), every.sum(), "min"),
        f"{ratio}/mean": masked_mean(weights, every),
        f"{ratio}/max": Metric(_extreme(weights, "amax"), every.sum(), "max"),
    }


def _gap(logp: Tensor, sampler_logp: Tensor) -> Tensor:
    return torch.where(sampler_logp.isnan(), 0.0, limits.minus(upcast(logp.detach()), upcast(sampler_logp.detach())))


def _sequence_ratio(old_logp: Tensor, sampler_logp: Tensor, seq: Tensor, seq_lens: Tensor, mean: bool) -> Tensor:
    """[N] -> [B]."""
    total = per_sequence(limits.capped(_gap(old_logp, sampler_logp)), seq, seq_lens)
    return (total / seq_lens.clamp(min=1) if mean else total).exp()


def _truncated(ratio: Tensor, low: float | None, high: float | None) -> Tensor:
    _check_bounds(low, high)
    if low is None and high is None:
        raise ValueError("low and high are both None, which truncates nothing; give one of them, high=3.0 for instance")
    return ratio.clamp(min=low, max=high)


def _masked(ratio: Tensor, low: float | None, high: float | None) -> Tensor:
    """A ratio of nan stays, so that the loss shows it."""
    _check_bounds(low, high)
    outside = torch.zeros_like(ratio, dtype=torch.bool)
    if low is not None:
        outside = outside | (ratio < low)
    if high is not None:
        outside = outside | (ratio > high)
    return torch.where(outside, 0.0, ratio)


def _check_bounds(low: float | None, high: float | None) -> None:
    bottom, top = 0.0 if low is None else low, math.inf if high is None else high
    if not 0 <= bottom < top:
        raise ValueError(f"low={low!r} and high={high!r}: expected 0 <= low < high, the bounds of a ratio, None for no bound")


def _token_level(mean: bool) -> None:
    if mean:
        raise ValueError("mean=True is about the ratio of a sequence and this one is per token; take sequence_truncate or sequence_mask")


def _extreme(x: Tensor, which: str) -> Tensor:
    """The least or largest entry; of none, what no other entry loses against."""
    none = x.new_full((1,), torch.inf if which == "amin" else -torch.inf)
    return getattr(torch.cat([x, none]), which)()
