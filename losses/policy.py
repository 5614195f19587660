"""Policy losses per scored token: each takes the per-token tensors it needs as named arguments and returns [N] in at least float32.

N scored tokens. ratio [N] comes from `ratio`; advantage A [N] is that of the token's sequence, a constant; logp [N] in nats;
log_ratio rho = logp - old_logp [N]; seq [N] and seq_lens [B] as in `reduce`; sg stops gradients.
A loss with one value per sequence returns it at each of the sequence's tokens, so that their mean is that value.
An advantage of 0 gives exactly 0 with a gradient of 0, also where the ratio overflows. Unbounded losses are inf where their limit is.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from treetune.losses import limits
from treetune.losses.reduce import per_sequence, upcast


def ppo_clip(
    ratio: Tensor, advantage: Tensor, *, epsilon: float = 0.2, epsilon_high: float | None = None, delta: float | None = None
) -> Tensor:
    """-min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A): no gradient once r has left the band in the direction of A.

    epsilon_high defaults to epsilon; delta, above 1 + epsilon_high, bounds r where A is negative, and None leaves it free.
    Source: Schulman et al. (PPO), arXiv 1707.06347, eq. 7; Yu et al. (DAPO), arXiv 2503.14476; INTELLECT-2, arXiv 2505.07291.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    if delta is not None and delta <= 1 + high:
        raise ValueError(f"delta={delta}: expected more than 1 + epsilon_high = {1 + high}, or None for no second bound")
    ratio, advantage = _bounded(upcast(ratio), upcast(advantage)), upcast(advantage)
    free = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.minimum(free * advantage, ratio.clamp(1 - epsilon, 1 + high) * advantage)


def cispo(ratio: Tensor, advantage: Tensor, logp: Tensor, *, epsilon_high: float) -> Tensor:
    """-sg(min(r, epsilon_high)) A l: every token keeps a gradient. epsilon_high is the cap itself, not 1 plus it; 5 is usual.

    ValueError for a cap below 1, which would scale down even tokens of an unchanged policy.
    Source: MiniMax-M1, arXiv 2506.13585; Khatri et al. (ScaleRL), arXiv 2510.13786.
    """
    if epsilon_high < 1:
        raise ValueError(f"cispo with epsilon_high={epsilon_high}: it is the largest ratio itself, at least 1; 5 is usual")
    return -limits.times(_bounded(upcast(ratio), upcast(advantage)).clamp(max=epsilon_high).detach() * upcast(advantage), upcast(logp))


