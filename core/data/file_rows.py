"""Rows of one file, one at a time and from any position; shared by reading and streaming.

Places count from the start of the unpacked file: rows (lines of a line file) already read, and bytes where lines make that known.
"""

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

from treetune.core.data import arrow, files, jsontext
from treetune.core.data.rows import Row

BOM, BLANKS = b"\xef\xbb\xbf", b" \t\r\n"
LONGEST_LINE = 1 << 30  # bytes
MOST_BLANK = 10_000_000  # blank lines one after another, such as a file has that is nothing else
OTHER_MARKS = (";", "\t")  # what separates columns in files of some other programs
LONGEST_FIELD = min(1 << 30, sys.maxsize, (1 << 31) - 1)  # characters of a CSV field; csv keeps its limit in a C long


class ReadPosition(NamedTuple):
    """Position in a file: lines or rows already read, and bytes (0 where only rows are counted)."""

    row: int = 0
    offset: int = 0


class RowRecord(NamedTuple):
    """A row, its number in the file counted from 1 in `unit`s, and the bytes read when it was complete."""

    number: int
    row: Row
    offset: int
    unit: str


START = ReadPosition()


def iterate(file: files.File, place: ReadPosition = START) -> Iterator[RowRecord]:
    """The rows of a file from `place` on. Errors: ValueError of one line that names the file and the line or row."""
    with files.open_file(file) as stream:
        yield from READERS[file.kind](stream, file.name, place)


def _lines(stream: BinaryIO, name: str, place: ReadPosition) -> Iterator[tuple[int, bytes, int]]:
    """(number, line, bytes read with it)."""
    files.skip_bytes(stream, place.offset)
    offset = place.offset
    number = place.row
    while line := stream.readline(LONGEST_LINE + 1):
        number, offset = number + 1, offset + len(line)
        _check_length(line, name, number)
        yield number, line, offset


def _check_length(line: bytes | str, name: str, number: int) -> None:
    if len(line) > LONGEST_LINE:
        raise ValueError(f"{name} line {number} is longer than {LONGEST_LINE >> 30} GiB: expected one row per line")


def _check_blank(blank: int, name: str, number: int) -> None:
    if blank > MOST_BLANK:
        raise ValueError(f"{name}: {MOST_BLANK:,} lines before line {number} are blank: expected one row per line")


def _jsonl(stream: BinaryIO, name: str, place: ReadPosition) -> Iterator[RowRecord]:
    last = place.row
    for number, line, offset in _lines(stream, name, place):
        _check_blank(number - last, name, number)
        if line.strip(BOM + BLANKS):
            last = number
            location = f"{name} line {number}"
            yield RowRecord(number, _object(jsontext.parse(_text(line, location, first=number == 1), location), location), offset, "line")


def _text(data: bytes, location: str, *, first: bool) -> str:
    try:
        return data.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{location}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def _object(row: object, location: str) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"{location} is a {type(row).__name__}: expected an object with named fields")
    return row


def _json(stream: BinaryIO, name: str, place: ReadPosition) -> Iterator[RowRecord]:
    """A list of objects, or one object per line under the wrong suffix."""
    # By the first character and not by the suffix, since line files are also called .json.
    head = stream.read(files.CHUNK_BYTES)
    if head.lstrip(BOM + BLANKS).startswith(b"["):
        return islice(_json_list(head + stream.read(), name), place.row, None)
    if head.lstrip(BOM + BLANKS).splitlines()[:1] == [b"{"]:
        raise ValueError(f"{name} holds an object over several lines: expected a list of objects, or one object per line")
    if stream.seekable():
        stream.seek(0)
        return _jsonl(stream, name, place)
    return _jsonl(io.BytesIO(head + stream.read()), name, place)


def _json_list(data: bytes, name: str) -> Iterator[RowRecord]:
    for number, row in enumerate(jsontext.iterate_items(_text(data, name, first=True), name), 1):
        yield RowRecord(number, _object(row, f"{name} row {number}"), 0, "row")


def _csv(stream: BinaryIO, name: str, place: ReadPosition) -> Iterator[RowRecord]:
    """All values are text: nothing is guessed, "007" stays "007"."""
    import csv

    csv.field_size_limit(LONGEST_FIELD)  # a setting of the whole process; 131,072 by default
    reader = csv.DictReader(_csv_lines(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), name), strict=True)
    try:
        names = list(reader.fieldnames or ())
        _check_header(names, name)
        for number, row in enumerate(reader, 1):
            _check_width(row, names, f"{name} row {number}")
            if number > place.row:
                yield RowRecord(number, row, 0, "row")
    except csv.Error as error:
        raise ValueError(f"{name} line {reader.reader.line_num}: broken CSV ({error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def _csv_lines(text: io.TextIOBase, name: str) -> Iterator[str]:
    number = last = 0
    while line := text.readline(LONGEST_LINE + 1):
        number += 1
        _check_length(line, name, number)
        last = last if line.isspace() else number
        _check_blank(number - last, name, number)
        yield line


def _check_header(names: Sequence[str], name: str) -> None:
    if len(names) == 1 and (mark := next((mark for mark in OTHER_MARKS if mark in names[0]), None)) is not None:
        raise ValueError(f"{name} line 1: one column, {names[0]!r}: expected columns separated by commas, not by {mark!r}")
    if twice := jsontext.first_duplicate(names):
        raise ValueError(f"{name} line 1: the header has the column {twice!r} twice: rename one of them, or remove it")


def _check_width(row: dict[Any, Any], names: list[str], location: str) -> None:
    if None in row or None in row.values():
        count = sum(value is not None for key, value in row.items() if key is not None) + len(row.get(None) or [])
        raise ValueError(f"{location} has {count} values: expected {len(names)}, one per column of the header")


def _parquet(stream: BinaryIO, name: str, place: ReadPosition) -> Iterator[RowRecord]:
    return _numbered(arrow.read_parquet(stream, name, place.row))


def _arrow(stream: BinaryIO, name: str, place: ReadPosition) -> Iterator[RowRecord]:
    return _numbered(arrow.read_ipc(stream, name, place.row))


def _numbered(rows: Iterator[tuple[int, dict]]) -> Iterator[RowRecord]:
    for number, row in rows:
        yield RowRecord(number, row, 0, "row")


def _text_lines(stream: BinaryIO, name: str, place: ReadPosition) -> Iterator[RowRecord]:
    """One row per line, blank lines too, as the datasets library reads text."""
    for number, line, offset in _lines(stream, name, place):
        text = _text(line, f"{name} line {number}", first=number == 1)
        yield RowRecord(number, {"text": text.removesuffix("\n").removesuffix("\r")}, offset, "line")


def _document(stream: BinaryIO, name: str, place: ReadPosition) -> Iterator[RowRecord]:
    """The whole file as one row."""
    if place.row == 0:
        yield RowRecord(1, {"text": _text(stream.read(), name, first=True)}, 0, "row")


READERS: dict[str, Callable[[BinaryIO, str, ReadPosition], Iterator[RowRecord]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
    "text": _text_lines,
    "document": _document,
}
