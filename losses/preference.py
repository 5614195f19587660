"""Losses of preference pairs against a reference, in nats: fn(pairs, *, beta, ...) -> [P], float32 at least.

N scored tokens, B = 2P sequences (2i is chosen, 2i + 1 rejected of pair i). S is the sum of the log-probs of a sequence
and n its scored tokens; u = S - S_ref is its log-ratio and s = score(u); _c is chosen, _r rejected; h = beta (s_c - s_r).
A mean over a sequence of no tokens is 0. beta is above 0; sig is the logistic function and lsig its logarithm.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from treetune.losses import limits
from treetune.losses.reduce import per_sequence, upcast

Score = Callable[[Tensor], Tensor]
PairLoss = Callable[..., Tensor]
FLAT = 1e6  # |h| beyond which what saturates has done so exactly, whatever its temperature


class Pairs(NamedTuple):
    """Sums of log-probs (nats) and counts of scored tokens (int64), [P] each; the references are None where there is none."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor | None
    ref_rejected: Tensor | None
    len_chosen: Tensor
    len_rejected: Tensor


def pairs(logp: Tensor, ref_logp: Tensor | None, seq: Tensor, seq_lens: Tensor, *, ld_alpha: float | None = None) -> Pairs:
    """Sums of each sequence, chosen and rejected apart: logp and ref_logp [N], seq [N] sorted, seq_lens [B] -> [P] each.

    With `ld_alpha` the sums of policy and reference both are those of `ld_sum`, with the same cut. ValueError when B is odd.
    """

    def sums(x: Tensor) -> Tensor:
        return per_sequence(x, seq, seq_lens) if ld_alpha is None else ld_sum(x, seq, seq_lens, ld_alpha=ld_alpha)

    lens = _two_sided(seq_lens)
    policy = _two_sided(sums(logp))
    ref = None if ref_logp is None else _two_sided(sums(ref_logp))
    ref_chosen, ref_rejected = (None, None) if ref is None else (ref[:, 0], ref[:, 1])
    return Pairs(policy[:, 0], policy[:, 1], ref_chosen, ref_rejected, lens[:, 0], lens[:, 1])


def ld_sum(logp: Tensor, seq: Tensor, seq_lens: Tensor, *, ld_alpha: float) -> Tensor:
    """Sum of log-probs up to k tokens, and ld_alpha times the rest: [N] -> [B]; k is the length of the pair's shorter side.

    ld_alpha is 1 for the plain sum and 0 to leave the surplus of the longer side out. seq is sorted.
    Source: Liu et al. (LD-DPO), arXiv 2409.06411.
    """
    if isinstance(ld_alpha, int | float) and not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha={ld_alpha!r}: expected a number from 0 (leave surplus tokens out) to 1 (plain DPO)")
    shared = _two_sided(seq_lens).amin(1, keepdim=True).expand(-1, 2).reshape(-1)  # [B]
    place = torch.arange(seq.shape[0], device=seq.device) - (seq_lens.cumsum(0) - seq_lens)[seq]
    x = upcast(logp)
    # 0 times the -inf or nan of a token that is left out would be nan.
    rest = torch.zeros_like(x) if isinstance(ld_alpha, int | float) and ld_alpha == 0 else limits.times(ld_alpha, x)
    return per_sequence(torch.where(place < shared[seq], x, rest), seq, seq_lens)


def wpo_weight(logp: Tensor, logsq: Tensor, seq: Tensor, seq_lens: Tensor) -> Tensor:
    """sg(w_c w_r), the factor of WPO on any elementwise pair loss: [N] -> [P]; w = exp(mean_t(logp - logsq)).

    logsq = log sum_v p(v)^2, so that w is near 1 for what the policy would itself sample. It compares no pairs with
    others, so it does not go with `aot`, which does.
    Source: Zhou et al. (WPO), arXiv 2406.11827, eq. 2.
    """
    means = per_sequence(upcast(logp) - upcast(logsq), seq, seq_lens) / seq_lens.clamp(min=1)
    return _two_sided(means).sum(1).exp().detach()


def weighted(parts: Sequence[tuple[PairLoss, float]]) -> PairLoss:
    """The loss sum_i weight_i fn_i(pairs, **options) of ((fn, weight), ...); options that not all take go in a `partial`.

    Parts of weight 0 are not computed. ValueError without any other. Source: Wang et al. (MPO), arXiv 2411.10442.
    """
    weighted_losses = [(fn, weight) for fn, weight in parts if weight != 0]
    if not weighted_losses:
        raise ValueError(f"a mixture of {len(parts)} losses, none with a weight; give at least one a weight that is not 0")

    def mixture(pairs: Pairs, **options) -> Tensor:
        first, *others = [weight * fn(pairs, **options) for fn, weight in weighted_losses]
        return sum(others, first)

    return mixture


def reverse_kl(u: Tensor) -> Tensor:
    """s = u, the score of DPO itself."""
    return u


def forward_kl(u: Tensor) -> Tensor:
    """s = 1 - e^-u; -inf in float32 below u = -88: alpha_divergence with alpha=0 is the same, clamped.

    Source: Wang et al. (f-DPO), arXiv 2309.16240, as are `js` and `alpha_divergence`.
    """
    return -limits.expm1(-u)


