"""From rows to documents: read the data sets, split, encode, and say what became of the rows."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

from treetune.core import fields
from treetune.core.data import (
    cache,
    chat_templates,
    custom,
    dataset,
    dedup,
    fingerprint,
    formats,
    kinds,
    loader,
    nested,
    reporting,
    sources,
    strides,
    suggest,
    template_date,
    trees,
    workers,
)
from treetune.core.data.dataset import Dataset, Docs, Refuse, RowSettings
from treetune.core.protocols import Tokenizer

OWN_KEYS = {"path", "type", "train_on_split", "weight", "text_column"}  # of an entry of `datasets`, besides the source's and the format's
# Options of all data sets that formats may take.
FOR_ROWS = ("chat_template", "chat_template_kwargs", "default_system_message", "roles_to_train", "train_on_eos", "train_on_inputs")
RAW = {"completion", *strides.SPLIT}


class DataSetRows(NamedTuple):
    """The rows of one data set, their kind and format, and the encoder's options that were given for this data set alone."""

    rows: sources.Rows
    kind: kinds.DatasetSpec
    format: str
    options: dict[str, Any]
    weight: float
    digest: str = ""  # of the bytes and choices behind the rows; empty where nothing is kept
    transform: Callable[[sources.Rows], sources.Rows] | None = None  # of the user's, which the rows went through


def _read(entry: Mapping[str, Any], settings: RowSettings, tokenizer: Tokenizer, kind: kinds.DatasetSpec) -> DataSetRows:
    """The data set that one mapping describes."""
    split = {"split": entry["train_on_split"]} if "train_on_split" in entry else {}
    rows, is_cached = dataset.read_source(entry, settings, **split), settings.prepared_folder is not None
    part = describe(rows, entry, settings, tokenizer, kind)
    if not is_cached:
        return part
    if part.transform is not None:
        return part._replace(digest=custom.digest_rows(part.rows))
    return part._replace(digest=sources.digest_source(entry.get("path"), **dataset.source_options(entry, settings) | split))


def describe(
    rows: sources.Rows, entry: Mapping[str, Any], settings: RowSettings, tokenizer: Tokenizer, kind: kinds.DatasetSpec
) -> DataSetRows:
    """Rows of the data set that one mapping describes, with its format; what is no key of its own here goes to the encoder."""
    if settings.text_column is not None:
        if len(columns := {entry[key] for key in ("text_column", "field") if key in entry}) > 1:
            raise ValueError(f"datasets: {entry.get('path')} has text_column and field, two names of one thing: give one")
        options = {"field": next(iter(columns), settings.text_column)}
        return DataSetRows(lifted(rows, options), kind, "completion", options, _weight(entry))
    options = {key: value for key, value in entry.items() if key not in dataset.SOURCE_KEYS | OWN_KEYS}
    options |= entry["type"] if isinstance(entry.get("type"), dict) else {}
    named = entry.get("type", None if settings.format == "auto" else settings.format)
    if custom.is_path(named, kind.names):
        transform = partial(custom.apply_transform, transform=custom.load_transform(named, entry), tokenizer=tokenizer)
        rows = lifted(transform(rows), options)
        return DataSetRows(rows, kind, _detect(rows, kind), options, _weight(entry), transform=transform)
    rows = lifted(rows, options)
    return DataSetRows(rows, kind, _format(entry, settings, rows, kind), options, _weight(entry))


def lifted(rows: sources.Rows, options: Mapping[str, Any]) -> sources.Rows:
    """The rows with the columns that options name inside others."""
    return nested.lifted(rows, [value for key, value in options.items() if key.startswith("field")])


def _weight(entry: Mapping[str, Any]) -> float:
    weight = entry.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise ValueError(f"the weight of {entry.get('path')} is {weight!r}; expected a number above 0: 2 reads its rows twice an epoch")
    return float(weight)


def _format(entry: Mapping[str, Any], settings: RowSettings, rows: sources.Rows, kind: kinds.DatasetSpec) -> str:
    """As named for the data set, else for all, else by the columns. Found before any split: a part may lack a column."""
    if "type" in entry and entry["type"] is None:
        return kind.canonical("pretokenised")
    if isinstance(entry.get("type"), dict):
        return kind.canonical("user_defined")
    named = entry.get("type") or (None if settings.format == "auto" else settings.format)
    return _detect(rows, kind) if named is None else kind.canonical(named)


