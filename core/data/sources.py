"""Rows of data sets, and how errors name them.

A source becomes `Rows`: plain dicts, each with its number in the source (1-based: the line of a line file, the row of any other).
Text files (.txt) give one row per line, blank lines too, with the field `text`; ds_type "document" makes one row of a whole file.
"""

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

from treetune.core.data import file_rows, files, hub, order
from treetune.core.data.rows import Row

SYSTEM = "system"  # the column of a system message
HUB_ID, is_hub_id = files.HUB_ID, files.is_hub_id
SLICE = re.compile(r"([\w.-]+?)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")


class Origin(NamedTuple):
    """One of several files under one name: numbers above `start` are its lines or rows."""

    start: int
    name: str
    unit: str


class Rows(NamedTuple):
    """Dataset rows with their numbers in the source, counted from 1 in `unit`s ("line" or "row"), on through several files."""

    name: str
    rows: list[Row]
    numbers: list[int]
    unit: str = "row"
    origins: tuple[Origin, ...] = ()  # where each file starts, when there are several


class HubDataset(NamedTuple):
    """A dataset of the hub: the arguments of `hub.load_dataset`."""

    path: str
    split: str
    name: str | None
    revision: str | None
    data_files: str | Sequence[str]


class SavedFolder(NamedTuple):
    """A folder that the datasets library saved."""

    path: str


class TrackedRow(dict):
    """A row that records which of its columns were read, so that unread ones can be reported."""

    __slots__ = ("asked",)

    def __init__(self, row: Row):
        super().__init__(row)
        self.asked: set[str] = set()

    def get(self, key: Any, default: Any = None) -> Any:
        """As a dict's; the column counts as read."""
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)


def track_reads(rows: Rows) -> Rows:
    """The rows as `TrackedRow`s."""
    return rows._replace(rows=[TrackedRow(row) for row in rows.rows])


def unread_columns(rows: Rows) -> dict[str, int]:
    """Columns with a value that no reader asked for, each with the index of the first such row."""
    first_index: dict[str, int] = {}
    for i, row in enumerate(rows.rows):
        assert isinstance(row, TrackedRow)
        for name in row.keys() - row.asked - first_index.keys():
            if dict.get(row, name) not in (None, "", [], {}):
                first_index[name] = i
    return {name: first_index[name] for name in columns(rows) if name in first_index}


def unplaced_system(rows: Rows, i: int, form: str) -> ValueError:
    """The error for a system text that a format has no place for: it is never dropped."""
    return ValueError(
        f"{locate_row(rows, i)} has a {SYSTEM} text, which rows of format {form} have no place for: remove the column, "
        "put it into the prompt, make the prompt a list of messages, or name a format with a place for it "
        "(a user-defined one with {system} in its wording)"
    )


def from_list(rows: Sequence[Row], name: str = "rows") -> Rows:
    """Rows held in memory, numbered from 1."""
    return Rows(name, list(rows), list(range(1, len(rows) + 1)))


def locate_row(rows: Rows, i: int) -> str:
    """Name of row `i` in errors: "data.jsonl line 3"."""
    number = rows.numbers[i]
    if not rows.origins:
        return f"{rows.name} {rows.unit} {number}"
    origin = rows.origins[bisect_left(rows.origins, number, key=lambda candidate: candidate.start) - 1]
    return f"{origin.name} {origin.unit} {number - origin.start}"


def take(rows: Rows, indices: Sequence[int]) -> Rows:
    """The rows at `indices`, numbers kept."""
    return rows._replace(rows=[rows.rows[i] for i in indices], numbers=[rows.numbers[i] for i in indices])


def columns(rows: Rows) -> list[str]:
    """Every field that some row has, in order of first appearance."""
    return list(dict.fromkeys(key for row in rows.rows for key in row))


def join_names(names: Iterable[str]) -> str:
    """Field names or roles in one line of an error: odd ones quoted, "none" for no names."""
    return ", ".join(name if name.isprintable() and name.strip() else repr(name) for name in names) or "none"


def missing_field(names: Sequence[str], row: Mapping[str, Any], location: str, shown: str | None = None) -> ValueError:
    """The error of a row, or of a part of one, that has no value under any of these names: a field may be null, or not there."""
    empty = next((name for name in names if name in row), None)
    if empty is not None:
        return ValueError(f"{location}: field {empty} is null, expected a value")
    return ValueError(f"{location} has no field {shown or ' or '.join(names)}; it has {join_names(map(str, row))}")


def value_kind(value: object) -> str:
    """Type of a value of a row, or "empty", as an error names it."""
    return "empty" if value in ([], {}, "") else f"of type {type(value).__name__}"


