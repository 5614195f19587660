"""When a run pauses to evaluate or to save: every so many steps, so many times an epoch, or at the ends of epochs."""

import bisect
import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

MOST = 10  # evaluations and checkpoints of a run at the ends of epochs, where no setting says how often
Passes = Callable[[int], Fraction]  # step -> passes over the data after it


class Every(NamedTuple):
    """How often something happens. steps: every so many; per_epoch: so many times in each epoch, 0 for never; neither: at epochs' ends."""

    steps: int | None = None
    per_epoch: int | None = None

    def due(self, step: int, passes: Passes | None, *, epoch_ended: bool) -> bool:
        """Whether it happens after this step. per_epoch needs `passes`: it happens in the step that reaches a part 1/n of an epoch."""
        if self.per_epoch == 0:
            return False
        if self.per_epoch is not None:
            assert passes is not None
            return self.count(passes(step)) > self.count(passes(step - 1))
        return epoch_ended if self.steps is None else step % self.steps == 0

    def count(self, passed: Fraction) -> int:
        """Parts 1/n of epochs in so many passes over the data."""
        return math.floor(passed * (self.per_epoch or 0))


def at_end(index: int, last: int, total: int) -> bool:
    """Whether an epoch that ends at step `index` is one to evaluate and save after; `last`: the step of the pause before."""
    return index - last >= total / MOST


def passes(steps_of: Callable[[int], int]) -> Passes:
    """Passes over the data after each step, as exact fractions, where epoch e has steps_of(e) steps, which may differ.

    A function of the step alone, so that a resumed run pauses where the whole run would have. Epochs are looked at when they are reached.
    """
    ends = [0]

    def after(step: int) -> Fraction:
        while ends[-1] < step:
            ends.append(ends[-1] + steps_of(len(ends) - 1))
        epoch = bisect.bisect_left(ends, step)
        if ends[epoch] == step:
            return Fraction(epoch)
        return epoch - 1 + Fraction(step - ends[epoch - 1], ends[epoch] - ends[epoch - 1])

    return after
