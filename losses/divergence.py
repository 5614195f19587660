"""Estimates of KL(policy || reference) in nats from the sampled tokens: [N] in, [N] out, float32 at least.

N scored tokens. logp is the policy's log-prob of a token that the policy wrote, ref_logp the reference's, d = logp - ref_logp, 0 where
both are -inf.
`clamp` (nats, above 0, None for off) takes d as at least -clamp, which keeps e^-d finite where the policy all but rules a
token out; such a token then has no gradient.
"""

import torch
from torch import Tensor

from treetune.losses import limits
from treetune.losses.reduce import upcast


def k1(logp: Tensor, ref_logp: Tensor, *, clamp: float | None = None) -> Tensor:
    """d: unbiased, may be below 0. For rewards and reports; as a loss on the policy's own samples its expected gradient is 0.

    Source of k1, k2, k3: Schulman, Approximating KL divergence, 2020.
    """
    return _difference(logp, ref_logp, clamp)


def k2(logp: Tensor, ref_logp: Tensor, *, clamp: float | None = None) -> Tensor:
    """d^2 / 2: biased, never below 0; its gradient d grad logp is, on the policy's own samples, that of the divergence."""
    return limits.square(_difference(logp, ref_logp, clamp)) / 2


def k3(logp: Tensor, ref_logp: Tensor, *, clamp: float | None = None) -> Tensor:
    """e^-d - 1 + d: unbiased, never below 0; inf in float32 below d = -88 without `clamp` (20 is usual).

    Its own gradient, (1 - e^-d) grad logp, is not that of this divergence: see `corrected`.
    """
    return limits.excess(-_difference(logp, ref_logp, clamp))


def corrected(k: Tensor, ratio: Tensor) -> Tensor:
    """r k, r = pi / pi_old with its gradient, not clipped: of k3 on the policy's own samples this has the gradient d grad logp.

    Where r k overflows only the gradient of k is left: that of r has the other sign for k3, and inf - inf would be nan.
    Source: DeepSeek-V3.2, arXiv 2512.02556.
    """
    overflow = limits.times(ratio.detach(), k.detach()).isinf()
    return limits.times(torch.where(overflow, ratio.detach(), ratio), k)


def corrected_k3(logp: Tensor, ref_logp: Tensor, old_logp: Tensor, ratio: Tensor) -> Tensor:
    """`corrected` of `k3` with the ratio e^(logp - old_logp), also where k3 overflows: there it is e^(ref_logp - old_logp) + r (d - 1)."""
    # r k3 = r e^-d + r (d - 1), and r e^-d = e^(ref_logp - old_logp) does not hold the policy: joined, the exponents do not overflow.
    d, k = _difference(logp, ref_logp, None), k3(logp, ref_logp)
    overflow = (k == torch.inf) & (d < 0)
    near = corrected(torch.where(overflow, 0.0, k), torch.where(overflow, 0.0, ratio))
    finite = overflow & (ratio > 0) & ratio.isfinite() & d.isfinite()
    rest = torch.where(finite, ratio, 0.0) * torch.where(finite, d - 1, 0.0)
    return torch.where(overflow, limits.minus(upcast(ref_logp), upcast(old_logp)).exp().detach() + rest, near)


def _difference(logp: Tensor, ref_logp: Tensor, clamp: float | None) -> Tensor:
    if clamp is not None and not clamp > 0:
        raise ValueError(f"clamp={clamp!r}: expected a number of nats above 0, 20 for instance, or None for off")
    d = limits.minus(upcast(logp), upcast(ref_logp))
    return d if clamp is None else d.clamp(min=-clamp)
