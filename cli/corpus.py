"""From data options to documents: read, split, encode, and say what became of the rows."""

import inspect
import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from treetune.cli import checks, rl_data
from treetune.cli.methods.pretrain import PretrainData
from treetune.cli.options.data import DataOptions, PairData, RowOptions
from treetune.core import fields
from treetune.core.data import (
    cache,
    chat_templates,
    custom,
    dedup,
    fingerprint,
    formats,
    kinds,
    loader,
    reporting,
    sources,
    streaming,
    strides,
    suggest,
    trees,
    workers,
)
from treetune.core.data.spans import Doc
from treetune.models.dense import Config

Options = RowOptions | DataOptions | PairData | PretrainData
Docs = list[Doc] | list[trees.TreeDoc]
SHOWN = 8  # documents of a stream to check and to show before it starts


class Stream(NamedTuple):
    """Training documents that are made while training: where rows are, and how some of them become documents."""

    parts: list[streaming.Shard]
    encode: Callable[[sources.Rows], list[Doc]]


class Corpus(NamedTuple):
    """Documents to train on and to hold out, the first held-out row, its format, and a line per data set."""

    train: Docs  # of a stream only the first
    val: Docs
    first_row: dict | None
    format: str
    lines: list[str]
    weights: list[float] | None = None  # how often each training document is read in an epoch; None: once
    stream: Stream | None = None  # what to train on, unless it is `train`
    digests: tuple[str, str] = ("", "")  # fingerprints of the documents to train on (of a stream the first) and of those held out


class Part(NamedTuple):
    """The rows of one data set, their kind and format, and the encoder's options that were given for this data set alone."""

    rows: sources.Rows
    kind: kinds.Kind
    format: str
    options: dict
    weight: float
    digest: str  # of the bytes and choices behind the rows; empty where nothing is kept


SOURCE_KEYS = frozenset(inspect.signature(sources.read).parameters) - {"path"}
OWN_KEYS = {"path", "type", "train_on_split", "weight"}


def _part(entry: dict, options: Options, tokenizer, kind: kinds.Kind) -> Part:
    """The data set that one mapping describes; what is neither about the source nor its type goes to the encoder."""
    source = {"split": options.split, "limit": options.max_rows} | {key: entry[key] for key in SOURCE_KEYS & entry.keys()}
    if "train_on_split" in entry:
        source["split"] = entry["train_on_split"]
    with fields.reading(entry.get("path") or entry.get("data_files")):
        rows = sources.read(entry.get("path"), **source)
    own = {key: value for key, value in entry.items() if key not in SOURCE_KEYS | OWN_KEYS}
    own |= entry["type"] if isinstance(entry.get("type"), dict) else {}
    kept = getattr(options, "dataset_prepared_path", None) is not None
    named = entry.get("type", None if isinstance(options, PretrainData) or options.format == "auto" else options.format)
    if _is_custom(named, kind):
        rows = custom.apply_transform(rows, custom.load_transform(named, entry), tokenizer)
        digest = custom.digest_rows(rows) if kept else ""
        return Part(rows, kind, _detected(rows, kind), own, _weight(entry), digest)
    digest = sources.digest_source(entry.get("path"), **source) if kept else ""
    return Part(rows, kind, _format(entry, options, rows, kind), own, _weight(entry), digest)


def _is_custom(name: object, kind: kinds.Kind) -> bool:
    """Whether a type is the import path of the user's own transform, after which rows are known by their columns."""
    if not isinstance(name, str) or name in kind.names or not ("." in name or ":" in name):
        return False
    return name.partition(".")[0] not in {known.partition(".")[0] for known in kind.names if "." in known}


def _weight(entry: dict) -> float:
    weight = entry.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise ValueError(f"the weight of {entry.get('path')} is {weight!r}; expected a number above 0: 2 reads its rows twice an epoch")
    return float(weight)


def _format(entry: dict, options: Options, rows: sources.Rows, kind: kinds.Kind) -> str:
    """As named for the data set, else for all, else by the columns. Found before any split: a part may lack a column."""
    if isinstance(options, PretrainData):
        return "completion"
    if "type" in entry and entry["type"] is None:
        return kind.canonical("pretokenised")
    if isinstance(entry.get("type"), dict):
        return kind.canonical("user_defined")
    named = entry.get("type") or (None if options.format == "auto" else options.format)
    return _detected(rows, kind) if named is None else kind.canonical(named)