def _detect(rows: sources.Rows, kind: kinds.DatasetSpec) -> str:
    columns = sources.columns(rows)
    try:
        return kind.detect(columns, rows.rows[0])
    except ValueError as error:
        entry = suggest.suggest_entry(rows.name, kind.name, columns, rows.rows[0])
        fix = f"; a file for --config with this would read them: {entry}" if entry else ""
        raise ValueError(f"{rows.name}: {error}{fix}") from error


def read_all(entries: list[dict[str, Any]], settings: RowSettings, tokenizer: Tokenizer, kind: kinds.DatasetSpec) -> list[DataSetRows]:
    """The rows of each entry of `datasets`."""
    return [_read(entry, settings, tokenizer, kind) for entry in entries]


def _taken(part: DataSetRows) -> tuple[str, ...]:
    return part.kind.takes(part.format, part.rows.rows[0])


def _encoding(settings: RowSettings, part: DataSetRows) -> dict[str, Any]:
    """Those of the options of all data sets that this one's format takes."""
    if settings.text_column is not None:
        return {}
    taken = _taken(part)
    return {key: settings.encoding[key] for key in FOR_ROWS if key in settings.encoding and key in taken}


def unused_options(settings: RowSettings, parts: list[DataSetRows]) -> dict[str, str]:
    """{option that the rows of these data sets would ignore: the reason}."""
    given: dict[str, str] = dict.fromkeys(("data", "format"), "datasets is given") if settings.datasets else {}
    if settings.text_column is not None:
        return given
    names, taken = {part.format for part in parts}, {key for part in parts for key in _taken(part)}
    unused = {key: f"rows of format {', '.join(sorted(names))} do not take it" for key in FOR_ROWS if key not in taken}
    return unused | given | ({"overlong": "raw text is split, not dropped"} if names <= RAW else {})


class EncodedRows(NamedTuple):
    """Documents of several data sets, with rows numbered through and the weight of each, a line about each set, and its report."""

    docs: Docs
    weights: list[float] | None
    lines: list[str]
    reports: list[formats.TextReport] | list[trees.TreeReport]
    digest: str = ""  # fingerprint of the documents with their weights


def encode_all(parts: list[DataSetRows], settings: RowSettings, tokenizer: Tokenizer, label: str, **working: Any) -> EncodedRows:
    """Encode each data set in its format with the options of all and its own; `working`: `processes`, `progress` of core.data.workers.

    Errors: ValueError for bad rows, and for data sets that cannot share a batch.
    """
    docs: list[Any] = []
    lines, reports, counts, digests, offset = [], [], [], [], 0
    for part in parts:
        encoded, report, digest, prepared = _encode(part, settings, tokenizer, **working)
        if docs and (names := kinds.differing_extras(docs[0], encoded[0])):
            which = f"only one has the field {', '.join(names)}"
            raise ValueError(f"{part.rows.name} and {parts[0].rows.name}: {which}: fill it in both or in none")
        docs += [doc._replace(row=doc.row + offset) for doc in encoded]
        digests.append([digest, offset, part.weight])
        offset += max(part.rows.numbers, default=0) + 1
        lines.append(f"{label} {part.rows.name}: {part.kind.describe(report)}{' (prepared earlier)' * prepared}")
        lines += [f"! {part.rows.name}: {text}" for text in reporting.find_warnings(report)]
        reports.append(report)
        counts.append(len(encoded))
    weights = loader.document_weights(counts, [part.weight for part in parts])
    return EncodedRows(docs, weights, lines, reports, fingerprint.values(digests))