def sapo(ratio: Tensor, advantage: Tensor, *, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Tensor:
    """-(4 / tau) sigmoid(tau (r - 1)) A, tau = tau_pos where A > 0, else tau_neg: a gate that closes softly; its slope at r = 1 is A.

    Source: Gao et al. (SAPO), arXiv 2511.20347.
    """
    ratio, advantage = upcast(ratio), upcast(advantage)
    tau = _by_sign(advantage > 0, tau_pos, tau_neg, ratio)
    return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage


def vespo_weight(
    log_ratio: Tensor,
    advantage: Tensor,
    seq: Tensor,
    seq_lens: Tensor,
    correction: Tensor | None = None,
    *,
    k: tuple[float, float] = (2.0, 3.0),
    rate: tuple[float, float] = (3.0, 2.0),
) -> Tensor:
    """phi(w) = exp(rate + k log w - rate w), 1 at w = 1: [N], one value per sequence, a constant.

    w is the ratio of the whole sequence, times its correction weights per token (not per sequence: they are multiplied up here);
    log w is cut to [ln 1e-8, 20]. An infinite phi counts as 0. k and rate (the paper's lambda): for A >= 0, and for A < 0.
    Source: VESPO, arXiv 2602.10693.
    """
    floor = math.log(1e-8)
    logs = upcast(log_ratio).detach().clamp(-20, 20)
    if correction is not None:
        logs = logs + upcast(correction).log().clamp(floor, 20)
    log_w = per_sequence(logs, seq, seq_lens).clamp(floor, 20)[seq]
    rises = advantage >= 0
    power, lam = _by_sign(rises, *k, log_w), _by_sign(rises, *rate, log_w)
    phi = (lam + power * log_w - lam * log_w.exp()).exp()
    return torch.where(phi == torch.inf, 0.0, phi)  # nan stays: it says that a log-prob is broken


def vespo(
    log_ratio: Tensor,
    advantage: Tensor,
    logp: Tensor,
    seq: Tensor,
    seq_lens: Tensor,
    correction: Tensor | None = None,
    **knobs: tuple[float, float],
) -> Tensor:
    """-phi A l with the weight of `vespo_weight`, which takes the correction between sampler and trainer in (and the knobs).

    Source: VESPO, arXiv 2602.10693.
    """
    return -limits.times(vespo_weight(log_ratio, advantage, seq, seq_lens, correction, **knobs) * upcast(advantage), upcast(logp))


def gmpo(
    log_ratio: Tensor, advantage: Tensor, seq: Tensor, seq_lens: Tensor, *, epsilon: float = 0.4, epsilon_high: float | None = None
) -> Tensor:
    """-exp(mean of c over the sequence) A: c is min(rho, clip(rho, -epsilon, epsilon_high)) where A > 0, max of the two elsewhere.

    The bounds are in log space; epsilon_high defaults to epsilon. Source: Zhao et al. (GMPO), arXiv 2507.20673.
    """
    rho, advantage = upcast(log_ratio), upcast(advantage)
    cut = rho.clamp(-epsilon, epsilon if epsilon_high is None else epsilon_high)
    # The bound by sign keeps tokens that moved against the advantage: only those that went too far along it lose their gradient.
    c = torch.where(advantage > 0, torch.minimum(rho, cut), torch.where(advantage < 0, torch.maximum(rho, cut), cut))
    mean = per_sequence(c, seq, seq_lens) / seq_lens.clamp(min=1)
    return -(limits.exp(mean)[seq] * advantage)


def reinforce(advantage: Tensor, logp: Tensor) -> Tensor:
    """-A l. Source: Williams, Simple statistical gradient-following algorithms, 1992."""
    return -limits.times(upcast(advantage), upcast(logp))


def a_star(logp: Tensor, ref_logp: Tensor, advantage: Tensor, seq: Tensor, seq_lens: Tensor, *, beta: float = 1e-3) -> Tensor:
    """(beta (S - S_ref) - A)^2, S the summed log-prob of the sequence and A = reward - optimal value of its prompt.

    Source: Brantley et al. (A*-PO), arXiv 2505.20686.
    """
    gap = per_sequence(limits.minus(upcast(logp), upcast(ref_logp)), seq, seq_lens)[seq]
    return limits.square(beta * gap - upcast(advantage))


def a_star_value(rewards: Tensor, *, beta: float = 0.5) -> Tensor:
    """beta (log sum_i exp(r_i / beta) - log n), the optimal value of a prompt by n samples of the reference: [P, n] -> [P].

    Source: Brantley et al. (A*-PO), arXiv 2505.20686.
    """
    return beta * ((upcast(rewards) / beta).logsumexp(1) - math.log(rewards.shape[1]))


def value_clip(value: Tensor, old_value: Tensor, returns: Tensor, *, epsilon: float = 0.2) -> Tensor:
    """max((v - R)^2, (clip(v, v_old - epsilon, v_old + epsilon) - R)^2) / 2, the loss of PPO's critic: [N].

    Source: Schulman et al., arXiv 1707.06347, as the baselines of its authors clip it.
    """
    value, old, returns = upcast(value), upcast(old_value), upcast(returns)
    near = old + (value - old).clamp(-epsilon, epsilon)
    return torch.maximum((value - returns).square(), (near - returns).square()) / 2


class Adaptive(NamedTuple):
    """State of an adaptive entropy bonus, 0-d each: the coefficient, and the mean entropy (nats per token) of the last step."""

    coef: Tensor
    last: Tensor


def adaptive(coef: float) -> Adaptive:
    """The state before the first step, in which no bonus is applied."""
    return Adaptive(torch.tensor(float(coef), dtype=torch.float64), torch.tensor(math.inf, dtype=torch.float64))


def update(state: Adaptive, entropy: Tensor, *, target: float = 0.2, delta: float = 0.005, low: float = 0.0, high: float = 1.0) -> Adaptive:
    """After a step of this mean entropy: the coefficient rises by delta where entropy <= target, else falls, within [low, high].

    An entropy of nan, of a step without a token, leaves the state.

    Source: He et al. (Skywork-OR1), arXiv 2505.22312.
    """
    last = entropy.detach().to(state.coef)
    moved = torch.where(last <= target, state.coef + delta, state.coef - delta).clamp(low, high)
    return Adaptive(torch.where(last.isnan(), state.coef, moved), torch.where(last.isnan(), state.last, last))


def applied(state: Adaptive, *, target: float = 0.2) -> Tensor:
    """The coefficient of the next step: 0 unless the last step's entropy was at most `target`."""
    return torch.where(state.last <= target, state.coef, 0.0)


def _bounded(ratio: Tensor, advantage: Tensor) -> Tensor:
    """The ratio, 1 without a gradient where it is inf and the advantage 0."""
    return torch.where((advantage == 0) & (ratio == torch.inf), 1.0, ratio)


def _by_sign(positive: Tensor, one: float, other: float, like: Tensor) -> Tensor:
    """one where positive, else other, in the dtype of like: plain numbers in a `where` would be float32."""
    return torch.where(positive, torch.full_like(like, one), torch.full_like(like, other))
