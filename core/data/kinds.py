"""What a command trains on: texts, pairs, judged completions, pairs to rank, or steps. One table, from rows to documents.

A `DatasetSpec` puts the formats of a kind in `row_formats` and the encoders of `formats`, `trees`, `reward` and `strides` behind the same
functions.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from treetune.core.data import formats, reporting, reward, row_formats, sources, strides, trees, unpaired
from treetune.core.data.rows import Advance, Row
from treetune.core.protocols import Tokenizer

QUESTIONS = ("prompt", "input", "question", "instruction")
FOREIGN = ("unpaired",)  # kinds whose rows get the completion of another row, of which KTO's baseline is made


class Encode(Protocol):
    """Documents of rows, and the report on them."""

    def __call__(
        self,
        rows: sources.Rows,
        tokenizer: Tokenizer,
        *,
        format: str,
        format_options: Mapping[str, Any] | None = None,
        sequence_len: int | None = None,
        overlong: str | None = None,
        progress: Advance = ...,
    ) -> tuple[list, Any]:
        """Documents in the order of the rows; format_options: those that the format takes, by whatever name."""
        ...


class DatasetSpec(NamedTuple):
    """How rows of one kind are known, named, encoded and reported."""

    name: str
    formats: str  # their kind in `row_formats`
    detect: Callable[..., str]  # (columns, row=None) -> format; ValueError when the columns do not tell
    takes: Callable[..., tuple[str, ...]]  # (format, row=None) -> options that its rows take
    canonical: Callable[[str], str]  # a name as users write it -> format; ValueError listing all for an unknown one
    encode: Callable[
        ..., tuple[list, Any]
    ]  # (rows, tokenizer, *, format, format_options, sequence_len, overlong, progress) -> (docs, report)
    describe: Callable[[Any], str]
    merged: Callable[[Sequence], Any]  # the reports of parts of the rows -> one
    check: Callable[[Sequence], None]  # ValueError when one cannot train on all these documents
    read: str | None  # what `pack.collate_trees` reads of the documents; None: they are plain, for `pack.collate`
    fallback_overlong: str  # what happens to documents longer than sequence_len where nothing is said
    in_parts: dict | None  # options to encode a part of the rows by itself; None: rows depend on each other

    @property
    def names(self) -> tuple[str, ...]:
        """Of all its formats."""
        return tuple(row_formats.of_kind(self.formats))


def _detect(kind: str, columns: Sequence[str], row: Mapping[str, Any] | None = None) -> str:
    """The format that the columns mean, with the first row to tell texts from conversations where both have the same columns.

    Formats of a fixed wording that share their columns with others must be named. Errors: ValueError listing all that is known.
    """
    candidates = row_formats.detect_order(kind)
    for row_format in candidates:
        needed, name = row_format.columns[0], row_format.name
        if set(needed) <= set(columns) and (name != "chat_template.argilla" or _converses(columns, row)):
            return "chat_template.argilla" if "chosen" in needed and row is not None and _is_whole(name, row) else name
    others = {
        name: row_format
        for name, row_format in row_formats.of_kind(kind).items()
        if row_format.rank is None and not name.startswith("user_defined")
    }
    fitting = [name for name, row_format in others.items() if set(row_format.columns[0]) <= set(columns)]
    if len(fitting) == 1:
        return fitting[0]
    needs = "; ".join(f"{row_format.name} needs {' + '.join(row_format.columns[0])}" for row_format in candidates)
    must = ", ".join(fitting or others)
    fix = "name one of the formats with these columns" if fitting else "rename columns, or name one of the other formats"
    raise ValueError(f"the columns {sources.join_names(columns)} do not tell the format: {needs}; {fix}{f': {must}' * bool(must)}")


def _is_whole(name: str, row: Mapping[str, Any]) -> bool:
    """Whether chosen and rejected hold the question too, though other columns would do: a `prompt` as text, or `messages` of one side."""
    sides = [row.get("chosen"), row.get("rejected")]
    if name == "chat_template.default":
        return row.get("messages") in sides and all(isinstance(side, list) and len(side) > 1 for side in sides)
    return name == "passthrough" and isinstance(row.get("prompt"), str) and isinstance(row.get("chosen"), list)


def _converses(columns: Sequence[str], row: Mapping[str, Any] | None) -> bool:
    """Whether chosen and rejected are whole conversations."""
    return isinstance(row.get("chosen"), list) if row is not None else not set(QUESTIONS) & set(columns)


def _takes(kind: str, name: str, row: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """Options of a format. row: the first one, which tells whether passthrough rows are texts or messages."""
    row_format = row_formats.of_kind(kind)[_canonical(kind, name)]
    return tuple(option for option in row_format.options if option not in row_formats.CHAT or not _is_plain(name, row))


def _is_plain(name: str, row: Mapping[str, Any] | None) -> bool:
    """Whether passthrough rows are texts, which no chat template writes."""
    if name != "passthrough" or row is None:
        return False
    return not isinstance(row.get("prompt"), list) and not (row.get("prompt") is None and isinstance(row.get("chosen"), list))


def _canonical(kind: str, name: str) -> str:
    """The format of a name: `chatml` is chatml.default, `bradley_terry` bradley_terry.chat_template, `zephyr` its only format."""
    table = row_formats.of_kind(kind)
    under = [format_name for format_name in table if format_name.startswith(f"{name}.")]
    choices = [name, f"{name}.default", f"{name}.chat_template", *(under if len(under) == 1 else ())]
    choice = next((choice for choice in choices if choice in table), None)
    if choice is None:
        raise ValueError(f"unknown format {name!r}: expected one of {', '.join(table)}")
    return choice


def _reader(kind: str, name: str, format_options: Mapping[str, Any], rows: sources.Rows) -> tuple[Callable, dict]:
    """(the format's reader, options for the chat template). Errors: ValueError for an option that the format does not take."""
    names = _takes(kind, name, rows.rows[0])
    if extra := [key for key in format_options if key not in names]:
        rows_of = " of plain text" * _is_plain(name, rows.rows[0])
        raise ValueError(f"format {name}{rows_of} takes no {', '.join(extra)}; it takes {', '.join(names) or 'no options'}")
    make, chat = row_formats.of_kind(kind)[name].reader, row_formats.CHAT
    return make(**{key: format_options[key] for key in format_options if key not in chat}), {
        key: format_options[key] for key in chat if key in format_options
    }


def _counting(read: Callable, progress: Advance) -> Callable:
    def counted(row: Row, location: str):
        progress(1)
        return read(row, location)

    return counted


def _encode_trees(
    kind: str,
    rows: sources.Rows,
    tokenizer: Tokenizer,
    *,
    format: str,
    format_options: Mapping[str, Any] | None = None,
    sequence_len: int | None = None,
    overlong: str | None = None,
    progress: Advance = lambda rows: None,
) -> tuple[list[trees.TreeDoc], trees.TreeReport]:
    """Documents with a branch for each continuation; for kinds of FOREIGN, each row has one more from another row."""
    read, template = _reader(kind, format, format_options or {}, rows)
    rows, foreign = sources.track_reads(rows), kind in FOREIGN
    read = unpaired.add_foreign_replies(rows, read) if foreign else read
    lengths = {"sequence_len": sequence_len, "overlong": overlong or "drop"}
    docs, report = trees.encode_rows(rows, _counting(read, progress), tokenizer, name=format, distinct=not foreign, **lengths, **template)
    return docs, with_unread(report, rows)


def with_unread(report: trees.TreeReport, rows: sources.Rows) -> trees.TreeReport:
    """The report with the columns that no reader looked at. Errors: ValueError for a system text among them."""
    unread = sources.unread_columns(rows)
    if sources.SYSTEM in unread:
        raise sources.unplaced_system(rows, unread[sources.SYSTEM], report.format)
    return report._replace(unread=(*unread, *report.unread))


def _encode_steps(
    rows: sources.Rows,
    tokenizer: Tokenizer,
    *,
    format: str,
    format_options: Mapping[str, Any] | None = None,
    sequence_len: int | None = None,
    overlong: str | None = None,
    progress: Advance = lambda rows: None,
) -> tuple[list[trees.TreeDoc], trees.TreeReport]:
    read, _ = _reader("steps", format, format_options or {}, rows)
    rows = sources.track_reads(rows)
    lengths = {"sequence_len": sequence_len, "overlong": overlong or "drop"}
    docs, report = reward.encode_steps(rows, _counting(read, progress), tokenizer, name=format, **lengths)
    return docs, with_unread(report, rows)


def _merged(reports: Sequence[trees.TreeReport]) -> trees.TreeReport:
    """One report of the parts of a data set."""
    sums, dropped = {}, Counter()
    for name in trees.TreeReport._fields:
        values = [getattr(report, name) for report in reports]
        if isinstance(values[0], int):
            sums[name] = max(values) if name == "longest" else sum(values)
    for report in reports:
        dropped.update(report.dropped)
    return reports[0]._replace(**sums, dropped=dict(dropped), **reporting.merge_fields(reports))


def prompt_key(row: Mapping[str, Any]) -> str:
    """What rows about the same question have in common: their prompt, under any of its names, or the start of their conversation."""
    name = next((name for name in ("messages", *QUESTIONS) if row.get(name) is not None), None)
    talk = row.get("chosen")
    value = row[name] if name else talk[:-1] if isinstance(talk, list) else sorted(row)
    return json.dumps(value, sort_keys=True, default=repr)


def differing_extras(one: Any, other: Any) -> list[str]:
    """The extras that only one of two documents has."""
    return sorted(set(getattr(one, "extras", ())) ^ set(getattr(other, "extras", ())))


def same_extras(docs: Sequence) -> bool:
    """Whether all documents have the same extras, so that any of them can share a batch."""
    return len({frozenset(getattr(doc, "extras", ())) for doc in docs}) <= 1


def _any(docs: Sequence) -> None:
    """Every document by itself is one to learn from."""


def _both_classes(docs: Sequence[trees.TreeDoc]) -> None:
    good = sum(bool(doc.extras["desirable"][0]) for doc in docs)
    bad = len(docs) - good
    if docs and not (good and bad):
        missing, fix = ("false", ", or train on these with sft") if good else ("true", "")
        raise ValueError(
            f"{good} rows are desirable (label true) and {bad} undesirable (label false): expected some of both; "
            f"add rows with label {missing}{fix}"
        )


def _text_names(name: str) -> str:
    name = formats.ALIASES.get(name, name)
    formats.takes(name)
    return name


def _of_trees(name: str, **changes: Any) -> DatasetSpec:
    start = DatasetSpec(
        name,
        name,
        partial(_detect, name),
        partial(_takes, name),
        partial(_canonical, name),
        partial(_encode_trees, name),
        trees.describe_trees,
        _merged,
        _any,
        "tokens",
        "drop",
        {},
    )
    return start._replace(**changes)


TEXT = DatasetSpec(
    "text",
    "text",
    lambda columns, row=None: formats.detect(columns),
    lambda name, row=None: formats.takes(name),
    _text_names,
    formats.encode_rows,
    formats.describe_texts,
    formats.merge_text_reports,
    _any,
    None,
    "split",
    {"may_be_empty": True},
)


def strided(places: strides.Places, *, blocks: bool = False) -> DatasetSpec:
    """Documents for strided rollouts with blocks at these places; blocks: it is an error when no document has one.

    The name holds what documents depend on, for the folder of prepared ones.
    """
    return DatasetSpec(
        f"strided {tuple(places)}",
        "strided",
        strides.detect,
        strides.takes,
        strides.canonical,
        partial(strides.encode_rows, places=places),
        strides.describe_strided,
        strides.merge_strided_reports,
        partial(strides.check_blocks, places=places) if blocks else _any,
        None,
        "truncate",
        None,
    )


KINDS: dict[str, DatasetSpec] = {
    "text": TEXT,
    "pairs": _of_trees("pairs"),
    "unpaired": _of_trees("unpaired", check=_both_classes, in_parts=None),
    "judged": _of_trees("judged", check=_both_classes),
    "ranked": _of_trees("ranked", read="last"),
    "steps": _of_trees("steps", encode=_encode_steps, read="classes"),
    "strided": strided(strides.Places()),
}
