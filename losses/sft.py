"""Supervised losses per scored token, in nats: [N] in, [N] out, float32 at least.

logp = log p(target), lse = log-sum-exp of the logits, mean_logit = their mean over the vocabulary.
"""

import torch
from torch import Tensor

from treetune.losses import limits
from treetune.losses.reduce import upcast


def nll(logp: Tensor) -> Tensor:
    """Negative log-likelihood: -log p(y)."""
    return -upcast(logp)


def smoothed(logp: Tensor, lse: Tensor, mean_logit: Tensor, *, label_smoothing: float) -> Tensor:
    """(1 - eps) * -log p(y) + eps * mean_v(-log p(v)), where the mean over v is lse - mean_logit.

    Source: Szegedy et al., arXiv 1512.00567, section 7.
    """
    return limits.times(1 - label_smoothing, -upcast(logp)) + label_smoothing * (upcast(lse) - upcast(mean_logit))


def z_loss(lse: Tensor, *, coef: float) -> Tensor:
    """coef * lse^2, which keeps the normaliser near 1. Source: Chowdhery et al. (PaLM), arXiv 2204.02311, section 5."""
    return coef * upcast(lse).square()


def dft(logp: Tensor) -> Tensor:
    """-sg(p(y)) log p(y), 0 where p(y) is 0: tokens count by the probability they have. Source: Wu et al., arXiv 2508.05629, eq. 9."""
    logp = upcast(logp)
    return -limits.times(torch.exp(logp).detach(), logp)


def eaft(logp: Tensor, topk_entropy: Tensor, *, alpha: float = 1.0) -> Tensor:
    """-sg(H_k^alpha) log p(y), H_k the entropy (nats) of the renormalised top-20 logits: certain tokens count less, at H_k = 0 nothing."""
    # A certain token's entropy comes out just below 0, which a fractional power turns into nan.
    return -limits.times((upcast(topk_entropy).clamp(min=0) ** alpha).detach(), upcast(logp))
