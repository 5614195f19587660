"""Exact deduplication: rows that hold the same fields with the same values, whatever the order of the fields."""

import hashlib
import json
from collections.abc import Sequence

from treetune.core.data import sources
from treetune.core.data.rows import Row


def row_digest(row: Row) -> bytes:
    """sha256 of the row's canonical JSON: fields sorted, values that JSON lacks (dates, bytes) by type and representation."""
    text = json.dumps(row, sort_keys=True, separators=(",", ":"), default=lambda value: f"{type(value).__name__} {value!r}")
    return hashlib.sha256(text.encode()).digest()


def drop_duplicates(parts: Sequence[sources.Rows]) -> tuple[list[sources.Rows], list[int]]:
    """(parts without rows that came before in the same or an earlier part, number of rows removed from each part).

    Give training parts first and held-out parts behind them: a held-out row that is trained on goes. Order and numbers are kept.
    """
    seen: set[bytes] = set()
    indices_by_part = [[i for i, row in enumerate(part.rows) if _first(row_digest(row), seen)] for part in parts]
    return [sources.take(part, indices) for part, indices in zip(parts, indices_by_part, strict=True)], [
        len(part.rows) - len(indices) for part, indices in zip(parts, indices_by_part, strict=True)
    ]


def _first(key: bytes, seen: set[bytes]) -> bool:
    if key in seen:
        return False
    seen.add(key)
    return True
