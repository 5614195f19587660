"""Rewards to advantages on the host, in float64 and without a gradient: rewards [P, G] or [P, G, K] in, [P, G] out.

P prompts, G completions of each, K reward functions, T tokens of one completion. r is a reward, m a mean and s a standard
deviation, over the completions of a prompt (g) or over all (b). nan means that a function abstained: such an entry is left out of every
moment, and its advantage is 0. Where all rewards of a group are equal, or only one is known, advantages that compare within
the group are exactly 0, not what rounding the mean leaves. Pass the whole generation batch, of all ranks.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from treetune.core import registry
from treetune.losses import presets


def estimator(entry: presets.AdvantageEntry, weights: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """The function rewards [P, G, K] -> advantages [P, G] of a row of `presets.ADVANTAGES`, with a weight for each of the K rewards."""
    function, factors = registry.resolve(entry.function), torch.tensor(weights, dtype=torch.float64)
    if entry.per_reward:
        return lambda rewards: function(rewards, factors)
    return lambda rewards: function(combined(rewards, factors))


def combined(rewards: Tensor, weights: Tensor) -> Tensor:
    """r = sum_k w_k R_k over the functions that do not abstain, nan where all do: [P, G, K], weights [K] -> [P, G]."""
    rewards, weights = _checked(rewards, 3), _weights(weights, rewards)
    return torch.where(rewards.isnan().all(-1), torch.nan, (weights * rewards).nansum(-1))


def penalized(rewards: Tensor, kl: Tensor, *, beta: float, low: float | None = None, high: float | None = None) -> Tensor:
    """clip(r, low, high) - beta kl, kl [P, G] the sum over a completion of `divergence.k1` (nats, may be below 0): -> [P, G].

    For estimators that put the divergence into the reward, as RLOO does. Source: Ahmadian et al., arXiv 2402.14740.
    """
    rewards, kl = _checked(rewards, 2), kl.detach().double()
    if kl.shape != rewards.shape or kl.isnan().any():
        raise ValueError(
            f"kl {tuple(kl.shape)} with {int(kl.isnan().sum())} nan for rewards {tuple(rewards.shape)}; pass a number for each"
        )
    clipped = rewards if low is None and high is None else rewards.clamp(min=low, max=high)
    return clipped - beta * kl


def flat(rewards: Tensor) -> Tensor:
    """Groups without a signal: all known rewards equal (none or one known included): [P, G] -> [P] bool."""
    rewards = _checked(rewards, 2)
    return _flat(rewards, 1)[:, 0]


def zero_std(rewards: Tensor) -> Tensor:
    """`frac_reward_zero_std`: the share of groups that are `flat`, however advantages are scaled: [P, G] -> 0-d; nan for P = 0."""
    return flat(rewards).double().mean()


def centered(rewards: Tensor) -> Tensor:
    """A = r - m_g, the advantage of Dr. GRPO: [P, G] -> [P, G]. Source: Liu et al., arXiv 2503.20783, section 3.2."""
    rewards = _checked(rewards, 2)
    return _within(rewards, rewards - _moments(rewards, 1)[0])


def group_scaled(rewards: Tensor, *, eps: float = 1e-4, ddof: int = 1) -> Tensor:
    """A = (r - m_g) / (s_g + eps): [P, G] -> [P, G]. `ddof` 1 divides squares by n - 1, 0 by n; eps is in units of reward.

    Source: Shao et al. (GRPO), arXiv 2402.03300, section 4.1.
    """
    rewards = _checked(rewards, 2)
    mean, std = _moments(rewards, 1, ddof)
    return _within(rewards, (rewards - mean) / (std + eps))


def batch_scaled(rewards: Tensor, *, eps: float = 1e-4, ddof: int = 1) -> Tensor:
    """A = (r - m_g) / (s_b + eps): group mean, deviation of the whole batch: [P, G] -> [P, G].

    Source: Liu et al. (Tricks or traps), arXiv 2508.08221.
    """
    rewards = _checked(rewards, 2)
    std = _moments(rewards, (0, 1), ddof)[1]
    return _within(rewards, (rewards - _moments(rewards, 1)[0]) / (std + eps))


def gdpo(rewards: Tensor, weights: Tensor, *, eps: float = 1e-4, ddof: int = 1) -> Tensor:
    """A = (q - m_b) / (s_b + eps) of q = sum_k w_k (R_k - m_gk) / (s_gk + eps): [P, G, K], weights [K] -> [P, G].

    Each function is scaled within the group before they are added, so none drowns in another; one that is equal for all
    of a group, or that abstains, adds 0. Source: Liu et al. (GDPO), arXiv 2601.05242.
    """
    rewards, weights = _checked(rewards, 3), _weights(weights, rewards)
    mean, std = _moments(rewards, 1, ddof)
    scaled = torch.where(_flat(rewards, 1) | rewards.isnan(), 0.0, (rewards - mean) / (std + eps))
    total = torch.where(rewards.isnan().all(-1), torch.nan, (weights * scaled).sum(-1))
    mean, std = _moments(total, (0, 1), ddof)
    return _within(total, (total - mean) / (std + eps))


def rloo(rewards: Tensor) -> Tensor:
    """A_i = r_i - mean of the other completions = n / (n - 1) (r_i - m_g), n the known ones: [P, G] -> [P, G].

    Source: Ahmadian et al. (RLOO), arXiv 2402.14740.
    """
    rewards = _checked(rewards, 2)
    valid = ~rewards.isnan()
    others = (valid.sum(1, keepdim=True) - 1).clamp(min=1)
    return _within(rewards, rewards - (rewards.nansum(1, keepdim=True) - rewards) / others)


def rloo_normalized(rewards: Tensor, *, eps: float = 1e-4, ddof: int = 1) -> Tensor:
    """A = (a - m_b) / (s_b + eps) of a = `rloo`: [P, G] -> [P, G]; flat groups are in the moments and stay exactly 0."""
    rewards = _checked(rewards, 2)
    centred = torch.where(rewards.isnan(), torch.nan, rloo(rewards))
    mean, std = _moments(centred, (0, 1), ddof)
    return _within(rewards, (centred - mean) / (std + eps))


def reinforce(rewards: Tensor) -> Tensor:
    """A = r, no baseline, so that a flat group trains too: [P, G] -> [P, G]. Source: Williams, Machine Learning 8, 1992."""
    return _checked(rewards, 2).nan_to_num(nan=0.0)


def batch_centered(rewards: Tensor, *, eps: float = 1e-4, ddof: int = 1) -> Tensor:
    """A = (r - m_b) / (s_b + eps), one baseline for all prompts: [P, G] -> [P, G]; 0 only where the whole batch is equal.

    Source: Hu (REINFORCE++), arXiv 2501.03262.
    """
    rewards = _checked(rewards, 2)
    return group_scaled(rewards.reshape(1, -1), eps=eps, ddof=ddof).reshape(rewards.shape)


def gae(rewards: Tensor, values: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(A, A + V) of A_t = d_t + gamma lam A_{t+1}, d_t = r_t + gamma V_{t+1} - V_t, 0 beyond the end: [T], [T] -> [T], [T].

    rewards are per token, nan not allowed. Source: Schulman et al., arXiv 1506.02438, eq. 16.
    """
    if rewards.ndim != 1 or rewards.shape != values.shape:
        raise ValueError(f"rewards {tuple(rewards.shape)} and values {tuple(values.shape)}: expected one completion's tokens, [T] both")
    rewards, values = rewards.detach().double(), values.detach().double()
    delta = rewards + gamma * torch.cat([values[1:], values.new_zeros(1)])[: len(values)] - values
    advantages, after = [], values.new_zeros(())
    for step in reversed(delta.unbind()):
        after = step + gamma * lam * after
        advantages.append(after)
    advantage = torch.stack(advantages[::-1]) if advantages else delta
    return advantage, advantage + values


