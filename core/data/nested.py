"""Columns inside columns: `a.b.c` names the value under c of the mapping under b of the column a, where no column has that very name."""

from collections.abc import Iterable, Mapping
from typing import Any

from treetune.core.data import sources
from treetune.core.data.rows import Row


def lifted(rows: sources.Rows, names: Iterable[Any]) -> sources.Rows:
    """The rows with a column for each dotted name that none of them has, in place of the columns in which these values are.

    A row without such a value gets no such column. names: those of columns; what is no text is passed over.
    """
    asked = [name for name in names if isinstance(name, str)]
    dotted = [name for name in dict.fromkeys(asked) if "." in name and not any(name in row for row in rows.rows)]
    if not dotted:
        return rows
    outer = {name.partition(".")[0] for name in dotted} - set(asked)
    return rows._replace(rows=[_lifted(row, dotted, outer) for row in rows.rows])


def _lifted(row: Row, names: Iterable[str], outer: set[str]) -> Row:
    values = {name: value for name in names if (value := look_up(row, name)) is not None}
    return {name: value for name, value in row.items() if name not in outer} | values


def look_up(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column, or of a dotted name that is none; None where there is none."""
    if name in row or "." not in name:
        return row.get(name)
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
