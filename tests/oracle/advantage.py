"""Advantages and corrections as the papers write them, in loops over Python floats: nothing shared with the package.

rewards is a list of groups, each a list of numbers, or of lists with a number of each function; nan means no opinion.
"""

import math
from fractions import Fraction


def exact_mean(values):
    """The mean without rounding, of the known values."""
    known = [Fraction(v) for v in values if not math.isnan(v)]
    return sum(known, Fraction(0)) / len(known) if known else None


def deviation(values, ddof=1):
    """The standard deviation of the known values, its squares added without rounding; 0 of fewer than ddof + 1."""
    known = [Fraction(v) for v in values if not math.isnan(v)]
    if len(known) <= ddof:
        return 0.0
    middle = sum(known, Fraction(0)) / len(known)
    return math.sqrt(sum((v - middle) ** 2 for v in known) / (len(known) - ddof))


def _still(group):
    """Nothing to compare: fewer than two known, or all the same."""
    return len({v for v in group if not math.isnan(v)}) < 2


def _compare(rewards, centre, scale):
    out = []
    for group in rewards:
        row = []
        for r in group:
            row.append(0.0 if math.isnan(r) or _still(group) else float(Fraction(r) - centre(group)) / scale(group))
        out.append(row)
    return out


def _all(rewards):
    return [r for group in rewards for r in group]


def centered(rewards):
    return _compare(rewards, exact_mean, lambda group: 1.0)


def group_scaled(rewards, eps=1e-4, ddof=1):
    return _compare(rewards, exact_mean, lambda group: deviation(group, ddof) + eps)


def batch_scaled(rewards, eps=1e-4, ddof=1):
    whole = deviation(_all(rewards), ddof) + eps
    return _compare(rewards, exact_mean, lambda group: whole)


def batch_centered(rewards, eps=1e-4, ddof=1):
    flat = _compare([_all(rewards)], exact_mean, lambda group: deviation(group, ddof) + eps)[0]
    size = len(rewards[0])
    return [flat[i : i + size] for i in range(0, len(flat), size)]


def rloo(rewards):
    """Each against the mean of the others, one by one."""
    out = []
    for group in rewards:
        row = []
        for i, r in enumerate(group):
            others = exact_mean(group[:i] + group[i + 1 :])
            row.append(0.0 if math.isnan(r) or others is None else float(Fraction(r) - others))
        out.append(row)
    return out


def rloo_normalized(rewards, eps=1e-4):
    raw = rloo(rewards)
    scored = [[math.nan if math.isnan(r) else a for r, a in zip(group, row, strict=True)] for group, row in zip(rewards, raw, strict=True)]
    middle, scale = exact_mean(_all(scored)), deviation(_all(scored)) + eps
    return [
        [0.0 if math.isnan(r) or _still(group) else (a - float(middle)) / scale for r, a in zip(group, row, strict=True)]
        for group, row in zip(rewards, raw, strict=True)
    ]


def reinforce(rewards):
    return [[0.0 if math.isnan(r) else r for r in group] for group in rewards]


def combined(rewards, weights):
    out = []
    for group in rewards:
        row = []
        for given in group:
            known = [w * r for w, r in zip(weights, given, strict=True) if not math.isnan(r)]
            row.append(sum(known) if known else math.nan)
        out.append(row)
    return out


def gdpo(rewards, weights, eps=1e-4, ddof=1):
    """Each function within its group, then their sum over the batch."""
    totals = []
    for group in rewards:
        row = [math.nan if all(math.isnan(r) for r in given) else 0.0 for given in group]
        for k, weight in enumerate(weights):
            column = _compare([[given[k] for given in group]], exact_mean, lambda one: deviation(one, ddof) + eps)[0]
            row = [total + weight * q for total, q in zip(row, column, strict=True)]
        totals.append(row)
    middle, whole = exact_mean(_all(totals)), deviation(_all(totals), ddof) + eps
    return _compare(totals, lambda group: middle, lambda group: whole)


def gae(rewards, values, gamma, lam):
    """The sum over what comes after, term by term."""
    ends = list(values) + [0.0]
    out = []
    for t in range(len(rewards)):
        terms = [(gamma * lam) ** (u - t) * (rewards[u] + gamma * ends[u + 1] - values[u]) for u in range(t, len(rewards))]
        out.append(math.fsum(terms))
    return out, [a + v for a, v in zip(out, values, strict=True)]


def _gaps(old, sampler):
    return [0.0 if math.isnan(s) else o - s for o, s in zip(old, sampler, strict=True)]


def importance(old, sampler, level, how, low, high, mean=False):
    """The multiplier of each token of one sequence (two lists of log-probs)."""
    gaps = _gaps(old, sampler)
    if level == "sequence":
        total = math.fsum(gaps) / (len(gaps) if mean else 1) if gaps else 0.0
        gaps = [total] * len(gaps)
    out = []
    for gap in gaps:
        rho = math.exp(gap)
        if how == "truncate":
            capped = rho if high is None else min(rho, high)
            out.append(capped if low is None else max(capped, low))
        else:
            out.append(rho if (low is None or rho >= low) and (high is None or rho <= high) else 0.0)
    return out


def off_policy_keep(logp, sampler, advantage, threshold):
    """Whether each token of one sequence stays; advantage of each token."""
    drift = -math.fsum(_gaps(logp, sampler)) / max(len(logp), 1)
    return [a >= 0 or drift <= threshold for a in advantage]


def upper_quantile(values, share):
    """The value that this share of the values reaches, between neighbours in proportion."""
    ordered = sorted(values)
    rank = (1 - Fraction(str(share))) * (len(ordered) - 1)
    below = int(rank)
    rest = float(rank - below)
    return ordered[below] if rest == 0 else ordered[below] * (1 - rest) + ordered[below + 1] * rest
