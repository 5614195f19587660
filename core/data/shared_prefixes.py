"""Sequences to score -> documents in which what they begin with in common is computed once.

m tokens of a sequence, k of its targets, n tokens of a document.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np


class Scored(NamedTuple):
    """What a model reads, and the tokens that are scored: target j follows token m - k + j.

    The last target is read by nothing, so it is not among the tokens.
    """

    tokens: np.ndarray  # int32 [m]
    targets: np.ndarray  # int32 [k], 1 <= k <= m

    @property
    def context(self) -> np.ndarray:
        """The tokens up to the one that the first target follows."""
        return self.tokens[: len(self.tokens) - len(self.targets) + 1]


class SharedDoc(NamedTuple):
    """A document: its trunk (branch 0), then branches 1, 2, ..., each leaving the trunk after `start` tokens of it.

    row: the number of the first sequence in it. sequences: the numbers of all. reads: for each, the tokens of the document that predict its
    targets.
    """

    tokens: np.ndarray  # int32 [n]
    branch: np.ndarray  # int32 [n]
    start: np.ndarray  # int32 [n]
    row: int
    sequences: list[int]
    reads: list[np.ndarray]  # int64 [k] each
    targets: list[np.ndarray]  # int32 [k] each


def share(sequences: Sequence[Scored], budget: int, *, longest: int | None = None) -> list[SharedDoc]:
    """Documents of at most `budget` tokens that hold each sequence once.

    Sequences of one context (the choices of a question) are branches of one trunk; those of further contexts join a document, leaving
    its trunk where they differ, if that takes fewer tokens than a document of their own (questions behind the same examples).
    longest: sequences of more tokens share nothing.
    """
    documents = [_document(one, sequences) for one in _groups(sequences, budget, longest)]
    assert sum(len(doc.sequences) for doc in documents) == len(sequences), "a sequence is lost"
    return documents


def _groups(sequences: Sequence[Scored], budget: int, longest: int | None) -> Iterator[list[int]]:
    """The numbers of the sequences of each document, that of the trunk first."""
    order = sorted(range(len(sequences)), key=lambda i: (sequences[i].context.tolist(), -len(sequences[i].tokens)))
    group, size = [], 0
    for _, equal in groupby(order, key=lambda i: sequences[i].context.tolist()):
        numbers = list(equal)
        joined, alone = (sum(_more(sequences, trunk, i) for i in numbers) for trunk in (group[0] if group else None, numbers[0]))
        alone += len(sequences[numbers[0]].tokens)
        apart = joined >= alone or size + joined > budget
        for i in numbers:
            more = _more(sequences, group[0] if group else None, i)
            if not group or (apart and i == numbers[0]) or size + more > budget or _long(sequences, longest, group[0], i):
                if group:
                    yield group
                group, size = [], len(sequences[i].tokens)
            else:
                size += more
            group.append(i)
    if group:
        yield group


def _long(sequences: Sequence[Scored], longest: int | None, *numbers: int) -> bool:
    return longest is not None and any(len(sequences[i].tokens) > longest for i in numbers)


def _more(sequences: Sequence[Scored], trunk: int | None, number: int) -> int:
    """Tokens that a sequence adds to the document of a trunk."""
    tokens = sequences[number].tokens
    return len(tokens) if trunk is None else len(tokens) - _common(sequences[trunk].tokens, tokens)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Length of what two texts begin with in common."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length


def _document(numbers: list[int], sequences: Sequence[Scored]) -> SharedDoc:
    trunk = sequences[numbers[0]].tokens
    tokens, sizes, starts, reads = [trunk], [len(trunk)], [0], []
    for i in numbers:
        own, wanted = sequences[i].tokens, len(sequences[i].targets)
        shared, first = _common(trunk, own), sum(sizes)
        if shared < len(own):
            tokens.append(own[shared:])
            sizes.append(len(own) - shared)
            starts.append(shared)
        rows = np.arange(len(own) - wanted, len(own))
        reads.append(np.where(rows < shared, rows, first + rows - shared))
    branch = np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)
    start = np.repeat(starts, sizes).astype(np.int32)
    return SharedDoc(
        np.concatenate(tokens).astype(np.int32), branch, start, numbers[0], numbers, reads, [sequences[i].targets for i in numbers]
    )