def js(u: Tensor) -> Tensor:
    """s = ln 2 + lsig(u), Jensen-Shannon."""
    return math.log(2) + limits.logsigmoid(u)


def alpha_divergence(u: Tensor, *, alpha: float = 0.5) -> Tensor:
    """s = (e^((alpha - 1) u) - 1) / (alpha - 1), and u at alpha = 1; the exponent is clamped at 80, beyond which s is flat."""
    if abs(alpha - 1) < 1e-6:
        return u
    return limits.expm1(((alpha - 1) * u).clamp(max=80)) / (alpha - 1)


def dpo(pairs: Pairs, *, beta: float = 0.1, score: Score = reverse_kl) -> Tensor:
    """-lsig(h). Source: Rafailov et al., arXiv 2305.18290, eq. 7."""
    return -F.logsigmoid(beta * _margin(pairs, score))


def cdpo(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0, score: Score = reverse_kl) -> Tensor:
    """-(1 - eps) lsig(h) - eps lsig(-h), eps in [0, 0.5) the rate of flipped labels.

    Source: Mitchell, A note on DPO with noisy preferences and relationship to IPO, 2023.
    """
    return _smoothed(beta * _margin(pairs, score), label_smoothing)


def ipo(pairs: Pairs, *, beta: float = 0.1, score: Score = reverse_kl) -> Tensor:
    """(s_c / n_c - s_r / n_r - 1 / (2 beta))^2, per-token means as its authors use it. Source: Azar et al., arXiv 2310.12036, eq. 17."""
    return limits.square(_mean_margin(pairs, score) - 1 / (2 * beta))


def hinge(pairs: Pairs, *, beta: float = 0.1, score: Score = reverse_kl) -> Tensor:
    """max(0, 1 - h). Source: Zhao et al. (SLiC), arXiv 2305.10425; Liu et al. (RSO), arXiv 2309.06657."""
    return F.relu(1 - beta * _margin(pairs, score))


def exo(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 1e-3, score: Score = reverse_kl) -> Tensor:
    """sig(h) (lsig(h) - log(1 - eps)) + sig(-h) (lsig(-h) - log eps), eps in (0, 0.5): reverse KL to the smoothed label.

    Source: Ji et al. (EXO), arXiv 2402.00856, eq. 16.
    """
    _check_smoothing(label_smoothing, above_0=True)
    h = (beta * _margin(pairs, score)).clamp(-FLAT, FLAT)
    win = torch.sigmoid(h) * (F.logsigmoid(h) - math.log1p(-label_smoothing))
    return win + torch.sigmoid(-h) * (F.logsigmoid(-h) - math.log(label_smoothing))


