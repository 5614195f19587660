"""From data options to documents: read, split, encode, and say what became of the rows."""

import inspect
import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from treetune.cli import checks, parse
from treetune.cli.options import DataOptions, PretrainData, RowOptions
from treetune.core.data import cache, chat_templates, custom, dedup, formats, loader, sources, streaming, workers
from treetune.core.data.spans import Doc
from treetune.models.dense import Config

SHOWN = 8  # documents of a stream to check and to show before it starts


class Stream(NamedTuple):
    """Training documents that are made while training: where rows are, and how some of them become documents."""

    parts: list[streaming.Part]
    encode: Callable[[sources.Rows], list[Doc]]


class Corpus(NamedTuple):
    """Documents to train on and to hold out, the first held-out row, its format, and a line per data set."""

    train: list[Doc]  # of a stream only the first
    val: list[Doc]
    first_row: dict | None
    format: str
    lines: list[str]
    weights: list[float] | None = None  # how often each training document is read in an epoch; None: once
    stream: Stream | None = None  # what to train on, unless it is `train`


class Part(NamedTuple):
    """The rows of one data set, their format, and the encoder's options that were given for this data set alone."""

    rows: sources.Rows
    format: str
    options: dict
    weight: float
    digest: str  # of the bytes and choices behind the rows; empty where nothing is kept


SOURCE_KEYS = frozenset(inspect.signature(sources.read).parameters) - {"path"}
OWN_KEYS = {"path", "type", "train_on_split", "weight"}


def _part(entry: dict, options: RowOptions | PretrainData, tokenizer) -> Part:
    """The data set that one mapping describes; what is neither about the source nor its type goes to the encoder."""
    source = {"split": options.split, "limit": options.max_rows} | {key: entry[key] for key in SOURCE_KEYS & entry.keys()}
    if "train_on_split" in entry:
        source["split"] = entry["train_on_split"]
    rows = sources.read(entry.get("path"), **source)
    own = {key: value for key, value in entry.items() if key not in SOURCE_KEYS | OWN_KEYS}
    own |= entry["type"] if isinstance(entry.get("type"), dict) else {}
    kept = getattr(options, "dataset_prepared_path", None) is not None
    if _is_custom(entry.get("type")):
        rows = custom.apply(rows, custom.load(entry["type"], entry), tokenizer)
        digest = custom.digest(rows) if kept else ""
        return Part(rows, formats.detect(sources.columns(rows)), own, _weight(entry), digest)
    return Part(rows, _format(entry, options, rows), own, _weight(entry), sources.digest(entry.get("path"), **source) if kept else "")


def _is_custom(name: object) -> bool:
    """Whether a type is the import path of the user's own transform, after which rows are known by their columns."""
    return isinstance(name, str) and ("." in name or ":" in name) and name not in formats.FORMATS and name not in formats.ALIASES


def _weight(entry: dict) -> float:
    weight = entry.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise ValueError(f"the weight of {entry.get('path')} is {weight!r}; expected a number above 0: 2 reads its rows twice an epoch")
    return float(weight)


def _format(entry: dict, options: RowOptions | PretrainData, rows: sources.Rows) -> str:
    """As named for the data set, else for all, else by the columns. Found before any split: a part may lack a column."""
    if isinstance(options, PretrainData):
        return "completion"
    if "type" in entry and entry["type"] is None:
        return "pretokenised"
    if isinstance(entry.get("type"), dict):
        return "user_defined"
    named = entry.get("type") or (None if options.format == "auto" else options.format)
    return formats.detect(sources.columns(rows)) if named is None else formats.ALIASES.get(named, named)


def read_all(paths: tuple[str, ...], listed: tuple[dict, ...], options: RowOptions | PretrainData, tokenizer) -> list[Part]:
    """The data sets named by paths, or listed with options of their own."""
    return [_part(entry, options, tokenizer) for entry in listed or [{"path": path} for path in paths]]


FOR_ROWS = ("chat_template", "roles_to_train", "train_on_eos", "train_on_inputs")  # options of all data sets that formats may take


def _encoding(options: RowOptions | PretrainData, name: str) -> dict:
    """Those of the options of all data sets that this format takes."""
    if isinstance(options, PretrainData):
        return {"field": options.text_column}
    return {key: getattr(options, key) for key in FOR_ROWS if key in formats.takes(name)}