def _detected(rows: sources.Rows, kind: kinds.Kind) -> str:
    columns = sources.columns(rows)
    try:
        return kind.detect(columns, rows.rows[0])
    except ValueError as error:
        entry = suggest.suggest_entry(rows.name, kind.name, columns, rows.rows[0])
        fix = f"; a file for --config with this would read them: {entry}" if entry else ""
        raise ValueError(f"{rows.name}: {error}{fix}") from error


def read_all(paths: tuple[str, ...], listed: tuple[dict, ...], options: Options, tokenizer, kind: kinds.Kind = kinds.TEXT) -> list[Part]:
    """The data sets named by paths, or listed with options of their own."""
    return [_part(entry, options, tokenizer, kind) for entry in listed or [{"path": path} for path in paths]]


# options of all data sets that formats may take
FOR_ROWS = ("chat_template", "chat_template_kwargs", "default_system_message", "roles_to_train", "train_on_eos", "train_on_inputs")
RAW = {"completion", *strides.SPLIT}


def _taken(part: Part) -> tuple[str, ...]:
    return part.kind.takes(part.format, part.rows.rows[0])


def _encoding(options: Options, part: Part) -> dict:
    """Those of the options of all data sets that this one's format takes."""
    if isinstance(options, PretrainData):
        return {"field": options.text_column}
    found = {key: getattr(options, key) for key in FOR_ROWS if hasattr(options, key) and key in _taken(part)}
    named = found.get("chat_template_kwargs")
    return found if named is None else found | {"chat_template_kwargs": rl_data.named_values(named, "chat-template-kwargs")}


def ignored(options: Options, parts: list[Part]) -> dict[str, str]:
    """Options that the rows of these data sets would ignore, with the reason."""
    if isinstance(options, PretrainData):
        return {}
    names, taken = {part.format for part in parts}, {key for part in parts for key in _taken(part)}
    out = {key: f"rows of format {', '.join(sorted(names))} do not take it" for key in FOR_ROWS if key not in taken}
    if options.datasets:
        out |= {key: "datasets is given" for key in ("data", "format")}
    return out | ({"overlong": "raw text is split, not dropped"} if names <= RAW else {})


class Encoded(NamedTuple):
    """Documents of several data sets, with rows numbered through and the weight of each, a line about each set, and its report."""

    docs: Docs
    weights: list[float] | None
    lines: list[str]
    reports: list[formats.Report] | list[trees.Report]
    digest: str = ""  # fingerprint of the documents with their weights


def encode_all(parts: list[Part], options: Options, tokenizer, label: str, **working: Any) -> Encoded:
    """Encode each data set in its format with the options of all and its own; `working`: `processes`, `progress` of core.data.workers.

    Errors: ValueError for bad rows, and for data sets that cannot share a batch.
    """
    docs, lines, reports, counts, digests, offset = [], [], [], [], [], 0
    for part in parts:
        found, report, digest, kept = _encode(part, options, tokenizer, **working)
        if docs and not kinds.same_extras([docs[0], found[0]]):
            differing = ", ".join(sorted(set(docs[0].extras) ^ set(found[0].extras)))
            raise ValueError(f"{part.rows.name} and {parts[0].rows.name}: only one has the field {differing}: fill it in both or in none")
        docs += [doc._replace(row=doc.row + offset) for doc in found]
        digests.append([digest, offset, part.weight])
        offset += max(part.rows.numbers, default=0) + 1
        lines.append(f"{label} {part.rows.name}: {part.kind.describe(report)}{' (prepared earlier)' * kept}")
        lines += [f"! {part.rows.name}: {text}" for text in reporting.find_warnings(report)]
        reports.append(report)
        counts.append(len(found))
    weights = loader.document_weights(counts, [part.weight for part in parts])
    return Encoded(docs, weights, lines, reports, fingerprint.values(digests))


