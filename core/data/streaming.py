"""Endless rows -> micro-batches, without ever holding more than one block of rows.

Rows are read in order, `buffer` of them at a time; such a block is encoded, shuffled and packed like a small epoch of its own. All
that a block becomes is decided by (seed, epoch, block), so a `StreamCursor` of six integers is the whole state: resuming reads the block
again and goes on inside it. A source is a list of `Shard`s (files, or shards of a hub dataset), whose order is another each epoch.

Every rank reads every row and takes its own micro-batches of the same plan, so neither the number of ranks nor gradient
accumulation changes the stream.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

from treetune.core.data import file_rows, files, hub, loader, order, sources
from treetune.core.data.file_rows import ReadPosition

BUFFER = 10_000  # rows
PART_BITS = 36  # a row number is (index of the shard << PART_BITS) + its number in the shard
EPOCH_BLOCKS = 1_000_000_007
END = object()


class Shard(NamedTuple):
    """A file, or a shard of a hub dataset. `read(position)` gives the rows after a position.

    entry: index of the data set that it is of. weight: how often its rows are read in a pass. column: the one that is trained on, where
    it is not that of the whole stream.
    """

    name: str
    read: Callable[[ReadPosition], Iterator[file_rows.RowRecord]]
    start: ReadPosition = ReadPosition()
    entry: int = 0
    weight: float = 1.0
    column: str | None = None


class StreamCursor(NamedTuple):
    """Position of a stream: the block that starts after `row` lines or rows (`offset` bytes) of shard `part` in this epoch's order,
    and how many of its micro-batches all ranks together have taken."""

    epoch: int = 0
    part: int = 0
    row: int = 0
    offset: int = 0
    block: int = 0
    index: int = 0


START = StreamCursor()


def list_shards(
    path: str | None,
    *,
    split: str = "train",
    name: str | None = None,
    revision: str | None = None,
    data_files: str | Sequence[str] = (),
    ds_type: str | None = None,
    skip: int = 0,
) -> list[Shard]:
    """Shards of a source that `sources.read` would read whole; options are the same. skip: rows to leave out at its beginning.

    Errors: ValueError for a slice of a split, which needs the number of rows, and as `sources.read`.
    """
    if "[" in split or "+" in split:
        raise ValueError(f"split {split!r}: a stream has no parts of splits; name a split, and use skip or max_steps")
    if sources.is_hub_id(path, ds_type):
        data = hub.load_dataset(path, split=split, name=name, revision=revision, data_files=data_files, streaming=True)
        shards = hub_shards(data, path)
    else:
        if name is not None or revision is not None:
            raise ValueError(f"{path or data_files}: files have neither configurations nor revisions; leave name and revision out")
        if ds_type is None and path is not None and not data_files and files.saved_marker(path):
            ds_type = "arrow"  # what `save_to_disk` keeps rows in; the rest of its folder is JSON about them
        shards = [file_shard(file) for file in sources.find_files(path, split=split, data_files=data_files, ds_type=ds_type)]
    return _without(shards, skip)


def file_shard(file: files.File) -> Shard:
    """A file as a shard."""
    return Shard(file.name, lambda place: file_rows.iterate(file, place))


def hub_shards(data: Any, name: str) -> list[Shard]:
    """Shards of an iterable dataset of the datasets library, which skips rows by reading them."""
    return [Shard(f"{name} shard {i}", _shard_reader(data, i)) for i in range(data.num_shards)]


def blocks(
    shards: Sequence[Shard],
    *,
    cursor: StreamCursor = START,
    epochs: int | None = None,
    buffer: int = BUFFER,
    shuffle: bool = True,
    seed: int = 0,
) -> Iterator[tuple[sources.Rows, StreamCursor, StreamCursor]]:
    """(rows, cursor of the block, cursor behind it): blocks of `buffer` rows from `cursor` on, the last of an epoch being shorter.

    shuffle: shards in another order each epoch. Errors: ValueError for a buffer below 1 and for a source without rows.
    """
    if buffer < 1:
        raise ValueError(f"the shuffle buffer has {buffer} rows: expected at least 1")
    block_cursor = cursor._replace(index=0)
    while epochs is None or block_cursor.epoch < epochs:
        epoch_order = order.permutation(len(shards), seed, block_cursor.epoch, order.FILES) if shuffle else list(range(len(shards)))
        records = _records(shards, epoch_order, block_cursor)
        while block_records := list(islice(records, buffer)):
            position, _, last = block_records[-1]
            next_cursor = StreamCursor(block_cursor.epoch, position, last.number, last.offset, block_cursor.block + 1)
            yield _rows(shards, epoch_order, block_records), block_cursor, next_cursor
            block_cursor = next_cursor
        if block_cursor == StreamCursor(block_cursor.epoch):
            raise ValueError(f"{', '.join(shard.name for shard in shards[:3]) or 'the source'}: no rows to stream")
        block_cursor = StreamCursor(block_cursor.epoch + 1)


def micro_batches(
    shards: Sequence[Shard],
    encode: Callable[[sources.Rows], list],
    *,
    cursor: StreamCursor = START,
    epochs: int | None = None,
    buffer: int = BUFFER,
    shuffle: bool = True,
    seed: int = 0,
    note: Callable[[sources.Rows, StreamCursor], None] = lambda rows, block_cursor: None,
    **options,
) -> Iterator[tuple[list, StreamCursor]]:
    """(documents of a micro-batch, cursor after it), from `cursor` on: the same for ever, or for `epochs` passes.

    encode: rows to documents, [] where a block has none. note: told of each block that is read. options: budget (tokens) or rows, of
    `loader.epoch_plan`.
    Errors: ValueError for a whole epoch without documents, and whatever reading and encoding say.
    """
    first_empty: StreamCursor | None = None  # the first block since there was a document
    for rows, block_cursor, next_cursor in blocks(shards, cursor=cursor, epochs=epochs, buffer=buffer, shuffle=shuffle, seed=seed):
        note(rows, block_cursor)
        docs = encode(rows)
        first_empty = None if docs else first_empty or block_cursor
        # Without an end to the stream, rows that give no document would be read for ever.
        if first_empty and block_cursor.epoch > first_empty.epoch and block_cursor.block >= first_empty.block:
            raise ValueError(f"{rows.name}: not one document in a whole pass through the source")
        docs = _weighed(docs, shards, seed, block_cursor.epoch)
        plan = _plan(docs, block_cursor, shuffle=shuffle, seed=seed, **options)
        first_index = cursor.index if cursor._replace(index=0) == block_cursor else 0
        # The cursor behind the last micro-batch is that of the next block: resuming there encodes no block for nothing.
        for index, group in enumerate(plan[first_index:], first_index + 1):
            yield [docs[i] for i in group], block_cursor._replace(index=index) if index < len(plan) else next_cursor


def _weighed(docs: list, shards: Sequence[Shard], seed: int, epoch: int) -> list:
    """The documents with those of each row as often as its data set weighs: floor(w) times, and once more with probability w - floor(w)."""
    if all(shard.weight == 1 for shard in shards):
        return docs
    out = []
    for doc in docs:
        weight = shards[shard_of(doc.row)].weight
        more = order.uniform(seed, epoch, doc.row, order.REPEATS) < weight - int(weight)
        out += [doc] * (int(weight) + more)
    return out


def shard_of(number: int) -> int:
    """The index of the shard that the row of a stream is of."""
    return number >> PART_BITS


def _plan(docs: list, block_cursor: StreamCursor, **options) -> list[list[int]]:
    """The micro-batches of a block, each a list of document indices."""
    # Each block is shuffled as an epoch of its own; the factor, a prime beyond any count of blocks, keeps the numbers apart.
    number = block_cursor.epoch * EPOCH_BLOCKS + block_cursor.block
    return loader.epoch_plan([len(doc.tokens) for doc in docs], epoch=number, window=max(1, len(docs)), **options)


def stream_steps(
    shards: Sequence[Shard], encode: Callable[[sources.Rows], list], *, accum: int = 1, world: int = 1, rank: int = 0, **options
) -> Iterator[tuple[list[list], StreamCursor]]:
    """(this rank's micro-batches, cursor after them) step by step; options are those of `micro_batches`.

    A step takes accum * world micro-batches, dealt to the ranks in turn. Only the last step of all may have fewer: every rank then
    still gets the same number, some of them empty ([], which `pack.collate` accepts).
    """
    stream = micro_batches(shards, encode, **options)
    while step_batches := list(islice(stream, accum * world)):
        rank_batches = [docs for docs, _ in step_batches[rank::world]]
        rank_batches += [[]] * (-(-len(step_batches) // world) - len(rank_batches))
        yield rank_batches, step_batches[-1][1]


def prefetch(items: Iterator, depth: int = 16) -> Iterator:
    """Items of an iterator, made up to `depth` ahead by a thread, so that encoding a block overlaps with training on the one before.

    Cursors travel with the items, so what has been made but not taken is made again after a stop. Errors come out where they occur.
    """
    # One thread: items come in order, and the iterator is never entered twice at once.
    with ThreadPoolExecutor(1) as worker:
        waiting = deque(worker.submit(next, items, END) for _ in range(depth))
        try:
            while (item := waiting.popleft().result()) is not END:
                waiting.append(worker.submit(next, items, END))
                yield item
        finally:
            # A consumer that stops early must not wait for items that nobody takes.
            worker.shutdown(cancel_futures=True)


def stream_fingerprint(shards: Sequence[Shard], **options) -> str:
    """Fingerprint of the shards' names and of the stream's options: a cursor is valid only for the stream it was made on."""
    identity = [[shard.name, *shard.start] for shard in shards]
    return hashlib.sha256(json.dumps([identity, sorted(options.items())]).encode()).hexdigest()[:16]


def _records(shards: Sequence[Shard], epoch_order: list[int], cursor: StreamCursor) -> Iterator[tuple[int, int, file_rows.RowRecord]]:
    """(position in the epoch's order, index of the shard, record) of the rest of the epoch."""
    for position in range(cursor.part, len(epoch_order)):
        shard = shards[epoch_order[position]]
        place = ReadPosition(cursor.row, cursor.offset) if position == cursor.part else shard.start
        for record in shard.read(max(place, shard.start)):
            yield position, epoch_order[position], record


def _rows(shards: Sequence[Shard], epoch_order: list[int], block_records: list[tuple[int, int, file_rows.RowRecord]]) -> sources.Rows:
    """Rows of a block, whose numbers tell shard and line."""
    shard_indices = dict.fromkeys(shard_index for _, shard_index, _ in block_records)
    units = {shard_index: record.unit for _, shard_index, record in block_records}
    origins = tuple(
        sources.Origin(shard_index << PART_BITS, shards[shard_index].name, units[shard_index]) for shard_index in sorted(shard_indices)
    )
    numbers = [(shard_index << PART_BITS) + record.number for _, shard_index, record in block_records]
    return sources.Rows(
        ", ".join(shards[shard_index].name for shard_index in shard_indices),
        [record.row for _, _, record in block_records],
        numbers,
        origins=origins,
    )


def _without(shards: list[Shard], skip: int) -> list[Shard]:
    """The shards without their first `skip` rows."""
    for i, shard in enumerate(shards):
        if skip == 0:
            return shards[i:]
        for record in shard.read(shard.start):
            skip -= 1
            if skip == 0:
                return [shard._replace(start=ReadPosition(record.number, record.offset)), *shards[i + 1 :]]
    if skip:
        raise ValueError(f"skip leaves out every row: there are {skip} too few")
    return shards


def _shard_reader(data: Any, i: int) -> Callable[[ReadPosition], Iterator[file_rows.RowRecord]]:
    def read(place: ReadPosition) -> Iterator[file_rows.RowRecord]:
        for number, row in enumerate(data.shard(data.num_shards, i).skip(place.row), place.row + 1):
            yield file_rows.RowRecord(number, row, 0, "row")

    return read
