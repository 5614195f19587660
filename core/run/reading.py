"""How a run reads its training documents: which form the micro-batches of a step, from which cursor on, for how many steps."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

from treetune.core.data import fingerprint, ledger, loader, streaming
from treetune.core.run import pauses
from treetune.core.run.ranks import ALONE, Ranks
from treetune.core.run.source import Cursor, Deal, Documents

Collate = Callable[[list[Any], Cursor], Any]
Guard = Callable[[], AbstractContextManager[None]]


class Order(NamedTuple):
    """How documents form steps.

    batching: {"budget": tokens} or {"rows": documents} of a micro-batch. accumulation: micro-batches of a step on one rank.
    """

    batching: dict[str, int]
    shuffle: bool
    seed: int
    accumulation: int = 1
    epochs: int = 1
    max_steps: int | None = None
    ranks: Ranks = ALONE

    @property
    def plan(self) -> dict[str, Any]:
        """The options of `loader` and `streaming` that do not depend on ranks."""
        return self.batching | {"shuffle": self.shuffle, "seed": self.seed}

    @property
    def shares(self) -> dict[str, int]:
        """How a step is divided between ranks."""
        return {"accum": self.accumulation, "world": self.ranks.row_ranks, "rank": self.ranks.row_rank}

    @property
    def step_size(self) -> int:
        """Micro-batches of a step on all ranks: any number of ranks may continue a run that takes as many."""
        return self.accumulation * self.ranks.row_ranks


class Reading(NamedTuple):
    """The training documents of a run in their order.

    order: fingerprint of how documents form steps. digest: the one of earlier versions, over the lengths of documents as well. Of a
    stream, mark(cursor) says what it has read, and resume(cursor, mark) checks that this is still there. passes: as of `source.Source`.
    """

    deal: Deal
    start: Cursor
    total_steps: int
    digest: str
    order: str
    mark: Callable[[Any], Any] | None = None
    resume: Callable[[Any, Any], None] | None = None
    passes: pauses.Passes | None = None

    def source(self, collate: Collate) -> Documents:
        """The documents as the source of a run; collate(documents, cursor) -> micro-batch."""
        known = {"start": self.start, "mark": self.mark, "resume": self.resume, "passes": self.passes}
        return Documents(self.deal, collate, total_steps=self.total_steps, **known)


def in_memory(documents: Sequence[Any], order: Order, *, weights: Sequence[float] | None = None) -> Reading:
    """The reading of documents in memory; weights: how often each is read in an epoch, None for once."""
    plan = order.plan | {"weights": weights}
    lengths = [len(document.tokens) for document in documents]
    steps = partial(loader.steps_per_epoch, lengths, accum=order.accumulation, world=order.ranks.row_ranks, **plan)
    steps_of = functools.cache(lambda epoch: steps(epoch=epoch))
    total = sum(map(steps_of, range(order.epochs))) if order.max_steps is None else order.max_steps
    epochs = order.epochs if order.max_steps is None else None
    deal = partial(_deal_from_memory, documents, epochs=epochs, **order.shares, **plan)
    digest = loader.plan_fingerprint(lengths, step=order.step_size, **plan)
    order_digest = fingerprint.values("memory", order.step_size, plan | {"weights": None})
    return Reading(deal, loader.START, total, digest, order_digest, passes=pauses.passes(steps_of))


def _deal_from_memory(
    documents: Sequence[Any], cursor: loader.PlanCursor, **options: Any
) -> Iterator[tuple[list[list[Any]], loader.PlanCursor]]:
    lengths = [len(document.tokens) for document in documents]
    for groups, after in loader.epoch_steps(lengths, cursor=cursor, **options):
        yield [[documents[i] for i in group] for group in groups], after


class Window(NamedTuple):
    """What of a stream is in memory: rows at a time, and the column of the text that becomes documents of sequence_len tokens.

    text_column: None for rows of several columns.
    """

    buffer: int
    sequence_len: int
    text_column: str | None


def streamed(
    parts: list[streaming.Shard],
    encode: Callable[[Any], list[Any]],
    order: Order,
    window: Window,
    *,
    guard: Guard = contextlib.nullcontext,
) -> Reading:
    """The reading of a stream of rows, which `encode` turns into documents. Needs max_steps: nobody knows its length.

    guard() is entered while rows are read, at any step of the run.
    """
    plan = order.plan | {"buffer": window.buffer}
    choices = {"step": order.step_size, "sequence_len": window.sequence_len, "text_column": window.text_column}
    rows = ledger.Ledger(parts, window.text_column)
    steps = partial(_deal_from_stream, guard, parts, encode, note=rows.note, **order.shares, **plan)
    resume = partial(rows.go_on, **{name: plan[name] for name in ("buffer", "shuffle", "seed")})
    digest = streaming.stream_fingerprint(parts, **choices, **plan)
    order_digest = fingerprint.values("stream", choices, plan)
    if order.max_steps is None:
        raise ValueError("streaming needs max_steps: how many rows a stream has is not known before its end")
    return Reading(steps, streaming.START, order.max_steps, digest, order_digest, rows.mark, resume)


def _deal_from_stream(
    guard: Guard, parts: list, encode: Callable, cursor: streaming.StreamCursor, **options: Any
) -> Iterator[tuple[list[list[Any]], streaming.StreamCursor]]:
    with guard():
        # A thread reads ahead, so that a step does not wait for a disk or the hub.
        yield from streaming.prefetch(streaming.stream_steps(parts, encode, cursor=cursor, **options))