def nca(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """-lsig(beta u_c) - (lsig(-beta u_c) + lsig(-beta u_r)) / 2. Source: Chen et al., arXiv 2402.05369."""
    chosen, rejected = _rewards(pairs, beta)
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def robust(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0, score: Score = reverse_kl) -> Tensor:
    """(-(1 - eps) lsig(h) + eps lsig(-h)) / (1 - 2 eps), eps in [0, 0.5): unbiased when that share of labels is flipped.

    Source: Chowdhury et al., arXiv 2403.00409.
    """
    _check_smoothing(label_smoothing)
    h = beta * _margin(pairs, score)
    return (limits.times(label_smoothing, F.logsigmoid(-h)) - (1 - label_smoothing) * F.logsigmoid(h)) / (1 - 2 * label_smoothing)


def bco_pair(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """-lsig(beta u_c) - lsig(-beta u_r), without the running mean of `kto.bco`. Source: Jung et al., arXiv 2404.04656."""
    chosen, rejected = _rewards(pairs, beta)
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def sppo_hard(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """(u_c - 1 / (2 beta))^2 + (u_r + 1 / (2 beta))^2, a win counted as certain. Source: Wu et al., arXiv 2405.00675, eq. 4.7."""
    chosen, rejected = _log_ratios(pairs)
    return limits.square(chosen - 0.5 / beta) + limits.square(rejected + 0.5 / beta)


def aot(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0, group: Tensor | None = None) -> Tensor:
    """cdpo on d: the policy's S_c - S_r less the reference's ref_c - ref_r of the same rank in the group.

    Optimal transport between the two distributions of margins, hence a pair's loss depends on its group: `group` [P]
    int64 numbers the pairs that are ranked together (default: all that are passed). Entry i belongs to pair i.
    Source: Melnyk et al., arXiv 2406.05882.
    """
    ref_chosen, ref_rejected = _reference(pairs)
    margins = limits.minus(upcast(pairs.chosen), upcast(pairs.rejected))
    ref_margins = limits.minus(ref_chosen, ref_rejected)
    return _smoothed(beta * limits.minus(margins, _same_rank(margins, ref_margins, group)), label_smoothing)


def aot_unpaired(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0, group: Tensor | None = None) -> Tensor:
    """cdpo on d: u_c less the u_r of the same rank in the group, so chosen and rejected need not answer the same prompt.

    `group` as in `aot`; entry i belongs to chosen i. Source: Melnyk et al., arXiv 2406.05882.
    """
    chosen, rejected = _log_ratios(pairs)
    return _smoothed(beta * limits.minus(chosen, _same_rank(chosen, rejected, group)), label_smoothing)


def apo_zero(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """1 - sig(beta u_c) + sig(beta u_r): chosen up, rejected down. Source: D'Oosterlinck et al., arXiv 2408.06266, eq. 7."""
    chosen, rejected = _rewards(pairs, beta)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """sig(beta u_c) + 1 - sig(beta (u_c - u_r)): both down, rejected more. Source: D'Oosterlinck et al., arXiv 2408.06266, eq. 8."""
    chosen, rejected = _rewards(pairs, beta)
    return torch.sigmoid(chosen) + torch.sigmoid(limits.minus(rejected, chosen))


def discopop(pairs: Pairs, *, beta: float = 0.1, tau: float = 0.05, score: Score = reverse_kl) -> Tensor:
    """(1 - q) (-lsig(h)) + q e^-h, q = sig(h / tau); with tau above 1 it overflows to inf for h far below 0.

    Source: Lu et al. (DiscoPOP), arXiv 2406.08414, eq. 5.
    """
    h = beta * _margin(pairs, score)
    near = h.clamp(-FLAT, FLAT)
    # q e^-h in one exponential: apart, they are 0 and inf for h below -88 in float32. Where that overflows too, its two slopes
    # are added before they meet the inf, as inf - inf would be nan.
    power = F.logsigmoid(near / tau) - near
    slope = (torch.sigmoid(-near / tau) / tau - 1).detach()
    power = torch.where(power.detach().exp().isinf(), power.detach() + slope * (near - near.detach()), power)
    return limits.times(-torch.sigmoid(-near / tau), F.logsigmoid(h)) + limits.exp(power)


def dpo_norm(pairs: Pairs, *, beta: float = 0.1, score: Score = reverse_kl) -> Tensor:
    """-lsig(beta (s_c / n_c - s_r / n_r)), per-token means. Source: Lambert et al. (Tulu 3), arXiv 2411.15124."""
    return -F.logsigmoid(beta * _mean_margin(pairs, score))


def _two_sided(x: Tensor) -> Tensor:
    """[B] -> [P, 2], chosen and rejected."""
    if x.shape[0] % 2:
        raise ValueError(f"{x.shape[0]} sequences cannot be pairs; expected chosen and rejected of each pair in turn")
    return x.reshape(-1, 2)


def _reference(pairs: Pairs) -> tuple[Tensor, Tensor]:
    if pairs.ref_chosen is None or pairs.ref_rejected is None:
        raise ValueError("pairs without reference log-probs; pass ref_logp to preference.pairs, or take a loss of reference_free")
    return upcast(pairs.ref_chosen), upcast(pairs.ref_rejected)


def _log_ratios(pairs: Pairs) -> tuple[Tensor, Tensor]:
    ref_chosen, ref_rejected = _reference(pairs)
    return limits.minus(upcast(pairs.chosen), ref_chosen), limits.minus(upcast(pairs.rejected), ref_rejected)


def _rewards(pairs: Pairs, beta: float) -> tuple[Tensor, Tensor]:
    chosen, rejected = _log_ratios(pairs)
    return beta * chosen, beta * rejected


def _margin(pairs: Pairs, score: Score) -> Tensor:
    chosen, rejected = _log_ratios(pairs)
    return limits.minus(score(chosen), score(rejected))


def _mean_margin(pairs: Pairs, score: Score) -> Tensor:
    chosen, rejected = _log_ratios(pairs)
    return limits.minus(score(chosen) / pairs.len_chosen.clamp(min=1), score(rejected) / pairs.len_rejected.clamp(min=1))


def _smoothed(h: Tensor, label_smoothing: float) -> Tensor:
    _check_smoothing(label_smoothing)
    return -(1 - label_smoothing) * F.logsigmoid(h) - limits.times(label_smoothing, F.logsigmoid(-h))


def _check_smoothing(eps: float, *, above_0: bool = False) -> None:
    """ValueError unless 0 <= eps < 0.5; `above_0` excludes 0. A tensor is not looked into: that would wait for the device."""
    if isinstance(eps, int | float) and not (0 < eps < 0.5 or (eps == 0 and not above_0)):
        raise ValueError(f"label_smoothing={eps!r}: expected a number {'above' if above_0 else 'from'} 0 and below 0.5")


def _same_rank(x: Tensor, y: Tensor, group: Tensor | None) -> Tensor:
    """y rearranged so that entry i is the one with the rank in its group that x_i has in its own: [P]."""
    rank = _order(x, group).argsort()
    return y.gather(0, _order(y, group).gather(0, rank))


def _order(x: Tensor, group: Tensor | None) -> Tensor:
    """Indices that sort x, by group first where there are groups."""
    # Stable, so that equal margins keep one order on every device and a step is repeated bit for bit.
    order = x.detach().argsort(stable=True)
    return order if group is None else order.gather(0, group.gather(0, order).argsort(stable=True))
