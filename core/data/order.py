"""Shuffles that depend on their arguments alone: no global state, and the same with every version of every library."""

import numpy as np

SPLIT, DOCUMENTS, BATCHES, SHARDS, REPEATS, FILES = 1, 2, 3, 4, 5, 6  # what a shuffle is for: two purposes never share one
GAMMA = np.uint64(0x9E3779B97F4A7C15)


def permutation(n: int, *key: int) -> list[int]:
    """A permutation of range(n), decided by the integers of `key`: indices sorted by a 64-bit hash of (key, index).

    Source: the hash is splitmix64's (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014).
    """
    return np.argsort(_hashes(n, key), kind="stable").tolist()


def uniform(*key: int) -> float:
    """A number in [0, 1), decided by the integers of `key`, with 53 random bits."""
    return int(_hashes(1, key)[0] >> np.uint64(11)) * 2.0**-53


def _hashes(n: int, key: tuple[int, ...]) -> np.ndarray:
    with np.errstate(over="ignore"):
        state = np.zeros(1, np.uint64)
        for part in key:
            state = _mix(state + np.uint64(part & (2**64 - 1)) + GAMMA)
        return _mix(state + np.arange(1, n + 1, dtype=np.uint64) * GAMMA)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
