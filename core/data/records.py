"""Rows out of one file, one at a time and from any place: what reading a file and streaming one share.

Places count from the start of the unpacked file: rows (lines of a line file) already read, and bytes where lines make that known.
"""

import io
import json
from collections.abc import Callable, Iterator
from itertools import islice
from typing import BinaryIO, NamedTuple

from treetune.core.data import files

BATCH_ROWS = 1024
BOM = b"\xef\xbb\xbf"


class Place(NamedTuple):
    """How much of a file has been read: lines or rows, and bytes (0 where only rows are counted)."""

    row: int = 0
    offset: int = 0


class Record(NamedTuple):
    """A row, its number in the file counted from 1 in `unit`s, and the bytes read when it was complete."""

    number: int
    row: dict
    offset: int
    unit: str


START = Place()


def iterate(file: files.File, place: Place = START) -> Iterator[Record]:
    """The rows of a file from `place` on. Errors: ValueError of one line that names the file and the line or row."""
    with files.opened(file) as stream:
        yield from READERS[file.kind](stream, file.name, place)


def _lines(stream: BinaryIO, place: Place) -> Iterator[tuple[int, bytes, int]]:
    """(number, line, bytes read with it)."""
    files.skip(stream, place.offset)
    offset = place.offset
    for number, line in enumerate(stream, place.row + 1):
        offset += len(line)
        yield number, line, offset


def _jsonl(stream: BinaryIO, name: str, place: Place) -> Iterator[Record]:
    for number, line, offset in _lines(stream, place):
        if line.strip():
            where = f"{name} line {number}"
            yield Record(number, _json_row(_text(line, where, first=number == 1), where), offset, "line")


def _text(data: bytes, where: str, *, first: bool) -> str:
    try:
        return data.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def _json_row(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: broken JSON ({error})") from error
    return _object(row, where)


def _object(row: object, where: str) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a {type(row).__name__}: expected an object with named fields")
    return row


def _json(stream: BinaryIO, name: str, place: Place) -> Iterator[Record]:
    """A list of objects, or one object per line under the wrong suffix."""
    head = stream.read(files.CHUNK_BYTES)
    if head.lstrip(BOM + b" \t\r\n").startswith(b"["):
        return islice(_json_list(head + stream.read(), name), place.row, None)
    if stream.seekable():
        stream.seek(0)
        return _jsonl(stream, name, place)
    return _jsonl(io.BytesIO(head + stream.read()), name, place)


def _json_list(data: bytes, name: str) -> Iterator[Record]:
    text = _text(data, name, first=True)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} line {error.lineno}: broken JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: broken JSON ({error})") from error
    for number, row in enumerate(rows, 1):
        yield Record(number, _object(row, f"{name} row {number}"), 0, "row")


def _csv(stream: BinaryIO, name: str, place: Place) -> Iterator[Record]:
    """All values are text: nothing is guessed, "007" stays "007"."""
    import csv

    reader = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), strict=True)
    try:
        for number, row in enumerate(reader, 1):
            _check_width(row, reader.fieldnames, f"{name} row {number}")
            if number > place.row:
                yield Record(number, row, 0, "row")
    except csv.Error as error:
        raise ValueError(f"{name} line {reader.reader.line_num}: broken CSV ({error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def _check_width(row: dict, names: list[str], where: str) -> None:
    if None in row or None in row.values():
        found = sum(value is not None for key, value in row.items() if key is not None) + len(row.get(None) or [])
        raise ValueError(f"{where} has {found} values: expected {len(names)}, one per column of the header")


def _parquet(stream: BinaryIO, name: str, place: Place) -> Iterator[Record]:
    """Row groups before the place are not read."""
    from pyarrow import ArrowException, parquet

    try:
        table, number = parquet.ParquetFile(stream), 0
        for group in range(table.num_row_groups):
            size = table.metadata.row_group(group).num_rows
            if number + size > place.row:
                yield from _rows(table.iter_batches(BATCH_ROWS, row_groups=[group]), number, place.row)
            number += size
    except (ArrowException, UnicodeDecodeError, MemoryError) as error:  # a damaged length asks for any amount of memory
        raise ValueError(f"{name}: not a readable parquet file ({files.reason(error)})") from error


def _arrow(stream: BinaryIO, name: str, place: Place) -> Iterator[Record]:
    """Arrow's IPC stream, as the datasets library writes it, or its file format."""
    from pyarrow import ArrowException, ipc

    try:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if is_file:
            table = ipc.open_file(stream)
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            batches = ipc.open_stream(stream)
        yield from _rows(batches, 0, place.row)
    except (ArrowException, UnicodeDecodeError, MemoryError) as error:  # a damaged length asks for any amount of memory
        raise ValueError(f"{name}: not a readable arrow file ({files.reason(error)})") from error


def _rows(batches: Iterator, number: int, skip: int) -> Iterator[Record]:
    """Rows of record batches after row `skip`; `number` rows precede them."""
    for batch in batches:
        batch.validate(full=True)  # a damaged buffer would otherwise be read out of bounds
        first = max(0, skip - number)
        if first < batch.num_rows:
            for i, row in enumerate(batch.slice(first).to_pylist(), number + first + 1):
                yield Record(i, row, 0, "row")
        number += batch.num_rows


def _text_lines(stream: BinaryIO, name: str, place: Place) -> Iterator[Record]:
    """One row per line, blank lines too, as the datasets library reads text."""
    for number, line, offset in _lines(stream, place):
        text = _text(line, f"{name} line {number}", first=number == 1)
        yield Record(number, {"text": text.removesuffix("\n").removesuffix("\r")}, offset, "line")


def _document(stream: BinaryIO, name: str, place: Place) -> Iterator[Record]:
    """The whole file as one row."""
    if place.row == 0:
        yield Record(1, {"text": _text(stream.read(), name, first=True)}, 0, "row")


READERS: dict[str, Callable[[BinaryIO, str, Place], Iterator[Record]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
    "text": _text_lines,
    "document": _document,
}