def ignored(options: RowOptions | PretrainData, names: set[str]) -> dict[str, str]:
    """Options that rows of these formats would ignore, with the reason."""
    if isinstance(options, PretrainData):
        return {}
    taken, listed = {key for name in names for key in formats.takes(name)}, ", ".join(sorted(names))
    out = {key: f"rows of format {listed} do not take it" for key in FOR_ROWS if key not in taken}
    if options.datasets:
        out |= {key: "datasets is given" for key in ("data", "format")}
    return out | ({"overlong": "raw text is split, not dropped"} if names == {"completion"} else {})


class Encoded(NamedTuple):
    """Documents of several data sets, with rows numbered through and the weight of each, a line about each set, and its report."""

    docs: list[Doc]
    weights: list[float] | None
    lines: list[str]
    reports: list[formats.Report]


def encode_all(parts: list[Part], options: RowOptions | PretrainData, tokenizer, label: str, **working: Any) -> Encoded:
    """Encode each data set in its format with the options of all and its own; `working`: `processes`, `progress` of core.data.workers."""
    docs, lines, reports, counts, offset = [], [], [], [], 0
    for part in parts:
        found, report, kept = _encode(part, options, tokenizer, **working)
        docs += [doc._replace(row=doc.row + offset) for doc in found]
        offset += max(part.rows.numbers, default=0) + 1
        lines.append(f"{label} {part.rows.name}: {formats.describe(report)}{' (prepared earlier)' * kept}")
        reports.append(report)
        counts.append(len(found))
    return Encoded(docs, loader.document_weights(counts, [part.weight for part in parts]), lines, reports)


def _encode(
    part: Part, options: RowOptions | PretrainData, tokenizer, *, processes: int = 1, **working: Any
) -> tuple[list[Doc], formats.Report, bool]:
    """Documents and report of one data set, and whether they were prepared earlier."""
    given = _encoding(options, part.format) | part.options
    lengths_ = {"sequence_len": options.sequence_len, "overlong": "split" if part.format == "completion" else options.overlong}
    root = getattr(options, "dataset_prepared_path", None)
    key = ""
    if root is not None:
        choices = {"format": part.format, "given": given, "numbers": part.rows.numbers, **lengths_}
        template = chat_templates.resolve(tokenizer, given["chat_template"]) if given.get("chat_template") else None
        key = cache.key(data=[part.digest], tokenizer=tokenizer, template=template, options=json.loads(json.dumps(choices)))
        if (found := cache.load(root, key)) is not None:
            return *found, True
    docs, report = workers.encode_rows(part.rows, tokenizer, processes=processes, format=part.format, own=given, **lengths_, **working)
    if root is not None:
        cache.save(root, key, docs, report)
    return docs, report, False


def _unique(train: list[Part], held: list[Part]) -> tuple[list[Part], list[Part], list[str]]:
    """The data sets without repeated rows, training rows first, and a line where rows went."""
    parts = train + held
    rows, gone = dedup.exact([part.rows for part in parts])
    parts = [part._replace(rows=kept) for part, kept in zip(parts, rows, strict=True)]
    lines = [f"{part.rows.name}: {count} repeated rows left out" for part, count in zip(parts, gone, strict=True) if count]
    train, held = ([part for part in side if part.rows.rows] for side in (parts[: len(train)], parts[len(train) :]))
    return train, held, lines


def read_and_encode(options: RowOptions, tokenizer, *, given: frozenset[str], **working: Any) -> Encoded:
    """All documents of the data sets, for commands that hold nothing out."""
    parts = read_all(options.data, options.datasets, options, tokenizer)
    parse.refuse_ignored(given, ignored(options, {part.format for part in parts}))
    parts, _, lines = _unique(parts, []) if options.dataset_exact_deduplication else (parts, [], [])
    found = encode_all(parts, options, tokenizer, "rows of", **working)
    return found._replace(lines=lines + found.lines)


