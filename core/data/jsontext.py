"""JSON from outside: no name twice in an object, no nesting without end, every error one line.

Python's parser keeps the last of two equal names, and its depth limit is that of the interpreter's stack.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

DEEPEST = 200  # levels; what walks rows later recurses
BLANKS = re.compile(r"[ \t\n\r]*")


class _Repeated(ValueError):
    pass


def parse(text: str, location: str) -> Any:
    """The value of a text on one line.

    Errors: ValueError for what is no JSON, for an object that has a name twice, and for more than DEEPEST levels.
    """
    try:
        value, end = _value(text, 0, location)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        raise ValueError(f"{location}: broken JSON ({error.msg} at column {error.colno})") from error
    return value


def iterate_items(text: str, name: str) -> Iterator[Any]:
    """The items of a list, one at a time. Errors: as `parse`, with the line of broken JSON or the row, counted from 1."""
    # Python's parser takes a list as a whole. Item by item, an error has a row, and the objects of a long list are not all held at once.
    end, number = _blanks(text, _blanks(text, 0) + 1), 0
    try:
        while number or text[end : end + 1] != "]":
            number += 1
            value, end = _value(text, end, f"{name} row {number}")
            yield value
            if text[end : end + 1] != ",":
                break
            end = _blanks(text, end + 1)
        if text[end : end + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
        if (end := _blanks(text, end + 1)) < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} line {error.lineno}: broken JSON ({error.msg} at column {error.colno})") from error


def _value(text: str, begin: int, location: str) -> tuple[object, int]:
    """(value, index of the next non-blank character).

    Errors: JSONDecodeError for broken JSON; ValueError that begins with `location`.
    """
    begin = _blanks(text, begin)
    try:
        value, end = DECODER.raw_decode(text, begin)
    except json.JSONDecodeError:
        raise
    except _Repeated as error:
        raise ValueError(f"{location}: {error}: rename one of them, or remove it") from error
    except RecursionError as error:
        raise _too_deep(location) from error
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"{location}: broken JSON ({str(error).partition(';')[0]})") from error
    # Brackets in the text bound the depth from above, so that nearly every row is spared the walk.
    if text.count("[", begin, end) + text.count("{", begin, end) > DEEPEST and _is_deep(value):
        raise _too_deep(location)
    return value, _blanks(text, end)


def _blanks(text: str, begin: int) -> int:
    """Index after the blanks that start at `begin`."""
    match = BLANKS.match(text, begin)
    assert match is not None
    return match.end()


def first_duplicate(names: Iterable[str]) -> str | None:
    """First name that occurs twice; None when all differ."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)


def _unique(pairs: list[tuple[str, object]]) -> dict:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise _Repeated(f"the field {first_duplicate(name for name, _ in pairs)!r} comes twice in one object")
    return fields


def _too_deep(location: str) -> ValueError:
    return ValueError(f"{location}: objects and lists lie in each other more than {DEEPEST} levels deep: flatten them")


def _is_deep(value: object) -> bool:
    """Whether there are more than DEEPEST levels, without recursion."""
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            item for parent in level for item in (parent.values() if isinstance(parent, dict) else parent) if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


DECODER = json.JSONDecoder(object_pairs_hook=_unique)
