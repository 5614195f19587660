"""Ratios of the policy to an older one, for every scored token: fn(logp, old_logp, seq, seq_lens, *, clamp) -> [N], float32 at least.

N scored tokens, B sequences; seq [N] names the sequence of each token, seq_lens [B] counts the tokens of each. Log-probs in nats,
rho_t = logp_t - old_logp_t, 0 where both are -inf. `clamp` bounds the exponent of each result to [-clamp, clamp] (no gradient beyond);
without it exponents above 88 give inf in float32, whose gradient is exactly 0 wherever a loss has clipped it.
"""

from torch import Tensor

from treetune.losses import limits
from treetune.losses.reduce import per_sequence, upcast


def token(logp: Tensor, old_logp: Tensor, seq: Tensor, seq_lens: Tensor, *, clamp: float | None = None) -> Tensor:
    """e^rho_t of each token. Source: Schulman et al. (PPO), arXiv 1707.06347, eq. 6."""
    return _exp(log_ratio(logp, old_logp), clamp)


def sequence(logp: Tensor, old_logp: Tensor, seq: Tensor, seq_lens: Tensor, *, clamp: float | None = None) -> Tensor:
    """exp(mean of rho over the sequence), the same for all its tokens. Source: Zheng et al. (GSPO), arXiv 2507.18071, eq. 7."""
    return _exp(_mean(log_ratio(logp, old_logp), seq, seq_lens), clamp)


def sequence_token(logp: Tensor, old_logp: Tensor, seq: Tensor, seq_lens: Tensor, *, clamp: float | None = None) -> Tensor:
    """The value of `sequence` with a gradient of each token's own: exp(l_t - sg(l_t) + sg(mean of rho)).

    Source: Zheng et al. (GSPO-token), arXiv 2507.18071.
    """
    logp = upcast(logp)
    constant = logp.detach()
    return _exp(limits.minus(logp, constant) + _mean(log_ratio(constant, old_logp), seq, seq_lens), clamp)


def sequence_sum(logp: Tensor, old_logp: Tensor, seq: Tensor, seq_lens: Tensor, *, clamp: float | None = None) -> Tensor:
    """exp(sum of rho over the sequence), the probability ratio of the whole completion: it leaves 1 the faster the longer it is.

    Source: Ahmadian et al. (RLOO), arXiv 2402.14740.
    """
    return _exp(_sums(log_ratio(logp, old_logp), seq, seq_lens)[seq], clamp)


def log_ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    """rho of each token: [N]."""
    return limits.minus(upcast(logp), upcast(old_logp))


def _mean(rho: Tensor, seq: Tensor, seq_lens: Tensor) -> Tensor:
    return (_sums(rho, seq, seq_lens) / seq_lens.clamp(min=1))[seq]


def _sums(rho: Tensor, seq: Tensor, seq_lens: Tensor) -> Tensor:
    # inf of one token and -inf of another would add up to nan; capped, a token that the policy rules out rules out its sequence.
    return per_sequence(limits.capped(rho), seq, seq_lens)


def _exp(x: Tensor, clamp: float | None) -> Tensor:
    return limits.exp(x if clamp is None else x.clamp(-clamp, clamp))
