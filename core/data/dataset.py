"""Which rows a run reads (`RowSettings`), what they became (`Dataset`), and how documents fill micro-batches.

D documents, n tokens of one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from treetune.core import fields
from treetune.core.data import loader, row_formats, sources, streaming, trees
from treetune.core.data.rows import Row
from treetune.core.data.spans import Doc

Refuse = Callable[[dict[str, str]], None]  # {option that the rows would ignore: the reason}; raises for one that the user gave
Docs = list[Doc] | list[trees.TreeDoc]
SOURCE_KEYS = frozenset(row_formats.keywords(sources.read))  # of an entry of `datasets`: where its rows are


@dataclass(frozen=True)
class RowSettings:
    """Which rows are read and how: the options of a command as plain values.

    data, val_data: files or data set ids; datasets, test_datasets: the same as mappings with options of their own, which come first.
    val_set_size: fraction (below 1) or number of training rows to hold out where none is named. encoding: options of formats, by name,
    for all data sets whose format takes them. text_column: column of raw text, which then is the only format. prompt_column: of prompts;
    their `format` can only be a user's transform.
    stream_buffer: rows held at a time of a stream; None: all rows are read first. transform_config: what a user's transform of prompts
    is called with.
    """

    data: tuple[str, ...]
    datasets: tuple[dict[str, Any], ...] = ()
    val_data: tuple[str, ...] = ()
    test_datasets: tuple[dict[str, Any], ...] = ()
    val_set_size: float = 0.0
    split: str = "train"
    max_rows: int | None = None
    format: str = "auto"
    sequence_len: int = 512
    overlong: str | None = None
    drop_duplicates: bool = False
    prepared_folder: str | None = None
    encoding: Mapping[str, Any] = field(default_factory=dict)
    text_column: str | None = None
    prompt_column: str = "auto"
    stream_buffer: int | None = None
    transform_config: object = None

    def training_entries(self) -> list[dict[str, Any]]:
        """The training data sets as mappings."""
        return list(self.datasets) or [{"path": path} for path in self.data]

    def held_out_entries(self) -> list[dict[str, Any]]:
        """The data sets to evaluate on as mappings."""
        return list(self.test_datasets) or [{"path": path} for path in self.val_data]


class DocumentStream(NamedTuple):
    """Training documents that are made while training: where rows are, and how some of them become documents."""

    parts: list[streaming.Shard]
    encode: Callable[[sources.Rows], list[Doc]]


class Dataset(NamedTuple):
    """What rows became, to train on and to hold out: documents, or prompts.

    train: of a stream only the first documents. first_row, format: of the first held-out row. lines: one about each data set.
    weights: how often each document is read in an epoch; None: once. digests: fingerprints of train and val.
    """

    train: list
    val: list
    first_row: dict | None
    format: str
    lines: list[str]
    weights: list[float] | None = None
    stream: DocumentStream | None = None
    digests: tuple[str, str] = ("", "")


def read_source(entry: Mapping[str, Any], settings: RowSettings, **source: Any) -> sources.Rows:
    """The rows of an entry of `datasets`. source: arguments of `sources.read` that go before those of the entry."""
    with fields.reading(entry.get("path") or entry.get("data_files")):
        return sources.read(entry.get("path"), **source_options(entry, settings) | source)


def source_options(entry: Mapping[str, Any], settings: RowSettings) -> dict[str, Any]:
    """The arguments of `sources.read` for an entry."""
    return {"split": settings.split, "limit": settings.max_rows} | {key: entry[key] for key in SOURCE_KEYS & entry.keys()}


def check_keys(entry: Mapping[str, Any], reader_keys: frozenset[str], reader: str) -> None:
    """Errors: ValueError for a key of an entry that its reader does not take."""
    if unknown := sorted(entry.keys() - SOURCE_KEYS - reader_keys):
        names = sources.join_names(sorted(SOURCE_KEYS | reader_keys))
        raise ValueError(f"datasets: {entry.get('path')} has the unknown key {unknown[0]}; {reader} {names}")


def hold_out(
    parts: Sequence[sources.Rows], size: float, seed: int, *, key: Callable[[Row], str] | None
) -> tuple[list[sources.Rows], list[sources.Rows]]:
    """The rows of each data set to train on, and those held out: a fraction or a number; rows of one key stay together."""
    pairs = [sources.split_validation(rows, size if size < 1 else int(size), seed, key=key) for rows in parts]
    return [train for train, _ in pairs], [val for _, val in pairs]


def check_fits(docs: Docs, sequence_len: int, *, vocab_size: int, max_positions: int, shared_positions: int | None = None) -> None:
    """Raise ValueError when documents may be longer than the model's positions, or hold ids that its vocabulary lacks.

    Positions of a branch continue from its trunk, so a document with branches may hold more tokens than the model has positions.
    shared_positions: how many a document with branches may have, where that is fewer.
    """
    if sequence_len > max_positions:
        raise ValueError(f"sequence_len {sequence_len} is longer than the {max_positions} positions of the model")
    longest = max(docs, key=_positions, default=None)
    if longest is not None and _positions(longest) > max_positions:
        raise ValueError(f"row {longest.row} has {_positions(longest)} positions, the model {max_positions}: lower sequence_len")
    shared = max_positions if shared_positions is None else shared_positions
    if deep := [doc for doc in docs if isinstance(doc, trees.TreeDoc) and _positions(doc) > shared]:
        raise ValueError(
            f"row {deep[0].row} has {_positions(deep[0])} positions; answers that share a prompt have at most {shared} in this model, "
            "whose rotary positions change with the length: lower sequence_len"
        )
    largest = max((int(doc.tokens.max()) for doc in docs), default=0)
    if largest >= vocab_size:
        raise ValueError(f"the rows hold token id {largest}, the model has {vocab_size}: the tokenizer is of another model")


def _positions(doc: Doc | trees.TreeDoc) -> int:
    return max(trees.side_lengths(doc)) if isinstance(doc, trees.TreeDoc) else len(doc.tokens)


def batching(*, packing: bool, sequence_len: int, micro_batch_size: int, longest: int | None = None) -> dict[str, int]:
    """How documents form micro-batches: a token budget when packing, else a number of rows.

    longest: tokens of the longest document; a pair holds up to nearly twice sequence_len, and must fit in a micro-batch.
    """
    if packing:
        return {"budget": max(micro_batch_size * sequence_len, longest or 0)}
    return {"rows": micro_batch_size}


def lengths(docs: Docs) -> list[int]:
    """Tokens of each document."""
    return [len(doc.tokens) for doc in docs]


def total_steps(docs: Docs, *, epochs: int, max_steps: int | None, **options: Any) -> int:
    """Optimiser steps of a whole run: `max_steps` if given, else `epochs` times through the documents."""
    if max_steps is not None:
        return max_steps
    sizes = lengths(docs)
    return sum(loader.steps_per_epoch(sizes, epoch=epoch, **options) for epoch in range(epochs))
