"""Values of a config file as the types of the options: nothing passes through text, and a value of another type is one line.

`value(written, option, place)` takes what `yaml_config.load` read. Whole numbers may be written 1e1 or 2_000, numbers 1e-5.
Imports no torch.
"""

import math
from collections.abc import Callable, Collection
from typing import Any

from treetune.cli import names
from treetune.cli.errors import BadInput
from treetune.cli.options.table import Option
from treetune.cli.yaml_config import Reading, Written, numeral, whole
from treetune.core import fields

BOOLEAN_WORDS = ("true", "false")
NOT_FINITE = ("nan", "inf", "-inf")


def value(written: Written, option: Option, place: str) -> Any:
    """The value of an option. Errors: BadInput with the place, the option, what was expected and what was there."""
    if written.value is None and option.optional:
        return None
    expected = f"{option.expected()}, or a list of such" if option.many else option.expected()
    if written.value is None:
        raise BadInput(f"{place}: {option.name} has no value: it must be {expected}; give one or remove the line")
    if not option.many:
        return _one(written, option, f"{place}: {option.name}")
    if isinstance(written.value, dict):
        raise wrong(written, f"{place}: {option.name}", expected)
    if not isinstance(written.value, list):
        return (_one(written, option, f"{place}: {option.name}"),)
    return tuple(_one(item, option, f"{place}: {option.name} entry {i}") for i, item in enumerate(written.value, 1))


def value_of(text: str, kind: type) -> int | float | None:
    """The number that the text of a flag writes, as in a file; None where it is none."""
    return (integer if kind is int else number)(Written(text, text, True))


def check_argument(flag: str, text: str, option: Option) -> None:
    """Errors: BadInput where the text of a flag is not one of the choices, or no number, as its type says."""
    number = option.single not in (int, float) or value_of(text, option.single) is not None or text.lower() in NOT_FINITE
    if not number or not option.holds(text):  # the ranges of numbers are checked later
        raise BadInput(f"{flag} must be {option.expected()}, got {_short(text)!r}{names.of_choice(text, option.choices)}")


def _one(written: Written, option: Option, subject: str) -> Any:
    read: Callable = {bool: flag, int: integer, float: number}.get(option.single, text)
    out = read(written)
    if out is None or isinstance(out, str) and not option.holds(out):
        near = names.of_choice(written.value, option.choices) if option.choices and isinstance(written.value, str) else ""
        raise wrong(written, subject, option.expected(), near)
    if option.range is not None and not option.range.holds(out):
        raise BadInput(f"{subject} must be {option.expected()}, got {written.text or out}")
    return out


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