def _encode(part: Part, options: Options, tokenizer, *, processes: int = 1, **working: Any) -> tuple[Docs, Any, str, bool]:
    """Documents, report and fingerprint of one data set, and whether they were prepared earlier."""
    given = _encoding(options, part) | part.options
    policy = "split" if part.format == "completion" else getattr(options, "overlong", part.kind.fallback_overlong)
    lengths_ = {"sequence_len": options.sequence_len, "overlong": policy}
    root = getattr(options, "dataset_prepared_path", None)
    key = ""
    if root is not None:
        choices = {"kind": part.kind.name, "format": part.format, "given": given, "numbers": part.rows.numbers, **lengths_}
        template = chat_templates.resolve(tokenizer, given["chat_template"]) if given.get("chat_template") else None
        key = cache.entry_key(data=[part.digest], tokenizer=tokenizer, template=template, options=json.loads(json.dumps(choices)))
        if (found := cache.load_entry(root, key)) is not None:
            docs, (report, digest) = found
            return docs, report, digest, True
    working |= {"processes": processes, "kind": part.kind}
    with fields.reading(f"{part.rows.name}, read as {part.format},"):
        docs, report = workers.encode_rows(part.rows, tokenizer, format=part.format, own=given, **lengths_, **working)
    digest = fingerprint.documents(docs)
    if root is not None:
        cache.save_entry(root, key, docs, [report, digest])
    return docs, report, digest, False


def _unique(train: list[Part], held: list[Part]) -> tuple[list[Part], list[Part], list[str]]:
    """The data sets without repeated rows, training rows first, and a line where rows went."""
    parts = train + held
    rows, gone = dedup.drop_duplicates([part.rows for part in parts])
    parts = [part._replace(rows=kept) for part, kept in zip(parts, rows, strict=True)]
    lines = [f"{part.rows.name}: {count} repeated rows left out" for part, count in zip(parts, gone, strict=True) if count]
    train, held = ([part for part in side if part.rows.rows] for side in (parts[: len(train)], parts[len(train) :]))
    return train, held, lines


def read_and_encode(options: RowOptions, tokenizer, *, given: frozenset[str], kind: kinds.Kind = kinds.TEXT, **working: Any) -> Encoded:
    """All documents of the data sets, for commands that hold nothing out."""
    parts = read_all(options.data, options.datasets, options, tokenizer, kind)
    checks.refuse_unused(given, ignored(options, parts))
    parts, _, lines = _unique(parts, []) if options.dataset_exact_deduplication else (parts, [], [])
    found = encode_all(parts, options, tokenizer, "rows of", **working)
    kind.check(found.docs)
    return found._replace(lines=lines + found.lines)


def load(options: Options, tokenizer, *, seed: int, given: frozenset[str], kind: kinds.Kind = kinds.TEXT) -> Corpus:
    """Documents for training and evaluation. Errors: ValueError naming file, row and fix; BadInput for options that would be ignored."""
    if not options.data:
        raise ValueError("no training data: give --data at least one file or data set")
    if checks.streams(options):
        return _streamed(options, tokenizer)
    listed, tests = getattr(options, "datasets", ()), getattr(options, "test_datasets", ())
    parts = read_all(options.data, listed, options, tokenizer, kind)
    held = read_all(options.val_data, tests, options, tokenizer, kind)
    checks.refuse_unused(given, ignored(options, parts + held))
    unique = getattr(options, "dataset_exact_deduplication", False)
    parts, held, repeated = _unique(parts, held) if unique else (parts, held, [])
    if not held and options.val_set_size:
        size = options.val_set_size if options.val_set_size < 1 else int(options.val_set_size)
        together = None if kind.read is None else kinds.prompt  # an answer to a question that was trained on tells little
        pairs = [sources.split_validation(part.rows, size, seed, key=together) for part in parts]
        held = [part._replace(rows=val) for part, (_, val) in zip(parts, pairs, strict=True)]
        parts = [part._replace(rows=train) for part, (train, _) in zip(parts, pairs, strict=True)]
    train, val = encode_all(parts, options, tokenizer, "train"), encode_all(held, options, tokenizer, "held out")
    kind.check(train.docs)
    first = held[0].rows.rows[0] if held else None
    lines, digests = repeated + train.lines + val.lines, (train.digest, val.digest)
    return Corpus(train.docs, val.docs, first, (held or parts)[0].format, lines, train.weights, digests=digests)


