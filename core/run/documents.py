"""Documents as the source of a run: in memory or streamed, dealt into the micro-batches of steps, with what is held out of them."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from treetune.core.data import dataset, sources, streaming
from treetune.core.data.dataset import Dataset
from treetune.core.run import evaluation, reading
from treetune.core.run.ranks import Ranks
from treetune.core.run.source import Cursor, Supply
from treetune.core.state import Objective
from treetune.core.step import Prepare


class Settings(NamedTuple):
    """How documents become the steps of a run; the fields have the names of their options.

    eval_batch_size: micro_batch_size of evaluations, the same if None. data_seed: of the order of rows, seed if None.
    streaming_multipack_buffer_size: rows of a stream that are in memory at a time. text_column: of the texts of a stream.
    """

    sequence_len: int
    micro_batch_size: int
    sample_packing: bool = True
    gradient_accumulation_steps: int = 1
    shuffle: bool = True
    seed: int = 0
    num_epochs: int = 1
    max_steps: int | None = None
    streaming_multipack_buffer_size: int = streaming.BUFFER
    text_column: str | None = None
    eval_batch_size: int | None = None
    data_seed: int | None = None

    @property
    def held_out(self) -> "Settings":
        """The settings of evaluations."""
        return self if self.eval_batch_size is None else self._replace(micro_batch_size=self.eval_batch_size)

    @property
    def order_seed(self) -> int:
        """The seed of the order of rows."""
        return self.seed if self.data_seed is None else self.data_seed


class Calls(NamedTuple):
    """What a run does with documents.

    collate(documents, cursor) -> micro-batch with noise that is drawn for the cursor; collate_held_out(documents) -> one without.
    evaluation, prepare: of the method. check(documents) raises ValueError for those that the model cannot read. guard() is entered
    while rows of a stream are read, at any step: below it a bad row is a ValueError.
    """

    collate: Callable[[list[Any], Cursor], Any]
    collate_held_out: Callable[[list[Any]], Any]
    evaluation: Objective
    prepare: Prepare | None
    check: Callable[[list[Any]], None]
    guard: reading.Guard = contextlib.nullcontext


def batching(data: Dataset, settings: Settings) -> dict[str, int]:
    """How documents form micro-batches; a document always fits in one."""
    longest = max(dataset.lengths(data.train + data.val), default=0) if data.stream is None else 0
    packing, size = settings.sample_packing, settings.micro_batch_size
    return dataset.batching(packing=packing, sequence_len=settings.sequence_len, micro_batch_size=size, longest=longest)


def supply(data: Dataset, settings: Settings, calls: Calls, *, ranks: Ranks, unit: str) -> Supply:
    """Micro-batches and evaluation of documents; unit: what the loss is a mean over."""
    groups = batching(data, settings)
    order = reading.Order(
        groups, settings.shuffle, settings.order_seed, settings.gradient_accumulation_steps, settings.num_epochs, settings.max_steps, ranks
    )
    if data.stream is None:
        documents = reading.in_memory(data.train, order, weights=data.weights)
    else:
        encode = partial(_encode_checked, data.stream.encode, calls.check)
        window = reading.Window(settings.streaming_multipack_buffer_size, settings.sequence_len, settings.text_column)
        documents = reading.streamed(data.stream.parts, encode, order, window, guard=calls.guard)
    held_out = batching(data, settings.held_out)
    evaluate = evaluation.of_documents(calls.evaluation, data.val, calls.collate_held_out, held_out, ranks=ranks, prepare=calls.prepare)
    prints = {"train": data.digests[0], "held out": data.digests[1], "order": documents.order}
    about = _describe(data, settings, ranks, unit)
    return Supply(documents.source(calls.collate), evaluate, prints, documents.digest, described=about)


def _encode_checked(encode: Callable[[sources.Rows], list[Any]], check: Callable[[list[Any]], None], rows: sources.Rows) -> list[Any]:
    documents = encode(rows)
    check(documents)
    return documents


def _describe(data: Dataset, settings: Settings, ranks: Ranks, unit: str) -> dict[str, str]:
    read = f"{len(data.train)} documents, {sum(dataset.lengths(data.train))} tokens"
    if data.stream is not None:
        read = f"a stream of {len(data.stream.parts)} files or shards"
    batch = f"{settings.micro_batch_size} rows"
    if settings.sample_packing:
        batch = f"up to {settings.micro_batch_size * settings.sequence_len} tokens"
    world = f"{ranks.row_ranks} rank{'s' * (ranks.row_ranks > 1)}"
    return {
        "data": f"{read}, {len(data.val)} documents held out",
        "step": f"{settings.gradient_accumulation_steps} micro-batches of {batch} on {world}; "
        f"loss and gradient are means over all {unit} of a step",
    }