def quote(value: object) -> str:
    """A value of a row in one line of an error, at most 80 characters of it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


class SourceOptions(TypedDict, total=False):
    """Options that choose rows at a path: keys of an entry of `datasets`."""

    split: str
    name: str | None
    revision: str | None
    data_files: str | Sequence[str]
    ds_type: str | None


def read(
    path: str | None,
    *,
    shards: int | None = None,
    shard_index: int = 0,
    skip: int = 0,
    limit: int | None = None,
    **options: Unpack[SourceOptions],
) -> Rows:
    """Rows of files, of a folder saved by the datasets library, or of a Hugging Face dataset `owner/name`.

    path: a file, folder, pattern or remote address (.jsonl, .json, .parquet, .csv, .arrow, .txt; .gz and .zst of them), see `files.find`.
    split: a split and perhaps a part of it: "train[:1%]", "train[100:200]", "train[:5%]+train[-5%:]".
    name, revision: configuration and version of a hub dataset. ds_type: json, csv, parquet, arrow, text, document.
    shards, shard_index: only this one of so many random parts (`take_shard`). skip: without the first rows of that; limit: only the first
    rows of what is left.
    Errors: ValueError of one line for a missing, empty, broken or unsupported source; it names the file and the line or row.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: expected at least 1 row")
    split, place = options.get("split", "train"), _resolve(path, **options)
    if isinstance(place, HubDataset):
        rows = from_list(hub.read_rows(hub.load_dataset(**place._asdict())), place.path)
    elif isinstance(place, SavedFolder):
        rows = slice_rows(from_list(hub.read_rows(hub.load_saved_dataset(place.path, _base(split))), place.path), split)
    else:
        whole = shards is None and "[" not in split and "+" not in split
        # The first rows of a large file need not wait for the others, unless a part or a share of all is asked for.
        rows = slice_rows(_read_files(place, path, None if limit is None or not whole else skip + limit), split)
    if not rows.rows:
        raise ValueError(f"{path or options.get('data_files')} has no rows" + ("" if split == "train" else f" in split {split}"))
    rows = rows if shards is None else take_shard(rows, shards, shard_index)
    end = len(rows.rows) if limit is None else min(skip + limit, len(rows.rows))
    if skip >= end:
        raise ValueError(f"{rows.name}: skip {skip} leaves out all {len(rows.rows)} rows: give a smaller number")
    return rows if (skip, end) == (0, len(rows.rows)) else take(rows, range(skip, end))


def digest_source(
    path: str | None,
    *,
    shards: int | None = None,
    shard_index: int = 0,
    skip: int = 0,
    limit: int | None = None,
    **options: Unpack[SourceOptions],
) -> str:
    """A fingerprint of the rows that `read` would give for the same arguments, without reading them: sha256 over the bytes of the files
    (or the datasets library's own fingerprint of a hub dataset) and over what chooses among the rows. Where files lie does not count.
    """
    place = _resolve(path, **options)
    if isinstance(place, HubDataset):
        content = hub.load_dataset(**place._asdict())._fingerprint
    else:
        content = files.digest_files(files.folder_files(place.path) if isinstance(place, SavedFolder) else place)
    split, name, revision = options.get("split", "train"), options.get("name"), options.get("revision")
    chosen = [content, split, name, revision, shards, shard_index, limit, *([skip] if skip else [])]
    return hashlib.sha256(json.dumps(chosen).encode()).hexdigest()


def slice_rows(rows: Rows, split: str) -> Rows:
    """The parts of the rows that a split expression such as "train[:10%]+train[-5:]" names, in its order.

    Bounds count rows or percent (rounded to the nearest row), from the end when negative, and are clipped, as in the datasets library.
    """
    parts = [_bounds(text, len(rows.rows)) for text in split.split("+")]
    chosen = [i for part in parts for i in part]
    return rows if chosen == list(range(len(rows.rows))) else take(rows, chosen)


def take_shard(rows: Rows, shards: int, index: int = 0) -> Rows:
    """One of `shards` parts of the rows, in source order: disjoint, together all rows, sizes within one of each other.

    Rows are drawn, since a source may be sorted, but always the same ones. Errors: ValueError for no such part, or an empty one.
    """
    if shards < 1 or not 0 <= index < shards:
        raise ValueError(f"shard {index} of {shards}: expected at least 1 shard and an index from 0 to one below their number")
    indices = sorted(order.permutation(len(rows.rows), order.SHARDS)[index::shards])
    if not indices:
        raise ValueError(f"{rows.name}: shard {index} of {shards} is empty, there are {len(rows.rows)} rows: use fewer shards")
    return take(rows, indices)


