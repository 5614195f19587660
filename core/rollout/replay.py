"""Groups that had signal, kept to stand in for groups that have none. Plain data: a tuple of `Stored`, replaced as a whole.

Groups are kept as they were sampled: tokens without padding, the sampler's log-probs, the version of its policy. What follows from
the current policy (`old_logp`, and with it every ratio) is not kept, so that whoever draws a group has to compute it anew.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from treetune.core.data import order
from treetune.core.rollout import stats
from treetune.core.rollout.group import Group, rewards_of

REPLAY = 13  # purpose of these draws, beside those of `core.data.order`
LEAST = 1e-8  # smallest weight of a draw


class Stored(NamedTuple):
    """A group in the buffer. Its number tells it apart and breaks ties."""

    score: float
    number: int
    index: int  # of its prompt
    group: Group


def score(group: Group) -> float:
    """How much a scored group can teach: sum_i |A_i| * sum_k std_k, ddof 1, nan left out; 0 for a flat group, exactly."""
    assert group.advantage is not None
    spread = np.array([stats.deviation(column) for column in rewards_of(group).T])
    return float(np.abs(group.advantage).sum() * np.nansum(spread))


def add(stored: Sequence[Stored], groups: Sequence[tuple[int, Group]], size: int) -> tuple[Stored, ...]:
    """The buffer after the groups with signal among `groups`, (index of the prompt, group), were offered to it.

    A full buffer of `size` gives up its lowest score (the older of two) for one that is strictly greater.
    """
    buffer = list(stored)
    for index, group in groups:
        new = Stored(score(group), group.number, index, group._replace(old_logp=None))
        if size < 1 or not new.score > 0:
            continue
        if len(buffer) < size:
            buffer.append(new)
            continue
        least = min(range(len(buffer)), key=lambda i: buffer[i][:2])
        if new.score > buffer[least].score:
            buffer[least] = new
    return tuple(buffer)


def best(stored: Sequence[Stored], size: int) -> tuple[Stored, ...]:
    """What a buffer of `size` keeps of these: those of the highest score, the newer of two, in their order."""
    indices = sorted(range(len(stored)), key=lambda i: stored[i][:2], reverse=True)[:size]
    return tuple(stored[i] for i in sorted(indices))


def draw(stored: Sequence[Stored], n: int, *key: int) -> list[Stored]:
    """Up to n different groups, each next one with probability proportional to max(score, 1e-8) among those left.

    key: integers that decide the draw. Nothing is removed from the buffer.
    """
    left, drawn_groups = list(stored), []
    for i in range(min(n, len(left))):
        reach = np.cumsum([max(entry.score, LEAST) for entry in left])
        at = int(np.searchsorted(reach, order.uniform(*key, i, REPLAY) * reach[-1], side="right"))
        drawn_groups.append(left.pop(min(at, len(left) - 1)))
    return drawn_groups
