"""The supervised losses token by token in Python floats: no tensors, no vectors, nothing shared with the package."""

import math


def softmax(z: list[float]) -> list[float]:
    top = max(z)
    e = [math.exp(v - top) for v in z]
    return [v / sum(e) for v in e]


def log_sum_exp(z: list[float]) -> float:
    top = max(z)
    return top + math.log(sum(math.exp(v - top) for v in z))


def log_prob(z: list[float], y: int) -> float:
    return z[y] - log_sum_exp(z)


def nll(z: list[float], y: int) -> float:
    return -log_prob(z, y)


def smoothed(z: list[float], y: int, eps: float) -> float:
    """Cross-entropy against the target mixed with the uniform distribution over the finite logits."""
    finite = [v for v in range(len(z)) if z[v] > -math.inf]
    uniform = sum(-log_prob(z, v) for v in finite) / len(finite)
    return (1 - eps) * nll(z, y) + eps * uniform


def z_loss(z: list[float], coef: float) -> float:
    return coef * log_sum_exp(z) ** 2


def dft(z: list[float], y: int) -> float:
    p = softmax(z)[y]
    return -p * math.log(p) if p > 0 else 0.0


def eaft(z: list[float], y: int, alpha: float = 1.0, k: int = 20) -> float:
    """-log p(y) times the entropy of the k largest logits among themselves, to the power alpha."""
    r = softmax(sorted(z, reverse=True)[:k])
    entropy = -sum(v * math.log(v + 1e-10) for v in r)
    return max(entropy, 0.0) ** alpha * nll(z, y)


def token_mean(rows: list[list[float]], weights: list[list[float]] | None = None) -> float:
    """Weighted mean over all tokens of all sequences; 0 without any."""
    top = bottom = 0.0
    for b, row in enumerate(rows):
        for t, x in enumerate(row):
            w = 1.0 if weights is None else weights[b][t]
            top += w * x if w else 0.0
            bottom += w
    return top / bottom if bottom else 0.0


def sequence_mean(rows: list[list[float]], count_empty: bool = False) -> float:
    """Mean over sequences of their token means."""
    means = [sum(row) / len(row) for row in rows if row]
    count = len(rows) if count_empty else len(means)
    return sum(means) / count if count else 0.0


def constant_mean(rows: list[list[float]], length: int) -> float:
    return sum(sum(row) for row in rows) / (len(rows) * length) if rows else 0.0
