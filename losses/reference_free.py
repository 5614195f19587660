"""Losses of preference pairs without a reference, in nats: fn(pairs, *, beta, ...) -> [P], float32 at least.

P pairs; `pairs` is a `preference.Pairs`, of which the references are not read. S is the sum of the log-probs of a sequence
and A = S / max(n, 1) its mean over the n scored tokens; _c is chosen, _r rejected; lsig is the log of the logistic function.
The NLL of the chosen side (of CPO, ORPO) or of a third completion (TPO) is a term of its own, with its own denominator.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from treetune.losses import limits
from treetune.losses.preference import Pairs
from treetune.losses.reduce import upcast


def cpo(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - eps) lsig(beta d) - eps lsig(-beta d), d = S_c - S_r, eps in [0, 0.5). Source: Xu et al., arXiv 2401.08417, eq. 3."""
    if isinstance(label_smoothing, int | float) and not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing!r}: expected a number from 0 and below 0.5")
    h = beta * limits.minus(upcast(pairs.chosen), upcast(pairs.rejected))
    return -(1 - label_smoothing) * F.logsigmoid(h) - limits.times(label_smoothing, F.logsigmoid(-h))


def cpo_hinge(pairs: Pairs, *, beta: float) -> Tensor:
    """max(0, 1 - beta (S_c - S_r)). Source: Zhao et al. (SLiC), arXiv 2305.10425."""
    return F.relu(1 - beta * limits.minus(upcast(pairs.chosen), upcast(pairs.rejected)))


def cpo_ipo(pairs: Pairs, *, beta: float) -> Tensor:
    """(A_c - A_r - 1 / (2 beta))^2. Source: Azar et al., arXiv 2310.12036, eq. 17, without its reference."""
    chosen, rejected = _means(pairs)
    return limits.square(limits.minus(chosen, rejected) - 1 / (2 * beta))


def simpo(pairs: Pairs, *, beta: float, gamma: float) -> Tensor:
    """-lsig(beta (A_c - A_r) - gamma); gamma is a margin in units of the reward beta A. Source: Meng et al., arXiv 2405.14734, eq. 6."""
    chosen, rejected = _means(pairs)
    return -F.logsigmoid(beta * limits.minus(chosen, rejected) - gamma)


def alphapo(pairs: Pairs, *, beta: float, gamma: float, alpha: float) -> Tensor:
    """`simpo` with (1 - e^(-alpha A)) / alpha in place of A (which it is at alpha = 0).

    The exponent is clamped at 80, beyond which a sequence has no gradient. Source: Gupta et al., arXiv 2501.03884.
    """
    if alpha == 0:
        return simpo(pairs, beta=beta, gamma=gamma)
    chosen, rejected = (-torch.expm1((-alpha * mean).clamp(max=80)) / alpha for mean in _means(pairs))
    return -F.logsigmoid(beta * limits.minus(chosen, rejected) - gamma)


def odds_ratio(pairs: Pairs) -> Tensor:
    """log odds(chosen) - log odds(rejected), log odds = A - log(1 - e^A): [P]. Means are taken just below 0, where odds are finite."""
    # A mean log-prob of 0 is a probability of 1, whose odds are infinite.
    chosen, rejected = (mean.clamp(max=-1e-12 if mean.dtype == torch.float64 else -1e-7) for mean in _means(pairs))
    return limits.minus(chosen, rejected) - (_log1mexp(chosen) - _log1mexp(rejected))


def orpo(pairs: Pairs, *, beta: float) -> Tensor:
    """-beta lsig(odds_ratio): the preference term of ORPO (beta is the paper's lambda). Source: Hong et al., arXiv 2403.07691, eq. 7."""
    return -beta * F.logsigmoid(odds_ratio(pairs))


def odds_metrics(pairs: Pairs) -> dict[str, Tensor]:
    """The log odds ratio of each pair, and the log of its logistic function."""
    odds = odds_ratio(pairs)
    return {"log_odds_chosen": odds, "log_odds_ratio": F.logsigmoid(odds)}


def tpo(pairs: Pairs, *, beta: float, gamma: float) -> Tensor:
    """The preference term of TPO-L, which is `simpo`'s; the other forms of TPO are cpo's. Source: Saeidi et al., arXiv 2405.16681."""
    return simpo(pairs, beta=beta, gamma=gamma)


def _means(pairs: Pairs) -> tuple[Tensor, Tensor]:
    return upcast(pairs.chosen) / pairs.len_chosen.clamp(min=1), upcast(pairs.rejected) / pairs.len_rejected.clamp(min=1)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x below 0, by the form that loses no digits on its side of -ln 2."""
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
