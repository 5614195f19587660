"""Policy losses written out token by token in float64: rows of 0-d tensors and plain numbers, nothing shared with the package.

A row is the list of one completion's scored tokens; ours are log-probs of the policy, old of the anchor, smp of the sampler (nan: unknown),
ref of the reference, A one number per row. Every sum is a Python loop.
"""

import math

import torch

EXP, LOG = torch.exp, math.log


def clip(x, low, high):
    return torch.clamp(x, low, high)


def mean(values):
    return sum(values) / max(len(values), 1)


def ratios(level, ours, old):
    """[b][t] ratios of one of the four levels."""
    out = []
    for row, anchor in zip(ours, old, strict=True):
        rho = [a - b for a, b in zip(row, anchor, strict=True)]
        if level == "token":
            out.append([EXP(x) for x in rho])
        elif level == "sequence":
            out.append([EXP(mean(rho))] * len(rho) if rho else [])
        elif level == "sequence_sum":
            out.append([EXP(sum(rho))] * len(rho) if rho else [])
        else:
            out.append([EXP(mean(rho).detach()) * a / a.detach() for a in [EXP(x) for x in row]])
    return out


def ppo_clip(r, ours, rho, A, isr, *, low=0.2, high=None, delta=None):
    high = low if high is None else high
    out = []
    for ratio in r:
        free = ratio if delta is None or ratio < delta else torch.tensor(delta, dtype=torch.float64)
        one, other = free * A, clip(ratio, 1 - low, 1 + high) * A
        out.append(-(one if one <= other else other))
    return out


def cispo(r, ours, rho, A, isr, *, cap):
    return [-min(ratio.item(), cap) * A * logp for ratio, logp in zip(r, ours, strict=True)]


def sapo(r, ours, rho, A, isr, *, pos=1.0, neg=1.05):
    tau = pos if A > 0 else neg
    return [-(4 / tau) / (1 + EXP(-tau * (ratio - 1))) * A for ratio in r]


def vespo_phi(rho, A, isr, k_pos=2.0, lam_pos=3.0, k_neg=3.0, lam_neg=2.0):
    floor = LOG(1e-8)
    log_w = sum(min(max(x.item(), -20), 20) for x in rho)
    for weight in isr:
        log_w += min(max(LOG(weight) if weight > 0 else floor, floor), 20)
    log_w = min(max(log_w, floor), 20)
    k, lam = (k_pos, lam_pos) if A >= 0 else (k_neg, lam_neg)
    return math.exp(lam + k * log_w - lam * math.exp(log_w))


def vespo(r, ours, rho, A, isr):
    return [-vespo_phi(rho, A, isr) * A * logp for logp in ours]


def gmpo(r, ours, rho, A, isr, *, low=0.4, high=None):
    high, picked = low if high is None else high, []
    for x in rho:
        cut = clip(x, -low, high)
        picked.append((x if x <= cut else cut) if A > 0 else (x if x >= cut else cut))
    return [-EXP(mean(picked)) * A] * len(rho) if rho else []


def reinforce(r, ours, rho, A, isr):
    return [-A * logp for logp in ours]


def aggregate(how, x, length=8):
    total = sum((sum(row) for row in x if row), torch.zeros((), dtype=torch.float64))
    if how == "token":
        return total / max(sum(len(row) for row in x), 1)
    if how == "sequence":
        return sum((sum(row) / len(row) for row in x if row), torch.zeros((), dtype=torch.float64)) / max(len(x), 1)
    return total / max(len(x) * (length if how == "constant" else 1), 1)


def kept(ours, smp, A, threshold):
    """Whether a completion stays: positive, or not yet far from what the sampler said."""
    gaps = [s.item() - a.item() for s, a in zip(smp, ours, strict=True)]
    return A >= 0 or sum(0.0 if math.isnan(gap) else gap for gap in gaps) / max(len(gaps), 1) <= threshold


def loss(
    term, ours, old, A, *, level="token", how="token", length=8, isr=None, folds=False, smp=None, threshold=None, keep=None,
    ref=None, kl_coef=0.0, corrected=True, entropy=None, entropy_coef=0.0, **knobs,
):  # fmt: skip
    """The whole objective of a set of completions."""
    r, x = ratios(level, ours, old), []
    for b, (row, anchor) in enumerate(zip(ours, old, strict=True)):
        rho, weights = [a - o for a, o in zip(row, anchor, strict=True)], isr[b] if isr else [1.0] * len(row)
        values = term(r[b], row, rho, A[b], weights if folds else [], **knobs)
        if threshold is not None and not kept(row, (smp or old)[b], A[b], threshold):
            values = [v * 0 for v in values]
        if keep is not None:
            values = [v if k else v * 0 for v, k in zip(values, keep[b], strict=True)]
        if not folds:
            values = [v * w for v, w in zip(values, weights, strict=True)]
        if kl_coef:
            d = [a - c for a, c in zip(row, ref[b], strict=True)]
            k3 = [EXP(-v) - 1 + v for v in d]
            values = [v + kl_coef * k * (q if corrected else 1) for v, k, q in zip(values, k3, r[b], strict=True)]
        x.append(values)
    total = aggregate(how, x, length)
    if entropy_coef:
        picked = [h for b, row in enumerate(entropy) for t, h in enumerate(row) if keep is None or keep[b][t]]
        total = total - entropy_coef * sum(picked) / max(len(picked), 1)
    return total