def split_validation(rows: Rows, size: float | int, seed: int = 0, *, key: Callable[[Row], str] | None = None) -> tuple[Rows, Rows]:
    """(training rows, validation rows): disjoint, together all rows, each in file order, decided by `seed` alone.

    size: a fraction of the rows (float below 1) or a number of them (int); at least one row lands on each side.
    key: rows of one key, such as one prompt, stay together, so that the sizes are met as nearly as that allows.
    """
    total = len(rows.rows)
    if isinstance(size, float) and not 0 < size < 1 or size <= 0:
        raise ValueError(f"validation size {size}: expected a fraction between 0 and 1 or a positive number of rows")
    count = min(max(1, round(total * size)), total - 1) if isinstance(size, float) else size
    if not 0 < count < total:
        raise ValueError(f"validation size {size} takes {count} of {total} rows and leaves none to train on: choose a smaller one")
    shuffled = order.permutation(total, seed, order.SPLIT)
    validation = set(shuffled[:count]) if key is None else _held_groups([key(row) for row in rows.rows], shuffled, count)
    return take(rows, [i for i in range(total) if i not in validation]), take(rows, sorted(validation))


def _held_groups(keys: list[str], shuffled: Sequence[int], count: int) -> set[int]:
    """Indices of whole groups of equal keys, in the shuffled order of their first rows, while they fit in `count`.

    At least two groups of three or more: a prompt alone has no completion that is foreign to it.
    """
    groups: dict[str, list[int]] = {}
    for i in shuffled:
        groups.setdefault(keys[i], []).append(i)
    if len(groups) == 1:
        return set(shuffled[:count])
    validation: set[int] = set()
    for i, group in enumerate(groups.values()):
        if i < (1 if len(groups) < 3 else 2) or len(validation) + len(group) <= count:
            validation |= set(group)
    return validation


def find_files(path: str | None, *, split: str, data_files: str | Sequence[str] = (), ds_type: str | None = None) -> list[files.File]:
    """The files of a source that is no dataset of the datasets library. Errors: ValueError for a split that files cannot have."""
    base, folder = _base(split), not data_files and path is not None and _is_folder(path)
    if base != "train" and not folder:
        raise ValueError(f"{path or data_files}: a local file has no split {base!r}; leave split out, or write train, train[:10%]")
    return files.find(path, data_files=data_files, ds_type=ds_type, split=base)


def _resolve(
    path: str | None,
    *,
    split: str = "train",
    name: str | None = None,
    revision: str | None = None,
    data_files: str | Sequence[str] = (),
    ds_type: str | None = None,
) -> HubDataset | SavedFolder | list[files.File]:
    """The place that the options name. Errors: ValueError for options that a place of this kind does not take."""
    if path is None and not data_files:
        raise ValueError("a data set has neither a path nor data_files: give one")
    if is_hub_id(path, ds_type):
        return HubDataset(path, split, name, revision, data_files)
    if name is not None or revision is not None:
        raise ValueError(f"{path or data_files}: files have neither configurations nor revisions; leave name and revision out")
    if path is not None and not data_files and files.saved_marker(path):
        return SavedFolder(path)
    return find_files(path, split=split, data_files=data_files, ds_type=ds_type)


def _is_folder(path: str) -> bool:
    return files.kind_of(path)[0] is None if files.is_remote(path) else Path(path).is_dir()


def _base(split: str) -> str:
    bases = {_parsed(text)[0] for text in split.split("+")}
    if len(bases) > 1:
        raise ValueError(f"split {split!r} joins several splits: name them as data sets of their own")
    return bases.pop()


def _parsed(text: str) -> tuple[str, str | None, str | None]:
    match = SLICE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"split {text!r}: expected a name, or a part such as train[:1%], train[10:20] or train[:10%]+train[-5:]")
    return match[1], match[2], match[3]


def _bounds(text: str, total: int) -> range:
    _, begin, end = _parsed(text)
    return range(_bound(begin or "0", total), _bound(end or str(total), total))


def _bound(text: str, total: int) -> int:
    size = text.lstrip("-")
    count = round(int(size[:-1]) * total / 100) if size.endswith("%") else int(size)
    return max(total - count, 0) if text.startswith("-") else min(count, total)


def _read_files(file_list: Sequence[files.File], path: str | None, limit: int | None) -> Rows:
    parts, remaining = [], limit
    for file in file_list:
        rows = list(islice(file_rows.iterate(file), remaining))
        parts.append(Rows(file.name, [row.row for row in rows], [row.number for row in rows], rows[0].unit if rows else "row"))
        remaining = None if remaining is None else remaining - len(rows)
        if remaining == 0:
            break
    return parts[0] if len(parts) == 1 else join(parts, path or f"{file_list[0].name} and {len(file_list) - 1} more")


def join(parts: Sequence[Rows], name: str) -> Rows:
    """Several files as one source, numbered through; errors still name each row's own file and line."""
    origins, rows, numbers, start = [], [], [], 0
    for part in parts:
        origins.append(Origin(start, part.name, part.unit))
        rows += part.rows
        numbers += [start + number for number in part.numbers]
        start += max(part.numbers, default=0)
    return Rows(name, rows, numbers, origins=tuple(origins))
