"""Formulas of losses in 60 digits, and what they tend to as log-probs go to -inf or inf: the oracle of losses at their edges.

A formula is a function of `mpf` numbers. Infinite arguments are replaced by two large numbers in turn: what has settled is the limit,
what has grown is inf with its sign. Where several arguments are infinite they grow at rates of their own, so that none cancels another.
"""

import math

import mpmath
from mpmath import mpf

mpmath.mp.dps = 60
SIZES = (mpf(10) ** 4, mpf(10) ** 7)


def limit(formula, *xs):
    """The value of the formula at xs, or its limit there; one argument at most should be infinite for it to be the only one."""
    values = [formula(*(_at(x, size) for x in xs)) for size in SIZES]
    if abs(values[1]) > 1000 and abs(values[1]) > 2 * abs(values[0]):
        return math.copysign(math.inf, values[1])
    return float(values[1])


def _at(x, size):
    return size * (1 if x > 0 else -1) if math.isinf(x) else mpf(x)


def exp(x):
    return mpmath.exp(x)


def sig(x):
    if abs(x) > 1e9:
        return mpf(x > 0)  # the exponential of an exponential has too many digits
    return 1 / (1 + mpmath.exp(-x))


def lsig(x):
    return -mpmath.log1p(mpmath.exp(-x)) if x > 0 else x - mpmath.log1p(mpmath.exp(x))


def xlog(p, x):
    """p x, 0 where p is."""
    return mpf(0) if p == 0 else p * x


log, log1p, expm1 = mpmath.log, mpmath.log1p, mpmath.expm1