def whiten(x: Tensor, *, eps: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(var + eps), var over n - 1: [N] -> [N] of mean 0 over what is passed; equal entries become exactly 0."""
    x = x.detach().double()
    if x.numel() == 0 or (x == x.flatten()[0]).all():
        return torch.zeros_like(x)
    return (x - x.mean()) * (x.var() + eps).rsqrt()


def _checked(rewards: Tensor, ndim: int) -> Tensor:
    """The rewards detached and in float64. ValueError for another number of dimensions or an infinite reward."""
    if rewards.ndim != ndim:
        shape = "[P, G, K], a reward of each function" if ndim == 3 else "[P, G], one reward per completion (see `combined`)"
        raise ValueError(f"rewards of shape {tuple(rewards.shape)}: expected {shape}")
    # float64: group sizes are small and rewards often nearly equal, where float32 moments lose what tells completions apart.
    rewards = rewards.detach().double()
    if rewards.isinf().any():
        index = torch.nonzero(rewards.isinf())[0].tolist()
        raise ValueError(f"the reward at {index} is infinite; expected a finite number, or nan to abstain")
    return rewards


def _weights(weights: Tensor, rewards: Tensor) -> Tensor:
    weights = weights.detach().to(rewards)
    if weights.shape != rewards.shape[-1:] or not weights.isfinite().all():
        raise ValueError(f"weights {weights.tolist()} for {rewards.shape[-1]} reward functions; expected one finite number for each")
    return weights


def _moments(x: Tensor, dim: int | tuple[int, ...], ddof: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the known entries over `dim`, which stays with size 1; 0 where there are too few."""
    if ddof not in (0, 1):
        raise ValueError(f"ddof={ddof!r}: expected 1 (divide by n - 1) or 0 (by n)")
    valid = ~x.isnan()
    count = valid.sum(dim, keepdim=True)
    mean = x.nansum(dim, keepdim=True) / count.clamp(min=1)
    squares = (x - mean).square().nansum(dim, keepdim=True)
    return mean, (squares / (count - ddof).clamp(min=1)).sqrt()


def _flat(x: Tensor, dim: int) -> Tensor:
    """Whether the known entries along dim are all equal; dim stays with size 1. A range, because moments round."""
    # Seven float32 rewards of 0.7 have a mean that is not 0.7: divided by their tiny deviation that would be an advantage of 6e-4.
    if x.shape[dim] == 0:
        return torch.ones_like(x.sum(dim, keepdim=True), dtype=torch.bool)
    top = torch.where(x.isnan(), -torch.inf, x).amax(dim, keepdim=True)
    return top <= torch.where(x.isnan(), torch.inf, x).amin(dim, keepdim=True)


def _within(rewards: Tensor, advantage: Tensor) -> Tensor:
    """The advantage, 0 for entries that are not known and for flat groups."""
    return torch.where(_flat(rewards, 1) | rewards.isnan(), 0.0, advantage)