def _streamed(options: PretrainData, tokenizer) -> Corpus:
    """A stream of the data sets' rows, but for those held out, with its first documents."""
    size = int(checks.held_out(options))
    held = read_all(options.val_data, (), options, tokenizer) + [_first_rows(path, options.split, size) for path in options.data if size]
    parts = [part for path in options.data for part in streaming.list_shards(path, split=options.split, skip=size)]
    encode = partial(_encode_block, options=options, tokenizer=tokenizer)
    shown, _ = next(streaming.micro_batches(parts, encode, rows=SHOWN, buffer=SHOWN, shuffle=False))
    val = encode_all(held, options, tokenizer, "held out")
    said = f"train: a stream of {len(parts)} files or shards, {options.streaming_multipack_buffer_size} rows at a time"
    first = held[0].rows.rows[0] if held else None
    # Where files are is no part of what they hold; which comes first is told by their names.
    places = [[os.path.basename(part.name) if len(parts) > 1 else "", *part.start] for part in parts]
    digests = (fingerprint.values(fingerprint.documents(shown), options.split, places), val.digest)
    return Corpus(shown, val.docs, first, "completion", [said, *val.lines], stream=Stream(parts, encode), digests=digests)


def _first_rows(path: str, split: str, size: int) -> Part:
    """The first rows of a data set that has more."""
    rows, _, _ = next(streaming.blocks(streaming.list_shards(path, split=split), buffer=size + 1, shuffle=False))
    if len(rows.rows) <= size:
        raise ValueError(f"val_set_size {size} holds out all {len(rows.rows)} rows of {path}: give a smaller number")
    return Part(sources.take(rows, range(size)), kinds.TEXT, "completion", {}, 1.0, "")


def _encode_block(rows: sources.Rows, *, options: PretrainData, tokenizer) -> list[Doc]:
    """Documents of some rows of a stream: none where all texts are blank, which is an error only for a whole data set."""
    texts = [row.get(options.text_column) for row in rows.rows]
    if all(isinstance(text, str) and not text.strip() for text in texts):
        return []
    own = {"field": options.text_column}
    return formats.encode_rows(rows, tokenizer, format="completion", own=own, sequence_len=options.sequence_len, overlong="split")[0]


def check_fits(docs: Docs, sequence_len: int, cfg: Config) -> None:
    """Raise ValueError when documents may be longer than the model's positions, or hold ids that its vocabulary lacks.

    Positions of a branch continue from its trunk, so a document with branches may hold more tokens than the model has positions.
    """
    if sequence_len > cfg.max_positions:
        raise ValueError(f"sequence_len {sequence_len} is longer than the {cfg.max_positions} positions of the model")
    longest = max(docs, key=_positions, default=None)
    if longest is not None and _positions(longest) > cfg.max_positions:
        raise ValueError(f"row {longest.row} has {_positions(longest)} positions, the model {cfg.max_positions}: lower sequence_len")
    largest = max((int(doc.tokens.max()) for doc in docs), default=0)
    if largest >= cfg.vocab_size:
        raise ValueError(f"the rows hold token id {largest}, the model has {cfg.vocab_size}: the tokenizer is of another model")


def _positions(doc: Doc | trees.TreeDoc) -> int:
    return max(trees.side_lengths(doc)) if isinstance(doc, trees.TreeDoc) else len(doc.tokens)


def batching(options: Options, micro_batch_size: int, longest: int | None = None) -> dict:
    """How documents form micro-batches: a token budget when packing, else a number of rows.

    longest: tokens of the longest document; a pair holds up to nearly twice sequence_len, and must fit in a micro-batch.
    """
    if options.sample_packing:
        return {"budget": max(micro_batch_size * options.sequence_len, longest or 0)}
    return {"rows": micro_batch_size}


def lengths(docs: Docs) -> list[int]:
    """Tokens of each document."""
    return [len(doc.tokens) for doc in docs]


def total_steps(docs: Docs, *, epochs: int, max_steps: int | None, **options) -> int:
    """Optimiser steps of a whole run: `max_steps` if given, else `epochs` times through the documents."""
    if max_steps is not None:
        return max_steps
    sizes = lengths(docs)
    return sum(loader.steps_per_epoch(sizes, epoch=epoch, **options) for epoch in range(epochs))
