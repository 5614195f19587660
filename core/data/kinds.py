"""What a command trains on: texts, pairs, judged completions, pairs to rank, or steps. One table, from rows to documents.

A `DatasetSpec` puts the formats of a kind in `row_formats` and the encoders of `formats`, `trees`, `reward` and `strides` behind the same
functions.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from treetune.core.data import formats, reporting, reward, row_formats, sources, strides, trees, unpaired

QUESTIONS = ("prompt", "input", "question", "instruction")


class DatasetSpec(NamedTuple):
    """How rows of one kind are known, named, encoded and reported."""

    name: str
    formats: str  # their kind in `row_formats`
    detect: Callable[..., str]  # (columns, row=None) -> format; ValueError when the columns do not tell
    takes: Callable[..., tuple[str, ...]]  # (format, row=None) -> options that its rows take
    canonical: Callable[[str], str]  # a name as users write it -> format; ValueError listing all for an unknown one
    encode: Callable[..., tuple[list, Any]]  # (rows, tokenizer, *, format, own, sequence_len, overlong, progress) -> (docs, report)
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


def _detect(kind: str, columns: Sequence[str], row: Mapping | None = None) -> str:
    """The format that the columns mean, with the first row to tell texts from conversations where both have the same columns.

    Formats of a fixed wording that share their columns with others must be named. Errors: ValueError listing all that is known.
    """
    tried = row_formats.ranked(kind)
    for one in tried:
        needed, name = one.columns[0], one.name
        if set(needed) <= set(columns) and (name != "chat_template.argilla" or _converses(columns, row)):
            return "chat_template.argilla" if "chosen" in needed and row is not None and _is_whole(name, row) else name
    named = {name: one for name, one in row_formats.of_kind(kind).items() if one.rank is None and not name.startswith("user_defined")}
    fitting = [name for name, one in named.items() if set(one.columns[0]) <= set(columns)]
    if len(fitting) == 1:
        return fitting[0]
    needs = "; ".join(f"{one.name} needs {' + '.join(one.columns[0])}" for one in tried)
    must = ", ".join(fitting or named)
    fix = "name one of the formats with these columns" if fitting else "rename columns, or name one of the other formats"
    raise ValueError(f"the columns {sources.join_names(columns)} do not tell the format: {needs}; {fix}{f': {must}' * bool(must)}")


def _is_whole(name: str, row: Mapping) -> bool:
    """Whether chosen and rejected hold the question too, though other columns would do: a `prompt` as text, or `messages` of one side."""
    sides = [row.get("chosen"), row.get("rejected")]
    if name == "chat_template.default":
        return row.get("messages") in sides and all(isinstance(side, list) and len(side) > 1 for side in sides)
    return name == "passthrough" and isinstance(row.get("prompt"), str) and isinstance(row.get("chosen"), list)


def _converses(columns: Sequence[str], row: Mapping | None) -> bool:
    """Whether chosen and rejected are whole conversations."""
    return isinstance(row.get("chosen"), list) if row is not None else not set(QUESTIONS) & set(columns)


def _takes(kind: str, name: str, row: Mapping | None = None) -> tuple[str, ...]:
    """Options of a format. row: the first one, which tells whether passthrough rows are texts or messages."""
    known = row_formats.of_kind(kind)[_canonical(kind, name)]
    return tuple(one for one in known.options if one not in row_formats.CHAT or not _is_plain(name, row))


def _is_plain(name: str, row: Mapping | None) -> bool:
    """Whether passthrough rows are texts, which no chat template writes."""
    if name != "passthrough" or row is None:
        return False
    return not isinstance(row.get("prompt"), list) and not (row.get("prompt") is None and isinstance(row.get("chosen"), list))


def _canonical(kind: str, name: str) -> str:
    """The format of a name: `chatml` is chatml.default, `bradley_terry` bradley_terry.chat_template, `zephyr` its only format."""
    table = row_formats.of_kind(kind)
    under = [known for known in table if known.startswith(f"{name}.")]
    choices = [name, f"{name}.default", f"{name}.chat_template", *(under if len(under) == 1 else ())]
    choice = next((choice for choice in choices if choice in table), None)
    if choice is None:
        raise ValueError(f"unknown format {name!r}: expected one of {', '.join(table)}")
    return choice


def _reader(kind: str, name: str, own: Mapping, rows: sources.Rows) -> tuple[Callable, dict]:
    """(the format's reader, options for the chat template). Errors: ValueError for an option that the format does not take."""
    known = _takes(kind, name, rows.rows[0])
    if extra := [key for key in own if key not in known]:
        rows_of = " of plain text" * _is_plain(name, rows.rows[0])
        raise ValueError(f"format {name}{rows_of} takes no {', '.join(extra)}; it takes {', '.join(known) or 'no options'}")
    make, chat = row_formats.of_kind(kind)[name].reader, row_formats.CHAT
    return make(**{key: own[key] for key in own if key not in chat}), {key: own[key] for key in chat if key in own}


def _counting(read: Callable, progress: Callable[[int], None]) -> Callable:
    def counted(row: dict, where: str):
        progress(1)
        return read(row, where)

    return counted


def _encode_trees(
    kind: str,
    rows: sources.Rows,
    tokenizer,
    *,
    format: str,
    own: Mapping | None = None,
    sequence_len: int | None = None,
    overlong: str | None = None,
    progress: Callable[[int], None] = lambda rows: None,
    foreign: bool = False,
) -> tuple[list[trees.TreeDoc], trees.Report]:
    """Documents with a branch for each continuation. foreign: give each row a second continuation from another row, of kind 1."""
    read, chat = _reader(kind, format, own or {}, rows)
    rows = sources.track_reads(rows)
    read = unpaired.mismatched(rows, read) if foreign else read
    lengths = {"sequence_len": sequence_len, "overlong": overlong or "drop"}
    docs, report = trees.encode_rows(rows, _counting(read, progress), tokenizer, name=format, distinct=not foreign, **lengths, **chat)
    return docs, with_unread(report, rows)


def with_unread(report: trees.Report, rows: sources.Rows) -> trees.Report:
    """The report with the columns that no reader looked at. Errors: ValueError for a system text among them."""
    unread = sources.unread_columns(rows)
    if sources.SYSTEM in unread:
        raise sources.unplaced_system(rows, unread[sources.SYSTEM], report.format)
    return report._replace(unread=(*unread, *report.unread))


def _encode_steps(
    rows: sources.Rows,
    tokenizer,
    *,
    format: str,
    own: Mapping | None = None,
    sequence_len: int | None = None,
    overlong: str | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> tuple[list[trees.TreeDoc], trees.Report]:
    read, _ = _reader("steps", format, own or {}, rows)
    rows = sources.track_reads(rows)
    lengths = {"sequence_len": sequence_len, "overlong": overlong or "drop"}
    docs, report = reward.encode_steps(rows, _counting(read, progress), tokenizer, name=format, **lengths)
    return docs, with_unread(report, rows)


def _merged(reports: Sequence[trees.Report]) -> trees.Report:
    """One report of the parts of a data set."""
    sums, dropped = {}, Counter()
    for name in trees.Report._fields:
        values = [getattr(report, name) for report in reports]
        if isinstance(values[0], int):
            sums[name] = max(values) if name == "longest" else sum(values)
    for report in reports:
        dropped.update(report.dropped)
    return reports[0]._replace(**sums, dropped=dict(dropped), **reporting.merge_fields(reports))


def prompt(row: Mapping) -> str:
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
        trees.describe,
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
    formats.describe,
    formats.merged,
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
        strides.describe,
        strides.merged,
        partial(strides.check, places=places) if blocks else _any,
        None,
        "truncate",
        None,
    )


KINDS: dict[str, DatasetSpec] = {
    "text": TEXT,
    "pairs": _of_trees("pairs"),
    "unpaired": _of_trees("unpaired", encode=partial(_encode_trees, "unpaired", foreign=True), check=_both_classes, in_parts=None),
    "judged": _of_trees("judged", check=_both_classes),
    "ranked": _of_trees("ranked", read="last"),
    "steps": _of_trees("steps", encode=_encode_steps, read="classes"),
    "strided": strided(strides.Places()),
}