def _encode(
    part: DataSetRows, settings: RowSettings, tokenizer: Tokenizer, *, processes: int = 1, **working: Any
) -> tuple[Docs, Any, str, bool]:
    """Documents, report and fingerprint of one data set, and whether they were prepared earlier."""
    options, sizes = encoding_of(part, settings)
    folder, key = settings.prepared_folder, ""
    if folder is not None:
        choices = {"kind": part.kind.name, "format": part.format, "given": options, "numbers": part.rows.numbers, **sizes}
        template = chat_templates.resolve(tokenizer, options["chat_template"]) if options.get("chat_template") else None
        if chat_templates.writes_date(template or str(tokenizer.chat_template)):
            choices["date"] = template_date.chosen()
        key = cache.entry_key(data=[part.digest], tokenizer=tokenizer, template=template, options=json.loads(json.dumps(choices)))
        if (entry := cache.load_entry(folder, key)) is not None:
            docs, reported = entry
            report, digest = cast(tuple[Any, str], reported)
            return docs, report, digest, True
    working |= {"processes": processes, "kind": part.kind}
    with fields.reading(f"{part.rows.name}, read as {part.format},"):
        docs, report = workers.encode_rows(part.rows, tokenizer, format=part.format, format_options=options, **sizes, **working)
    digest = fingerprint.documents(docs)
    if folder is not None:
        cache.save_entry(folder, key, docs, [report, digest])
    return docs, report, digest, False


def encoding_of(part: DataSetRows, settings: RowSettings) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the format, and how long documents may be, for the rows of a data set."""
    policy = "split" if part.format == "completion" else settings.overlong or part.kind.fallback_overlong
    return _encoding(settings, part) | part.options, {"sequence_len": settings.sequence_len, "overlong": policy}


def _without_duplicates(train: list[DataSetRows], val: list[DataSetRows]) -> tuple[list[DataSetRows], list[DataSetRows], list[str]]:
    """The data sets without repeated rows, training rows first, and a line where rows went."""
    parts = train + val
    rows, counts = dedup.drop_duplicates([part.rows for part in parts])
    parts = [part._replace(rows=unique) for part, unique in zip(parts, rows, strict=True)]
    lines = [f"{part.rows.name}: {count} repeated rows left out" for part, count in zip(parts, counts, strict=True) if count]
    train, val = ([part for part in side if part.rows.rows] for side in (parts[: len(train)], parts[len(train) :]))
    return train, val, lines


def read_and_encode(kind: kinds.DatasetSpec, settings: RowSettings, tokenizer: Tokenizer, *, refuse: Refuse, **working: Any) -> EncodedRows:
    """All documents of the data sets, for commands that hold nothing out."""
    parts = read_all(settings.training_entries(), settings, tokenizer, kind)
    refuse(unused_options(settings, parts))
    parts, _, lines = _without_duplicates(parts, []) if settings.drop_duplicates else (parts, [], [])
    encoded = encode_all(parts, settings, tokenizer, "rows of", **working)
    kind.check(encoded.docs)
    return encoded._replace(lines=lines + encoded.lines)


def load(kind: kinds.DatasetSpec, settings: RowSettings, tokenizer: Tokenizer, *, seed: int, refuse: Refuse) -> Dataset:
    """Documents for training and evaluation. Errors: ValueError naming file, row and fix; what `refuse` raises."""
    parts = read_all(settings.training_entries(), settings, tokenizer, kind)
    val_parts = read_all(settings.held_out_entries(), settings, tokenizer, kind)
    refuse(unused_options(settings, parts + val_parts))
    parts, val_parts, repeated = _without_duplicates(parts, val_parts) if settings.drop_duplicates else (parts, val_parts, [])
    if not val_parts and settings.val_set_size:
        key = None if kind.read is None else kinds.prompt_key  # an answer to a question that was trained on tells little
        train_rows, val_rows = dataset.hold_out([part.rows for part in parts], settings.val_set_size, seed, key=key)
        val_parts = [part._replace(rows=rows) for part, rows in zip(parts, val_rows, strict=True)]
        parts = [part._replace(rows=rows) for part, rows in zip(parts, train_rows, strict=True)]
    train, val = encode_all(parts, settings, tokenizer, "train"), encode_all(val_parts, settings, tokenizer, "held out")
    kind.check(train.docs)
    first = first_row(val_parts, settings)
    lines, digests = repeated + train.lines + val.lines, (train.digest, val.digest)
    return Dataset(train.docs, val.docs, first, (val_parts or parts)[0].format, lines, train.weights, digests=digests)


def first_row(parts: list[DataSetRows], settings: RowSettings) -> dict[str, Any] | None:
    """The first held-out row; of raw text with its text in the column of all data sets, whatever its own is called."""
    if not parts:
        return None
    row, column = parts[0].rows.rows[0], settings.text_column
    return row if column is None else {**row, column: row.get(parts[0].options["field"])}
