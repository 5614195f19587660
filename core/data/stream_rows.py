"""Data sets as a stream: the shards of all of them, and how the rows of a block become documents."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

from treetune.core import fields
from treetune.core.data import corpus, fingerprint, kinds, sources, streaming
from treetune.core.data.dataset import Dataset, DocumentStream, Refuse, RowSettings
from treetune.core.data.spans import Doc
from treetune.core.data.streaming import Shard
from treetune.core.protocols import Tokenizer

SHOWN = 8  # documents of a stream to check and to show before it starts
WHERE = ("split", "name", "revision", "data_files", "ds_type", "skip")  # keys of an entry that say where the rows of a stream are
WHOLE = ("limit", "shards", "shard_index", "train_on_split")  # those that need all rows


class StreamedSet(NamedTuple):
    """A data set of a stream: its description with its first rows, its shards, and those held out."""

    part: corpus.DataSetRows
    shards: list[Shard]
    held_out: corpus.DataSetRows | None


def load(kind: kinds.DatasetSpec, settings: RowSettings, tokenizer: Tokenizer, *, refuse: Refuse) -> Dataset:
    """A stream of the data sets' rows, but for those held out, with its first documents.

    Errors: ValueError naming data set, row and fix; what `refuse` raises.
    """
    val_parts = corpus.read_all(settings.held_out_entries(), settings, tokenizer, kind)
    size = 0 if val_parts else int(settings.val_set_size)  # a fraction counts as 0: nobody knows the length of a stream
    sets = [_open(entry, size, settings, tokenizer, kind) for entry in settings.training_entries()]
    parts = [one.part for one in sets]
    refuse(corpus.unused_options(settings, parts + val_parts))
    val_parts += [one.held_out for one in sets if one.held_out is not None]
    shards = [_of_set(shard, i, one.part, settings) for i, one in enumerate(sets) for shard in one.shards]
    encode = partial(_encode_block, parts=parts, shards=shards, settings=settings, tokenizer=tokenizer)
    first_docs, _ = next(streaming.micro_batches(shards, encode, rows=SHOWN, buffer=SHOWN, shuffle=False))
    val = corpus.encode_all(val_parts, settings, tokenizer, "held out")
    lines = [line for part in parts if (line := _left_out(part, settings, tokenizer))]
    line = f"train: a stream of {len(shards)} files or shards, {settings.stream_buffer} rows at a time"
    digests = (_fingerprint(first_docs, shards, parts, settings), val.digest)
    first, stream = corpus.first_row(val_parts, settings), DocumentStream(shards, encode)
    return Dataset(first_docs, val.docs, first, parts[0].format, [line, *lines, *val.lines], stream=stream, digests=digests)


def _open(entry: Mapping[str, Any], size: int, settings: RowSettings, tokenizer: Tokenizer, kind: kinds.DatasetSpec) -> StreamedSet:
    """The data set that one mapping describes, without its first `size` rows, which are held out."""
    path, source = entry.get("path"), {key: entry[key] for key in WHERE if key in entry}
    if whole := [key for key in WHOLE if key in entry]:
        raise ValueError(f"datasets: {path} has {whole[0]}, which needs all rows at once; a stream has skip, and is read for max_steps")
    options: dict[str, Any] = {"split": settings.split} | source
    with fields.reading(path or entry.get("data_files")):
        first, _, _ = next(streaming.blocks(streaming.list_shards(path, **options), buffer=max(size + 1, SHOWN), shuffle=False))
        if size and len(first.rows) <= size:
            raise ValueError(f"val_set_size {size} holds out all {len(first.rows)} rows of {path}: give a smaller number")
        shards = streaming.list_shards(path, **options | {"skip": size + options.get("skip", 0)})
    part = corpus.describe(first, entry, settings, tokenizer, kind)
    held_out = corpus.describe(sources.take(first, range(size)), entry, settings, tokenizer, kind) if size else None
    return StreamedSet(part, shards, held_out)


def _left_out(part: corpus.DataSetRows, settings: RowSettings, tokenizer: Tokenizer) -> str:
    """A warning of a data set whose first rows give no document. Errors: ValueError for bad rows among them."""
    rows = sources.take(part.rows, range(min(SHOWN, len(part.rows.rows))))
    if _encode(rows, part._replace(transform=None), settings, tokenizer):
        return ""
    return f"! {rows.name}: none of its first {len(rows.rows)} rows gives a document: they are too long, or nothing of them is trained"


def _of_set(shard: Shard, index: int, part: corpus.DataSetRows, settings: RowSettings) -> Shard:
    column = None if settings.text_column is None else part.options["field"]
    return shard._replace(entry=index, weight=part.weight, column=None if column == settings.text_column else column)


def _fingerprint(docs: Sequence[Doc], shards: Sequence[Shard], parts: Sequence[corpus.DataSetRows], settings: RowSettings) -> str:
    """Of what is read. Where files are is no part of what they hold; which comes first is told by their names."""
    places = [[os.path.basename(shard.name) if len(shards) > 1 else "", *shard.start] for shard in shards]
    # How the rows of a data set are read shows in its first documents, but only those of the first set are here.
    others = [[part.format, part.options, part.weight] for part in parts]
    alike = others[0][2] == 1 and all(other == others[0] for other in others)
    return fingerprint.values(fingerprint.documents(list(docs)), settings.split, places, *([] if alike else [others]))


def _encode_block(
    rows: sources.Rows, *, parts: Sequence[corpus.DataSetRows], shards: Sequence[Shard], settings: RowSettings, tokenizer: Tokenizer
) -> list[Doc]:
    """Documents of some rows of a stream, in their order: none where none of the rows gives one, which is an error only for all of them."""
    docs: list[Doc] = []
    entries = [shards[streaming.shard_of(number)].entry for number in rows.numbers]
    for entry, indices in groupby(range(len(rows.rows)), key=entries.__getitem__):
        docs += _encode(sources.take(rows, list(indices)), parts[entry], settings, tokenizer)
    return docs


def _encode(rows: sources.Rows, part: corpus.DataSetRows, settings: RowSettings, tokenizer: Tokenizer) -> list[Doc]:
    options, sizes = corpus.encoding_of(part, settings)
    rows = corpus.lifted(rows if part.transform is None else part.transform(rows), part.options)
    with fields.reading(f"{rows.name}, read as {part.format},"):
        docs, _ = part.kind.encode(rows, tokenizer, format=part.format, format_options=options, **sizes, **(part.kind.in_parts or {}))
    return docs
