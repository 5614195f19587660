"""Which prompts are sampled next: pure functions of a `PromptCursor`, where a run stands in the order of the prompts.

All epochs form one sequence, each a shuffle of all prompts. A position is taken once, and a prompt that cannot be used where it stands
is drawn first next time, so every epoch trains on every prompt. Ranks draw the same prompts for all of them.
"""

import functools
from collections.abc import Collection
from typing import NamedTuple

from treetune.core.data.order import permutation

PROMPTS = 11  # purpose of these shuffles, beside those of `core.data.order`


class PromptDraw(NamedTuple):
    """A prompt to sample: its index, and the number that seeds this draw, unique in a run."""

    index: int
    number: int


class PromptOrder(NamedTuple):
    """What the order of prompts depends on: how many there are, and the seed."""

    prompts: int
    seed: int = 0
    shuffle: bool = True


class PromptCursor(NamedTuple):
    """How far a run has come in the order of prompts."""

    drawn: int = 0  # prompts that were drawn, those drawn anew included
    taken: int = 0  # positions of the sequence that were taken
    deferred: tuple[int, ...] = ()  # prompts taken from the sequence and not drawn yet
    failed: tuple[int, ...] = ()  # prompts of which every completion failed, in the order in which they did


def draw(
    cursor: PromptCursor, order: PromptOrder, n: int, *, again: int = 0, avoid: Collection[int] = ()
) -> tuple[tuple[PromptDraw, ...], PromptCursor]:
    """n prompts, and the cursor after them. The last min(again, queue) are failed prompts drawn anew, the others come from the sequence.

    No prompt comes twice unless there are fewer than n, nor one of `avoid` as long as there are others. Numbers count the draws of the run.
    """
    repeated = [index for index in cursor.failed if index not in avoid][: min(again, n)]
    drawn, waiting, deferred, taken = set(repeated), list(cursor.deferred), [], cursor.taken
    indices: list[int] = []
    while len(indices) < n - len(repeated):
        if waiting:
            index = waiting.pop(0)
        else:
            index, taken = at(order, taken), taken + 1
        if _blocked(index, drawn, order.prompts) or _blocked(index, drawn | set(avoid), order.prompts):
            deferred.append(index)  # not skipped: every epoch trains on every prompt
            continue
        drawn.add(index)
        indices.append(index)
    draws = tuple(PromptDraw(index, cursor.drawn + i) for i, index in enumerate(indices + repeated))
    failed = tuple(index for index in cursor.failed if index not in repeated)
    return draws, PromptCursor(cursor.drawn + n, taken, (*deferred, *waiting), failed)


def with_failed(cursor: PromptCursor, indices: Collection[int]) -> PromptCursor:
    """The cursor with these prompts at the end of the queue, where they are not in it yet."""
    return cursor._replace(failed=tuple(dict.fromkeys((*cursor.failed, *indices))))


def progress(cursor: PromptCursor, order: PromptOrder) -> float:
    """Epochs taken so far, as a fraction."""
    return cursor.taken / order.prompts


def at(order: PromptOrder, position: int) -> int:
    """The prompt at a position of the sequence."""
    epoch, place = divmod(position, order.prompts)
    return _epoch(order.prompts, order.seed, epoch)[place] if order.shuffle else place


def _blocked(index: int, drawn: set[int], total: int) -> bool:
    return index in drawn and len(drawn) < total


@functools.lru_cache(maxsize=2)  # the epoch that ends and the one that begins
def _epoch(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(permutation(n, seed, epoch, PROMPTS))
