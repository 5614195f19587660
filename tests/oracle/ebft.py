"""Energy-based fine-tuning as its definition writes it, in loops over Python floats; whitening by NumPy, with the D x D matrix.

A group is a list of rollouts, each a list of D numbers; y is the ground truth's list.
"""

import math

import numpy as np


def dot(a, b):
    return math.fsum(p * q for p, q in zip(a, b, strict=True))


def length(a):
    return math.sqrt(dot(a, a))


def unit(a):
    return [v / max(length(a), 1e-12) for v in a]


def per_layer(layers):
    """The layers of one token."""
    return [v for layer in layers for v in unit(layer)]


def joint(layers):
    return unit([v for layer in layers for v in layer])


def pool(rows, how, prompt=0):
    """One sequence: a list of rows, of which the first `prompt` are its prompt."""
    size = len(rows)
    if how == "last_token":
        return rows[-1]
    if how == "concat":
        return [v for k in (1, 2, 3) for v in rows[min(math.floor(k * size / 4), size - 1)]]
    kept = rows[prompt:] if how == "completion_mean" else rows
    return [math.fsum(column) / len(kept) for column in zip(*kept, strict=True)] if kept else [0.0] * len(rows[0])


def _inverse_root(gram):
    """The pseudo-inverse of the square root of a symmetric matrix; directions of length below 1e-5 of the longest are dropped."""
    values, vectors = np.linalg.eigh(gram)
    s = np.sqrt(np.clip(values, 0, None))
    inverse = np.array([1 / v if v > 1e-5 * s.max() else 0.0 for v in s])
    return vectors @ np.diag(inverse) @ vectors.T


def whiten_features(group, y):
    """Through X^T X, [D, D]."""
    x = np.array(group)
    w = _inverse_root(x.T @ x)
    return (x @ w).tolist(), (np.array(y) @ w).tolist()


def whiten_rows(group):
    """Through X X^T, [n, n]; the rollouts, and the factor on each copy of the ground truth before its sign is dropped."""
    x = np.array(group)
    m = _inverse_root(x @ x.T)
    return (m @ x).tolist(), m.sum(1).tolist()


def alignment(group, y):
    return [2 * dot(phi, y) / (max(length(phi), 1e-8) * max(length(y), 1e-8)) for phi in group]


def diversity(group, left_out=()):
    """One number a rollout, of the group without `left_out`; those are None."""
    kept = [j for j in range(len(group)) if j not in left_out]
    out = [None] * len(group)
    for j in kept:
        others = [dot(group[j], group[k]) for k in kept if k != j]
        out[j] = 2 * math.fsum(others) / len(others) if others else 0.0
    return out


def cfm(group, y):
    mean = [math.fsum(column) / len(group) for column in zip(*group, strict=True)]
    return math.fsum((m - v) ** 2 for m, v in zip(mean, y, strict=True))


def rewards(group, y, alignment_coef=1.0, diversity_coef=1.0):
    return [alignment_coef * a - diversity_coef * d for a, d in zip(alignment(group, y), diversity(group), strict=True)]


def rloo_paired(group, y, alignment_coef=1.0, diversity_coef=1.0):
    """Each rollout against the same group without it: the siblings' alignment, and the diversity that they have among themselves."""
    out, near = [], alignment(group, y)
    for j, d in enumerate(diversity(group)):
        others = [k for k in range(len(group)) if k != j]
        alone = diversity(group, left_out=(j,))
        base_near = math.fsum(near[k] for k in others) / len(others)
        base_alike = math.fsum(alone[k] for k in others) / len(others)
        out.append(alignment_coef * (near[j] - base_near) - diversity_coef * (d - base_alike))
    return out


def total(generated, document, rl_coef, ce_coef):
    """generated: (advantage, log-probs) of each rollout; document: log-probs of its scored tokens."""
    policy = [-gain * logp for gain, row in generated for logp in row]
    return rl_coef * math.fsum(policy) / len(policy) + ce_coef * -math.fsum(document) / len(document)