def load(options: DataOptions | PretrainData, tokenizer, *, seed: int, given: frozenset[str]) -> Corpus:
    """Documents for training and evaluation. Errors: ValueError naming file, row and fix; BadInput for options that would be ignored."""
    if not options.data:
        raise ValueError("no training data: give --data at least one file or data set")
    if checks.streams(options):
        return _streamed(options, tokenizer)
    listed, tests = getattr(options, "datasets", ()), getattr(options, "test_datasets", ())
    parts, held = (
        read_all(options.data, listed, options, tokenizer),
        read_all(options.val_data, tests, options, tokenizer),
    )
    parse.refuse_ignored(given, ignored(options, {part.format for part in parts + held}))
    unique = getattr(options, "dataset_exact_deduplication", False)
    parts, held, repeated = _unique(parts, held) if unique else (parts, held, [])
    if not held and options.val_set_size:
        size = options.val_set_size if options.val_set_size < 1 else int(options.val_set_size)
        pairs = [sources.val_split(part.rows, size, seed) for part in parts]
        held = [part._replace(rows=val) for part, (_, val) in zip(parts, pairs, strict=True)]
        parts = [part._replace(rows=train) for part, (train, _) in zip(parts, pairs, strict=True)]
    train, val = encode_all(parts, options, tokenizer, "train"), encode_all(held, options, tokenizer, "held out")
    first = held[0].rows.rows[0] if held else None
    return Corpus(train.docs, val.docs, first, (held or parts)[0].format, repeated + train.lines + val.lines, train.weights)


def _streamed(options: PretrainData, tokenizer) -> Corpus:
    """A stream of the data sets' rows, but for those held out, with its first documents."""
    size = int(checks.held_out(options))
    held = read_all(options.val_data, (), options, tokenizer) + [_first_rows(path, options.split, size) for path in options.data if size]
    parts = [part for path in options.data for part in streaming.parts(path, split=options.split, skip=size)]
    encode = partial(_encode_block, options=options, tokenizer=tokenizer)
    shown, _ = next(streaming.micro_batches(parts, encode, rows=SHOWN, buffer=SHOWN, shuffle=False))
    val = encode_all(held, options, tokenizer, "held out")
    said = f"train: a stream of {len(parts)} files or shards, {options.streaming_multipack_buffer_size} rows at a time"
    first = held[0].rows.rows[0] if held else None
    return Corpus(shown, val.docs, first, "completion", [said, *val.lines], stream=Stream(parts, encode))


def _first_rows(path: str, split: str, size: int) -> Part:
    """The first rows of a data set that has more."""
    rows, _, _ = next(streaming.blocks(streaming.parts(path, split=split), buffer=size + 1, shuffle=False))
    if len(rows.rows) <= size:
        raise ValueError(f"val_set_size {size} holds out all {len(rows.rows)} rows of {path}: give a smaller number")
    return Part(sources.take(rows, range(size)), "completion", {}, 1.0, "")


def _encode_block(rows: sources.Rows, *, options: PretrainData, tokenizer) -> list[Doc]:
    """Documents of some rows of a stream: none where all texts are blank, which is an error only for a whole data set."""
    texts = [row.get(options.text_column) for row in rows.rows]
    if all(isinstance(text, str) and not text.strip() for text in texts):
        return []
    own = _encoding(options, "completion")
    return formats.encode_rows(rows, tokenizer, format="completion", own=own, sequence_len=options.sequence_len, overlong="split")[0]


def check_fits(docs: list[Doc], sequence_len: int, cfg: Config) -> None:
    """Raise ValueError when documents may be longer than the model's positions, or hold ids that its vocabulary lacks."""
    if sequence_len > cfg.max_positions:
        raise ValueError(f"sequence_len {sequence_len} is longer than the {cfg.max_positions} positions of the model")
    largest = max((int(doc.tokens.max()) for doc in docs), default=0)
    if largest >= cfg.vocab_size:
        raise ValueError(f"the rows hold token id {largest}, the model has {cfg.vocab_size}: the tokenizer is of another model")


def batching(options: RowOptions | PretrainData, micro_batch_size: int) -> dict:
    """How documents form micro-batches: a token budget when packing, else a number of rows."""
    if options.sample_packing:
        return {"budget": micro_batch_size * options.sequence_len}
    return {"rows": micro_batch_size}


def lengths(docs: list[Doc]) -> list[int]:
    """Tokens of each document."""
    return [len(doc.tokens) for doc in docs]


def total_steps(docs: list[Doc], *, epochs: int, max_steps: int | None, **options) -> int:
    """Optimiser steps of a whole run: `max_steps` if given, else `epochs` times through the documents."""
    if max_steps is not None:
        return max_steps
    sizes = lengths(docs)
    return sum(loader.steps_per_epoch(sizes, epoch=epoch, **options) for epoch in range(epochs))
