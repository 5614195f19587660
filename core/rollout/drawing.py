"""Which prompts are sampled next: pure functions of a `Stream`, where a rank stands in the order of the prompts.

All epochs form one sequence, each a shuffle of all prompts; rank r of W takes its positions r, r + W, r + 2 W, ... A position is taken
once, and a prompt that cannot be used where it stands is drawn first next time, so every epoch trains on every prompt.
"""

import functools
from collections.abc import Collection
from typing import NamedTuple

from treetune.core.data import order

PROMPTS = 11  # purpose of these shuffles, beside those of `core.data.order`


class Draw(NamedTuple):
    """A prompt to sample: its index, and the number that names the randomness of this draw."""

    index: int
    number: int


class Deck(NamedTuple):
    """What the order of the prompts depends on."""

    prompts: int
    seed: int = 0
    shuffle: bool = True
    rank: int = 0
    world: int = 1


class Stream(NamedTuple):
    """How far a rank has come."""

    drawn: int = 0  # prompts that this rank has drawn, those drawn anew included
    taken: int = 0  # positions of the sequence that this rank has taken
    deferred: tuple[int, ...] = ()  # prompts taken from the sequence and not drawn yet
    failed: tuple[int, ...] = ()  # prompts of which every completion failed, in the order in which they did


def draw(stream: Stream, deck: Deck, n: int, *, again: int = 0, avoid: Collection[int] = ()) -> tuple[tuple[Draw, ...], Stream]:
    """n prompts, and the stream after them. The last min(again, queue) are failed prompts drawn anew, the others come from the sequence.

    No prompt comes twice unless there are fewer than n, nor one of `avoid` as long as there are others. Numbers are unique over ranks
    and over the run: the draws of this rank so far, times the number of ranks, plus the rank.
    """
    repeated = [index for index in stream.failed if index not in avoid][: min(again, n)]
    mine, waiting, kept, taken = set(repeated), list(stream.deferred), [], stream.taken
    found: list[int] = []
    while len(found) < n - len(repeated):
        if waiting:
            index = waiting.pop(0)
        else:
            index, taken = _at(deck, taken * deck.world + deck.rank), taken + 1
        if _blocked(index, mine, deck.prompts) or _blocked(index, mine | set(avoid), deck.prompts):
            kept.append(index)
            continue
        mine.add(index)
        found.append(index)
    draws = tuple(Draw(index, (stream.drawn + i) * deck.world + deck.rank) for i, index in enumerate(found + repeated))
    failed = tuple(index for index in stream.failed if index not in repeated)
    return draws, Stream(stream.drawn + n, taken, (*kept, *waiting), failed)


def failed(stream: Stream, indices: Collection[int]) -> Stream:
    """The stream with these prompts at the end of the queue, where they are not in it yet."""
    return stream._replace(failed=tuple(dict.fromkeys((*stream.failed, *indices))))


def progress(stream: Stream, deck: Deck) -> float:
    """Epochs taken so far, as a fraction: all ranks count as having come as far as this one."""
    return stream.taken * deck.world / deck.prompts


def _blocked(index: int, used: set[int], total: int) -> bool:
    return index in used and len(used) < total


def _at(deck: Deck, position: int) -> int:
    epoch, place = divmod(position, deck.prompts)
    return _epoch(deck.prompts, deck.seed, epoch)[place] if deck.shuffle else place


@functools.lru_cache(maxsize=2)  # the epoch that ends and the one that begins
def _epoch(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(order.shuffled(n, seed, epoch, PROMPTS))
