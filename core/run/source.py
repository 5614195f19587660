"""Sources of micro-batches: one protocol for documents in memory, streams of rows, and rollouts of the policy.

A source hands out the micro-batches of one optimiser step after another. Where it stands is JSON, which a checkpoint carries, so that a
resumed run reads what comes next and nothing twice.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from treetune.core.data import loader, streaming
from treetune.core.run.pauses import Passes
from treetune.core.state import TrainState

Cursor = loader.PlanCursor | streaming.StreamCursor
MicroBatches = list[Any]  # (Batch, Plan) each, or what a method's `prepare` turns into that
# From a cursor: the documents of each micro-batch of a step, and the cursor after them, step by step.
Deal = Callable[[Cursor], Iterator[tuple[list[list[Any]], Cursor]]]


class Source(Protocol):
    """Micro-batches of a run, step by step.

    total_steps: optimiser steps of the whole run. epoch: passes over the data before the next step.
    A source that knows how long an epoch is may have `passes(step)`, passes over the data after a step as an exact `Fraction`, which
    evals_per_epoch and saves_per_epoch need.
    """

    total_steps: int

    @property
    def epoch(self) -> float:
        """Passes over the data before the next step."""
        ...

    def next(self, state: TrainState, step: int) -> tuple[MicroBatches, dict[str, Any]]:
        """(micro-batches of optimiser step `step`, counted from 1; metrics of how they were made). StopIteration ends the run."""
        ...

    def state(self) -> dict[str, Any]:
        """Where the source stands, as JSON: `cursor`, a list of whole numbers, and what else it needs under names of its own."""
        ...

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from a dict with the entries that `state` gave. Errors: ValueError for the state of another source."""
        ...

    def close(self) -> None:
        """End threads and connections."""
        ...


class Supply(NamedTuple):
    """Where a run gets its micro-batches and how it is evaluated.

    documents: fingerprints of what is read; digest: the one of earlier versions. after_step: what the sampler does after each step.
    start(state): what happens before the first step. described: rows for the table at the start of a run. functions, reward_models: names
    of files and fingerprints of weights that decide what is sampled and rewarded.
    """

    source: Source
    evaluate: Callable[[TrainState], dict[str, Tensor]] | None
    documents: dict[str, str] = {}
    digest: str = ""
    after_step: Callable[[TrainState, dict, int], TrainState] | None = None
    start: Callable[[TrainState], None] = lambda state: None
    described: Mapping[str, str] = {}
    functions: Sequence[str | None] = ()
    reward_models: Mapping[str, str] = {}


class Documents:
    """A source of documents, in memory or streamed; has a lifetime: the iterator over what is read ahead.

    collate(documents, cursor) -> micro-batch, whose dropout and noise the cursor before the step seeds.
    mark(cursor) -> which rows of a stream are read there, as JSON; resume(cursor, mark) checks that they still are.
    passes: as of `Source`; None for a stream.
    """

    def __init__(
        self,
        deal: Deal,
        collate: Callable[[list[Any], Cursor], Any],
        *,
        total_steps: int,
        start: Cursor = loader.START,
        mark: Callable[[Cursor], dict] | None = None,
        resume: Callable[[Cursor, Any], None] | None = None,
        passes: Passes | None = None,
    ):
        self.total_steps, self.cursor, self.passes = total_steps, start, passes
        self._deal, self._collate, self._mark, self._resume = deal, collate, mark, resume
        self._steps: Iterator[tuple[list[list[Any]], Cursor]] | None = None

    @property
    def epoch(self) -> int:
        """Passes over the documents before the next step."""
        return self.cursor.epoch

    def next(self, state: TrainState, step: int) -> tuple[MicroBatches, dict[str, Any]]:
        """Micro-batches of the next documents; no metrics."""
        if self._steps is None:
            self._steps = self._deal(self.cursor)
        groups, after = next(self._steps)
        cursor, self.cursor = self.cursor, after
        return [self._collate(documents, cursor) for documents in groups], {}

    def state(self) -> dict[str, Any]:
        """The cursor, and for a stream which rows are read there."""
        return {"cursor": list(self.cursor)} | ({"rows": self._mark(self.cursor)} if self._mark else {})

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from a cursor. Errors: ValueError where the rows before it are not those that were read."""
        self.cursor, self._steps = type(self.cursor)(*saved["cursor"]), None
        if self._resume is not None:
            self._resume(self.cursor, saved.get("rows"))

    def close(self) -> None:
        """Let go of what is read ahead."""
        self._steps = None


def select(documents: Sequence[Any], groups: Iterator[tuple[list[list[int]], Cursor]]) -> Iterator[tuple[list[list[Any]], Cursor]]:
    """Steps of documents from steps of their indices."""
    for indices, after in groups:
        yield [[documents[i] for i in group] for group in indices], after


class Fixed:
    """A source of micro-batches that are there already, for tests and small experiments: one list for each step, in turn."""

    def __init__(self, steps: Sequence[MicroBatches], *, total_steps: int | None = None):
        if not steps:
            raise ValueError("a source of fixed steps needs at least one")
        self.steps, self.index = list(steps), 0
        self.total_steps = len(self.steps) if total_steps is None else total_steps

    @property
    def epoch(self) -> int:
        """Passes over the list before the next step."""
        return self.index // len(self.steps)

    def passes(self, step: int) -> Fraction:
        """Passes over the list after a step."""
        return Fraction(step, len(self.steps))

    def next(self, state: TrainState, step: int) -> tuple[MicroBatches, dict[str, Any]]:
        """The micro-batches of the next step."""
        self.index += 1
        return self.steps[(self.index - 1) % len(self.steps)], {}

    def state(self) -> dict[str, Any]:
        """How many steps were taken."""
        return {"cursor": [self.epoch, self.index]}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on after so many steps."""
        self.index = saved["cursor"][-1]

    def close(self) -> None:
        """Nothing to end."""
