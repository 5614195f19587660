"""Losses of single completions that are marked desirable or not, in nats: [B] in, [B] out, float32 at least.

B completions. logp and ref_logp are sums of log-probs over a completion, u = logp - ref_logp its log-ratio; desirable is bool.
sig is the logistic function and lsig its logarithm.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from treetune.losses import limits
from treetune.losses.reduce import upcast


def baseline(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """z0 = sg(max(0, mean_b(logp - ref_logp))) over prompts with a completion of another row: [B] -> 0-d; 0 when B is 0.

    An estimate of KL(policy || reference) in nats. It is a mean over what is passed: pass the whole optimiser step, so
    that the loss does not depend on the micro-batch split. Source: Ethayarajh et al. (KTO), arXiv 2402.01306.
    """
    return (limits.minus(upcast(logp), upcast(ref_logp)).sum() / max(logp.shape[0], 1)).clamp(min=0).detach()


def kto(
    logp: Tensor,
    ref_logp: Tensor,
    desirable: Tensor,
    baseline: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """w_d (1 - sig(beta (u - z0))) where desirable, w_u (1 - sig(beta (z0 - u))) elsewhere; z0 is `baseline` (0-d).

    Its authors advise w_d n_d / (w_u n_u) from 1 to 4/3, n_d and n_u the counts of the classes.
    Source: Ethayarajh et al. (KTO), arXiv 2402.01306.
    """
    # 1 - sig(x) as sig(-x), which keeps its digits where sig(x) rounds to 1.
    u = _minus(limits.minus(upcast(logp), upcast(ref_logp)), baseline)
    return torch.where(desirable, desirable_weight * torch.sigmoid(-beta * u), undesirable_weight * torch.sigmoid(beta * u))


def apo_zero_unpaired(
    logp: Tensor,
    ref_logp: Tensor,
    desirable: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """w_d (1 - sig(beta u)) where desirable, w_u sig(beta u) elsewhere: `kto` with z0 = 0, so no second set of completions.

    Source: D'Oosterlinck et al., arXiv 2408.06266, eq. 7.
    """
    zero = torch.zeros((), dtype=upcast(logp).dtype, device=logp.device)
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    return kto(logp, ref_logp, desirable, zero, beta=beta, **weights)


def bco(logp: Tensor, ref_logp: Tensor, desirable: Tensor, delta: Tensor, *, beta: float = 0.1) -> Tensor:
    """-lsig(beta u - delta) where desirable, -lsig(delta - beta u) elsewhere; delta (0-d) is the mean of a `Running`.

    Source: Jung et al. (BCO), arXiv 2404.04656.
    """
    shifted = _minus(beta * limits.minus(upcast(logp), upcast(ref_logp)), delta)
    return -torch.where(desirable, F.logsigmoid(shifted), F.logsigmoid(-shifted))


def _minus(u: Tensor, scalar: Tensor) -> Tensor:
    """u less a 0-d tensor of any dtype, in the dtype of u."""
    return limits.minus(u, scalar.to(u.dtype))


class Running(NamedTuple):
    """Mean (0-d, float32 or float64) and count (0-d, int64) of all the rewards seen; a run starts from zeros."""

    mean: Tensor
    count: Tensor


def update(running: Running, rewards: Tensor) -> Running:
    """The state after more rewards beta u, of any shape: mean of all seen so far, each counted once. Carries no gradient."""
    rewards = rewards.detach().to(running.mean.dtype)
    return merge(running, rewards.sum() / max(rewards.numel(), 1), running.count.new_full((), rewards.numel()))


def merge(running: Running, mean: Tensor, count: Tensor) -> Running:
    """The state after `count` more rewards whose mean is known, such as those of a step over all its ranks.

    No rewards, and an infinite mean, as of a banned token, leave the state: one such step would stay in it for ever.
    """
    # Masked and not branched on: a step does not wait for the device to say what it counted.
    counted = (count > 0) & ~mean.isinf()
    count = torch.where(counted, count, 0).to(running.count.dtype)
    total = running.count + count
    shift = torch.where(counted, mean.to(running.mean.dtype), running.mean) - running.mean
    return Running(running.mean + shift * count / total.clamp(min=1), total)
