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
from typing import NamedTuple

from treetune.core.data import files, hub, loader, order, records, sources
from treetune.core.data.records import ReadPosition

BUFFER = 10_000  # rows
PART_BITS = 36  # a row number is (part << PART_BITS) + its number in the part
EPOCH_BLOCKS = 1_000_000_007
END = object()


class Shard(NamedTuple):
    """Something that is read from its start: a file or a shard. `read(place)` gives the rows after `place`."""

    name: str
    read: Callable[[ReadPosition], Iterator[records.Record]]
    start: ReadPosition = ReadPosition()


class StreamCursor(NamedTuple):
    """Where a stream stands: the block that starts after `row` lines or rows (`offset` bytes) of part `part` of this epoch's order,
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
    """The parts of a source that `sources.read` would read whole; options are the same. skip: rows to leave out at its beginning.

    Errors: ValueError for a slice of a split, which needs the number of rows, and as `sources.read`.
    """
    if "[" in split or "+" in split:
        raise ValueError(f"split {split!r}: a stream has no parts of splits; name a split, and use skip or max_steps")
    if sources.is_hub_id(path, ds_type):
        data = hub.load_dataset(path, split=split, name=name, revision=revision, data_files=data_files, streaming=True)
        found = hub_shards(data, path)
    else:
        if name is not None or revision is not None:
            raise ValueError(f"{path or data_files}: files have neither configurations nor revisions; leave name and revision out")
        if ds_type is None and path is not None and not data_files and files.saved_marker(path):
            ds_type = "arrow"  # what `save_to_disk` keeps rows in; the rest of its folder is JSON about them
        found = [file_shard(file) for file in sources.find_files(path, split=split, data_files=data_files, ds_type=ds_type)]
    return _without(found, skip)


def file_shard(file: files.File) -> Shard:
    """A file as a part."""
    return Shard(file.name, lambda place: records.iterate(file, place))


def hub_shards(data, name: str) -> list[Shard]:
    """The shards of an iterable dataset of the datasets library; it can skip rows, but has to pass over them."""
    return [Shard(f"{name} shard {i}", _shard_reader(data, i)) for i in range(data.num_shards)]


def blocks(
    parts: Sequence[Shard],
    *,
    cursor: StreamCursor = START,
    epochs: int | None = None,
    buffer: int = BUFFER,
    shuffle: bool = True,
    seed: int = 0,
) -> Iterator[tuple[sources.Rows, StreamCursor, StreamCursor]]:
    """(rows, cursor of the block, cursor behind it): blocks of `buffer` rows from `cursor` on, the last of an epoch being shorter.

    shuffle: parts in another order each epoch. Errors: ValueError for a buffer below 1 and for a source without rows.
    """
    if buffer < 1:
        raise ValueError(f"the shuffle buffer has {buffer} rows: expected at least 1")
    here = cursor._replace(index=0)
    while epochs is None or here.epoch < epochs:
        turn = order.permutation(len(parts), seed, here.epoch, order.FILES) if shuffle else list(range(len(parts)))
        found = _records(parts, turn, here)
        while taken := list(islice(found, buffer)):
            at, _, last = taken[-1]
            behind = StreamCursor(here.epoch, at, last.number, last.offset, here.block + 1)
            yield _rows(parts, turn, taken), here, behind
            here = behind
        if here == StreamCursor(here.epoch):
            raise ValueError(f"{', '.join(part.name for part in parts[:3]) or 'the source'}: no rows to stream")
        here = StreamCursor(here.epoch + 1)


def micro_batches(
    parts: Sequence[Shard],
    encode: Callable[[sources.Rows], list],
    *,
    cursor: StreamCursor = START,
    epochs: int | None = None,
    buffer: int = BUFFER,
    shuffle: bool = True,
    seed: int = 0,
    note: Callable[[sources.Rows, StreamCursor], None] = lambda rows, here: None,
    **options,
) -> Iterator[tuple[list, StreamCursor]]:
    """(documents of a micro-batch, cursor after it), from `cursor` on: the same for ever, or for `epochs` passes.

    encode: rows to documents, [] where a block has none. note: told of each block that is read. options: budget (tokens) or rows, of
    `loader.epoch_plan`.
    Errors: ValueError for a whole epoch without documents, and whatever reading and encoding say.
    """
    barren: StreamCursor | None = None  # the first block since there was a document
    for rows, here, behind in blocks(parts, cursor=cursor, epochs=epochs, buffer=buffer, shuffle=shuffle, seed=seed):
        note(rows, here)
        docs = encode(rows)
        barren = None if docs else barren or here
        if barren and here.epoch > barren.epoch and here.block >= barren.block:
            raise ValueError(f"{rows.name}: not one document in a whole pass through the source")
        plan = _plan(docs, here, shuffle=shuffle, seed=seed, **options)
        done = cursor.index if cursor._replace(index=0) == here else 0
        for index, group in enumerate(plan[done:], done + 1):
            yield [docs[i] for i in group], here._replace(index=index) if index < len(plan) else behind


def _plan(docs: list, here: StreamCursor, **options) -> list[list[int]]:
    """The micro-batches of a block, each a list of document indices."""
    number = here.epoch * EPOCH_BLOCKS + here.block
    return loader.epoch_plan([len(doc.tokens) for doc in docs], epoch=number, window=max(1, len(docs)), **options)


def stream_steps(
    parts: Sequence[Shard], encode: Callable[[sources.Rows], list], *, accum: int = 1, world: int = 1, rank: int = 0, **options
) -> Iterator[tuple[list[list], StreamCursor]]:
    """(this rank's micro-batches, cursor after them) step by step; options are those of `micro_batches`.

    A step takes accum * world micro-batches, dealt to the ranks in turn. Only the last step of all may have fewer: every rank then
    still gets the same number, some of them empty ([], which `pack.collate` accepts).
    """
    stream = micro_batches(parts, encode, **options)
    while taken := list(islice(stream, accum * world)):
        mine = [docs for docs, _ in taken[rank::world]]
        mine += [[]] * (-(-len(taken) // world) - len(mine))
        yield mine, taken[-1][1]


def prefetch(items: Iterator, depth: int = 16) -> Iterator:
    """The same items, made up to `depth` ahead by a thread, so that encoding a block overlaps with training on the one before.

    Cursors travel with the items, so what has been made but not taken is made again after a stop. Errors come out where they occur.
    """
    with ThreadPoolExecutor(1) as worker:
        waiting = deque(worker.submit(next, items, END) for _ in range(depth))
        try:
            while (item := waiting.popleft().result()) is not END:
                waiting.append(worker.submit(next, items, END))
                yield item
        finally:
            worker.shutdown(cancel_futures=True)


def stream_fingerprint(parts: Sequence[Shard], **options) -> str:
    """A fingerprint of the parts' names and of the options of the stream: a cursor is good only for the stream it was made on."""
    named = [[part.name, *part.start] for part in parts]
    return hashlib.sha256(json.dumps([named, sorted(options.items())]).encode()).hexdigest()[:16]


def _records(parts: Sequence[Shard], turn: list[int], cursor: StreamCursor) -> Iterator[tuple[int, int, records.Record]]:
    """(position in the epoch's order, part, record) of the rest of the epoch."""
    for position in range(cursor.part, len(turn)):
        part = parts[turn[position]]
        place = ReadPosition(cursor.row, cursor.offset) if position == cursor.part else part.start
        for record in part.read(max(place, part.start)):
            yield position, turn[position], record


def _rows(parts: Sequence[Shard], turn: list[int], taken: list[tuple[int, int, records.Record]]) -> sources.Rows:
    """The block as rows that know their part and line."""
    seen = dict.fromkeys(part for _, part, _ in taken)
    units = {part: record.unit for _, part, record in taken}
    origins = tuple(sources.Origin(part << PART_BITS, parts[part].name, units[part]) for part in sorted(seen))
    numbers = [(part << PART_BITS) + record.number for _, part, record in taken]
    return sources.Rows(", ".join(parts[part].name for part in seen), [record.row for _, _, record in taken], numbers, origins=origins)


def _without(found: list[Shard], skip: int) -> list[Shard]:
    """The parts without their first `skip` rows."""
    for i, part in enumerate(found):
        if skip == 0:
            return found[i:]
        for record in part.read(part.start):
            skip -= 1
            if skip == 0:
                return [part._replace(start=ReadPosition(record.number, record.offset)), *found[i + 1 :]]
    if skip:
        raise ValueError(f"skip leaves out every row: there are {skip} too few")
    return found


def _shard_reader(data, i: int) -> Callable[[ReadPosition], Iterator[records.Record]]:
    def read(place: ReadPosition) -> Iterator[records.Record]:
        for number, row in enumerate(data.shard(data.num_shards, i).skip(place.row), place.row + 1):
            yield records.Record(number, row, 0, "row")

    return read
