"""Records of a run: one JSON object a line, appended as the run goes (metrics.jsonl, samples.jsonl).

JSON has no nan and no inf: they are written as null, and null is read as nan. A line that holds no record, because a crash cut it
short or a disk damaged it, is left out and counted; the lines after it are records as before.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from treetune.core import drafts, durable

JsonRecord = dict[str, Any]


class Read(NamedTuple):
    """The records of a file in order, and the numbers of its lines without one."""

    records: list[JsonRecord]
    broken: list[int]


def read(path: Path, *, numbers: bool = False) -> Read:
    """The records of a file, none where there is no file. With `numbers`, a record holds numbers and nulls only."""
    entries = _entries(path, numbers)
    return Read([record for _, record in entries.values() if record is not None], _broken(entries))


def truncate(path: Path, step: int, *, numbers: bool = False, keep: Callable[[JsonRecord], bool] = lambda record: True) -> Read:
    """Cut a file back to its records up to `step`, as a resumed run needs; of those at `step` itself to the ones to keep."""
    entries = _entries(path, numbers)
    remaining = [
        (line, record)
        for line, record in entries.values()
        if record is not None and (record["step"] < step or (record["step"] == step and keep(record)))
    ]
    drafts.write(path, b"".join(line + b"\n" for line, _ in remaining))
    return Read([record for _, record in remaining], _broken(entries))


def append(path: Path, record: JsonRecord) -> None:
    """Append a record as a line."""
    # Half of a surrogate pair has no UTF-8; its escape is JSON.
    durable.append_line(path, json.dumps(_plain(record), ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace"))


def _plain(value: Any) -> Any:
    """The value with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe(path: Path, broken: list[int]) -> str:
    """A message about the lines of a file that hold no record."""
    shown = ", ".join(map(str, broken[:5])) + (f" and {len(broken) - 5} more" if len(broken) > 5 else "")
    what = f"line {shown} holds" if len(broken) == 1 else f"lines {shown} hold"
    return f"{path}: {what} no record and {'is' if len(broken) == 1 else 'are'} left out; the others are kept"


def _broken(entries: dict[int, tuple[bytes, JsonRecord | None]]) -> list[int]:
    return [number for number, (_, record) in entries.items() if record is None]


def _entries(path: Path, numbers: bool) -> dict[int, tuple[bytes, JsonRecord | None]]:
    """{number of a line: its bytes and its record, None where it holds none}; empty lines are left out."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return {number: (line, _parsed(line, numbers)) for number, line in enumerate(lines, 1) if line.strip()}


def _parsed(line: bytes, numbers: bool) -> JsonRecord | None:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not _whole(record.get("step")):
        return None
    if numbers and not all(value is None or (isinstance(value, int | float) and abs(value) < 1e308) for value in record.values()):
        return None
    return {key: math.nan if value is None else value for key, value in record.items()}


def _whole(step: object) -> bool:
    return isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**63
