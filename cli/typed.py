"""Values of a config file as the types of the options: nothing passes through text, and a value of another type is one line.

`value(written, option, place)` takes what `yaml_config.load` read. Whole numbers may be written 1e1 or 2_000, numbers 1e-5.
Imports no torch.
"""

import math
import types
import typing
from collections.abc import Callable, Collection
from typing import Any, Literal

from treetune.cli import names
from treetune.cli.errors import BadInput
from treetune.cli.options.ranges import Range
from treetune.cli.options.table import Option
from treetune.cli.yaml_config import Reading, Written, numeral, whole
from treetune.core import fields

BOOLEAN_WORDS = ("true", "false")
NOT_FINITE = ("nan", "inf", "-inf")


def value(written: Written, option: Option, place: str) -> Any:
    """The value of an option. Errors: BadInput with the place, the option, what was expected and what was there."""
    name, kind = option.name, single(option.kind)
    if written.value is None and kind is not option.kind:
        return None
    if written.value is None:
        raise BadInput(f"{place}: {name} has no value: it must be {_expected(kind, option.range)}; give one or remove the line")
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        if isinstance(written.value, dict):
            raise wrong(written, f"{place}: {name}", _expected(kind, option.range))
        items = written.value if isinstance(written.value, list) else [written]
        return tuple(_one(item, inner, option.range, f"{place}: {name}{_nth(i, written)}") for i, item in enumerate(items, 1))
    return _one(written, kind, option.range, f"{place}: {name}")


def single(kind: Any) -> Any:
    """The type of an option that may also be left out."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return next(one for one in typing.get_args(kind) if one is not type(None))
    return kind


def value_of(text: str, kind: type) -> int | float | None:
    """The number that the text of a flag writes, as in a file; None where it is none."""
    return (integer if kind is int else number)(Written(text, text, True))


def check_argument(flag: str, text: str, kind: Any, range: Range | None) -> None:
    """Errors: BadInput where the text of a flag is not one of the choices, or no number, as its type says."""
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    if choices and text not in choices:
        raise BadInput(f"{flag} must be {_expected(kind, range)}, got {_short(text)!r}{names.of_choice(text, choices)}")
    if kind in (int, float) and value_of(text, kind) is None and text.lower() not in NOT_FINITE:  # their ranges are checked later
        raise BadInput(f"{flag} must be {_expected(kind, range)}, got {_short(text)!r}")


def _nth(i: int, written: Written) -> str:
    return f" entry {i}" if isinstance(written.value, list) else ""


def _one(written: Written, kind: Any, range: Range | None, subject: str) -> Any:
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    read: Callable = {bool: flag, int: integer, float: number}.get(kind, text)
    out = read(written, choices=choices) if choices else read(written)
    if out is None:
        near = names.of_choice(written.value, choices) if choices and isinstance(written.value, str) else ""
        raise wrong(written, subject, _expected(kind, range), near)
    if kind in (int, float) and range is not None and not range.holds(out):
        raise BadInput(f"{subject} must be {range.expected()}, got {written.text or out}")
    return out


def _expected(kind: Any, range: Range | None) -> str:
    if typing.get_origin(kind) is tuple:
        inner = _expected(typing.get_args(kind)[0], range)
        return f"{inner}, or a list of such"
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(typing.get_args(kind))}"
    if kind in (int, float) and range is not None:
        return range.expected()
    return {bool: "true or false", int: "a whole number", float: "a finite number"}.get(kind, "a text")


def wrong(written: Written, subject: str, expected: str, near: str = "") -> BadInput:
    """The error for a value of another type than was expected."""
    return BadInput(f"{subject} must be {expected}, got {shown(written)}{near}{_advice(written, expected)}")


def shown(written: Written) -> str:
    """A value and its type; a plain scalar as it was written, with what YAML reads in it."""
    if isinstance(written.value, Reading):
        return f"{_short(written.text)}, which YAML reads as {written.value.words}"
    if isinstance(written.value, bool) and written.text.lower() not in BOOLEAN_WORDS:
        return f"{_short(written.text)}, which YAML reads as {str(written.value).lower()}"
    return fields.shown(plain(written))


def _short(words: str) -> str:
    return words if len(words) <= 40 else f"{words[:36]} ..."


def _advice(written: Written, expected: str) -> str:
    scalar = written.plain and not isinstance(written.value, str | None)
    if scalar and ("a text" in expected or "one of" in expected):
        return "; put quotes around it if it is a text"
    return "; take the quotes away" if _quoted_number(written, expected) else ""


def _quoted_number(written: Written, expected: str) -> bool:
    if not isinstance(written.value, str) or written.plain:
        return False
    numeric = "number" in expected and numeral(written.value) is not None
    return numeric or "true or false" in expected and written.value.lower() in (*BOOLEAN_WORDS, "yes", "no", "on", "off")


def plain(written: Written) -> Any:
    """The value as Python's own; a `Reading` as its text."""
    if isinstance(written.value, list):
        return [plain(item) for item in written.value]
    if isinstance(written.value, dict):
        return {name: plain(item) for name, item in written.value.items()}
    return written.text if isinstance(written.value, Reading) else written.value


def text(written: Written, choices: Collection[str] = ()) -> str | None:
    """A text, one of `choices` where there are some; None for anything else."""
    found = written.value
    return found if isinstance(found, str) and (not choices or found in choices) else None


def flag(written: Written) -> bool | None:
    """True or false, or None."""
    return written.value if isinstance(written.value, bool) else None


def number(written: Written) -> float | None:
    """A finite number, or None."""
    found = _numeric(written)
    return float(found) if found is not None and abs(found) < 1e308 and math.isfinite(found) else None


def integer(written: Written) -> int | None:
    """A whole number, or None; 1e1 and 5.0 are whole."""
    found = _numeric(written)
    if isinstance(found, float) and math.isfinite(found):
        return whole(written.text, found)
    return found if isinstance(found, int) else None


def _numeric(written: Written) -> int | float | None:
    """A number as it was written; YAML itself takes 1e-5 for a text."""
    found = numeral(written.value) if isinstance(written.value, str) and written.plain else written.value
    return found if isinstance(found, int | float) and not isinstance(found, bool) else None
