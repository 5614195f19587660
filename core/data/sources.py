"""Rows: where they come from, and how errors name them.

A source becomes `Rows`: plain dicts, each with its number in the source (1-based: the line of a jsonl file, the row of any other).
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from treetune.core.data import order

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Rows(NamedTuple):
    """Dataset rows with their numbers in the source, counted from 1 in `unit`s ("line" or "row")."""

    name: str
    rows: list[dict]
    numbers: list[int]
    unit: str = "row"


def from_list(rows: Sequence[dict], name: str = "rows") -> Rows:
    """Rows held in memory, numbered from 1."""
    return Rows(name, list(rows), list(range(1, len(rows) + 1)))


def where(rows: Rows, i: int) -> str:
    """How an error names row `i`: "data.jsonl line 3"."""
    return f"{rows.name} {rows.unit} {rows.numbers[i]}"


def take(rows: Rows, indices: Sequence[int]) -> Rows:
    """The rows at `indices`, numbers kept."""
    return rows._replace(rows=[rows.rows[i] for i in indices], numbers=[rows.numbers[i] for i in indices])


def columns(rows: Rows) -> list[str]:
    """Every field that some row has, in order of first appearance."""
    return list(dict.fromkeys(key for row in rows.rows for key in row))


def listed(names: Iterable[str]) -> str:
    """Field names or roles in one line of an error: odd ones quoted, "none" for no names."""
    return ", ".join(name if name.isprintable() and name.strip() else repr(name) for name in names) or "none"


def read(path: str, *, split: str = "train", name: str | None = None, limit: int | None = None) -> Rows:
    """Rows of a local .jsonl, .json, .parquet or .csv file, or of a Hugging Face dataset `owner/name`.

    `name` is the dataset's configuration and `split` its split: both are for hub ids only. `limit` keeps the first rows.
    Errors: ValueError of one line for a missing, empty, broken or unsupported source; it names the file and the line or row.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: expected at least 1 row")
    if _is_hub_id(path):
        rows = _hub(path, split=split, name=name)
    else:
        if split != "train" or name is not None:
            raise ValueError(f"{path}: a local file has neither splits nor configurations; leave split and name out")
        rows = _local(path)
    if not rows.rows:
        raise ValueError(f"{path} has no rows")
    return rows if limit is None else take(rows, range(min(limit, len(rows.rows))))


def val_split(rows: Rows, size: float | int, seed: int = 0) -> tuple[Rows, Rows]:
    """(training rows, validation rows): disjoint, together all rows, each in file order, decided by `seed` alone.

    size: a fraction of the rows (float below 1) or a number of them (int); at least one row lands on each side.
    """
    total = len(rows.rows)
    if isinstance(size, float) and not 0 < size < 1 or size <= 0:
        raise ValueError(f"validation size {size}: expected a fraction between 0 and 1 or a positive number of rows")
    count = min(max(1, round(total * size)), total - 1) if isinstance(size, float) else size
    if not 0 < count < total:
        raise ValueError(f"validation size {size} takes {count} of {total} rows and leaves none to train on: choose a smaller one")
    shuffled = order.shuffled(total, seed, order.SPLIT)
    return take(rows, sorted(shuffled[count:])), take(rows, sorted(shuffled[:count]))


def _is_hub_id(path: str) -> bool:
    """owner/name that neither is a path here nor points into a folder that is here."""
    local = Path(path)
    return bool(HUB_ID.fullmatch(path)) and local.suffix not in READERS and not local.exists() and not local.parent.exists()


def _local(path: str) -> Rows:
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"{path} is a folder: name one file ({', '.join(READERS)})")
    if file.suffix not in READERS:
        raise ValueError(f"{path}: unsupported file type {file.suffix!r}, expected one of {', '.join(READERS)}, or a dataset id owner/name")
    if not file.is_file():
        raise ValueError(f"{path}: no such file (looked in {Path.cwd()})")
    try:
        return READERS[file.suffix](file)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error


def _jsonl(file: Path) -> Rows:
    rows, numbers = [], []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                rows.append(_json_row(line, f"{file} line {number}", first=number == 1))
                numbers.append(number)
    return Rows(str(file), rows, numbers, "line")


def _json_row(line: bytes, where: str, *, first: bool) -> dict:
    try:
        row = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: broken JSON ({error})") from error
    return _object(row, where)


def _json(file: Path) -> Rows:
    """A list of objects, or one object per line under the wrong suffix."""
    data = file.read_bytes()
    if not data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return _jsonl(file)
    try:
        rows = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} line {error.lineno}: broken JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: broken JSON ({error})") from error
    return from_list([_object(row, f"{file} row {i}") for i, row in enumerate(rows, 1)], str(file))


def _object(row: object, where: str) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a {type(row).__name__}: expected an object with named fields")
    return row


def _csv(file: Path) -> Rows:
    """All values are text: nothing is guessed, "007" stays "007"."""
    import csv

    with file.open(newline="", encoding="utf-8-sig") as text:
        reader = csv.DictReader(text, strict=True)
        try:
            rows = list(reader)
        except csv.Error as error:
            raise ValueError(f"{file} line {reader.reader.line_num}: broken CSV ({error})") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    for i, row in enumerate(rows, 1):
        if None in row or None in row.values():
            found = sum(value is not None for key, value in row.items() if key is not None) + len(row.get(None) or [])
            raise ValueError(f"{file} row {i} has {found} values: expected {len(reader.fieldnames)}, one per column of the header")
    return from_list(rows, str(file))


def _parquet(file: Path) -> Rows:
    from pyarrow import ArrowException, parquet

    try:
        return from_list(parquet.read_table(file).to_pylist(), str(file))
    except ArrowException as error:
        raise ValueError(f"{file}: not a readable parquet file ({str(error).splitlines()[0]})") from error


def _hub(path: str, *, split: str, name: str | None) -> Rows:
    import datasets

    try:
        data = datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: no such file here, and no such dataset on the hub or no way to reach it ({reason})") from error
    return from_list(data.to_list(), path)


READERS: dict[str, Callable[[Path], Rows]] = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".csv": _csv}
