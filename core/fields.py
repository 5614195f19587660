"""Typed reading of mappings that come from outside: config.json, adapter_config.json, an index, an entry of a YAML file.

A field is read by its name and the type that it must have. Anything else is one ValueError that says where, which field, what was
expected and what was there. `unknown` names the fields that a reader does not know, so that none is passed over in silence.
"""

import contextlib
import json
import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

# What code raises that trusted its input, while `reading`.
UNFORESEEN = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, NameError, RuntimeError, TypeError)
TRACEBACK = "TREETUNE_TRACEBACK"  # environment variable that makes the command show where an error arose
INT64_MAX = 2**63 - 1
REQUIRED: Any = object()  # the default of a field that must be there


class Fields(NamedTuple):
    """A mapping with texts as keys, and how messages name it: a path, or a path with the field that holds it."""

    values: dict[str, Any]
    source: str


@contextlib.contextmanager
def reading(source: object) -> Iterator[None]:
    """Context in which a file or an option is read: an unforeseen error becomes a ValueError of one line that names it."""
    try:
        yield
    except (*UNFORESEEN, UnicodeError) as error:
        raise ValueError(unforeseen(source, error)) from error


def unforeseen(source: object, error: BaseException) -> str:
    """The message for an unforeseen error while `source` was read."""
    reason = " ".join(str(error).split())
    reason = reason if len(reason) <= 200 else f"{reason[:196]} ..."
    return f"{source} cannot be read: {type(error).__name__}{': ' * bool(reason)}{reason} ({TRACEBACK}=1 shows where)"


def mapping(value: Any, source: str) -> Fields:
    """A mapping from outside. Raises ValueError unless it is one, with texts as keys."""
    if not isinstance(value, dict):
        raise ValueError(f"{source} must be a mapping of fields, got {shown(value)}")
    if odd := [key for key in value if not isinstance(key, str)]:
        raise ValueError(f"{source} has the field name {shown(odd[0])}; expected a text, in quotes where YAML reads it as something else")
    return Fields(value, source)


def shown(value: Any) -> str:
    """A value and its type for a message: `"abc" (text)`, cut to 60 characters."""
    kinds = ((bool, "true or false"), (str, "text"), (int, "integer"), (float, "number"), (list | tuple, "list"), (dict, "mapping"))
    if value is None:
        return "null"
    kind = next((name for types, name in kinds if isinstance(value, types)), type(value).__name__)
    try:
        text = json.dumps(value, ensure_ascii=True, default=str)
    except (ValueError, TypeError, RecursionError):
        text = f"a {kind}"
    return f"{text if len(text) <= 60 else text[:56] + ' ...'} ({kind})"


def wrong(fields: Fields, name: str, expected: str) -> ValueError:
    """The error for a field whose value is not what was expected."""
    value = fields.values.get(name)
    arrived = shown(value) if name in fields.values else "nothing"
    return ValueError(f"{fields.source}: {name} must be {expected}, got {arrived}")


def integer(
    fields: Fields, name: str, *, default: Any = REQUIRED, least: int | None = None, most: int = INT64_MAX, null: bool = False
) -> int | Any:
    """A whole number from `least` to `most`. With `null`, null counts as absent; absent is the default, or an error without one."""
    lower = "" if least is None else f" of at least {least}"
    expected = f"a whole number{lower}" + ("" if most == INT64_MAX else f" and at most {most}")
    value = _value(fields, name, default, null, expected)
    if value is default:
        return value
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least) or abs(value) > most:
        raise wrong(fields, name, expected)
    return value


def number(
    fields: Fields, name: str, *, default: Any = REQUIRED, above: float | None = None, least: float | None = None, null: bool = False
) -> float | Any:
    """A finite number greater than `above` and not less than `least`."""
    bounds = [f"above {above:g}"] if above is not None else []
    bounds += [f"of at least {least:g}"] if least is not None else []
    expected = " ".join(["a finite number", *bounds])
    value = _value(fields, name, default, null, expected)
    if value is default:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e308 or not math.isfinite(value):
        raise wrong(fields, name, expected)
    if (above is not None and value <= above) or (least is not None and value < least):
        raise wrong(fields, name, expected)
    return float(value)


def flag(fields: Fields, name: str, *, default: Any = REQUIRED, null: bool = False) -> bool | Any:
    """True or false; 0 and 1 are refused."""
    value = _value(fields, name, default, null, "true or false")
    if value is not default and not isinstance(value, bool):
        raise wrong(fields, name, "true or false")
    return value


def text(fields: Fields, name: str, *, default: Any = REQUIRED, choices: Collection[str] = (), null: bool = False) -> str | Any:
    """A text, one of `choices` where there are some."""
    expected = f"one of {', '.join(choices)}" if choices else "a text"
    value = _value(fields, name, default, null, expected)
    if value is not default and (not isinstance(value, str) or (choices and value not in choices)):
        raise wrong(fields, name, expected)
    return value


def texts(fields: Fields, name: str, *, default: Any = REQUIRED, null: bool = False) -> tuple[str, ...] | Any:
    """A list of texts."""
    return _sequence(fields, name, default, null, "a list of texts", lambda item: isinstance(item, str))


def integers(fields: Fields, name: str, *, default: Any = REQUIRED, least: int | None = None, null: bool = False) -> tuple[int, ...] | Any:
    """A list of whole numbers."""

    def fits(item: Any) -> bool:
        return isinstance(item, int) and not isinstance(item, bool) and abs(item) <= INT64_MAX and (least is None or item >= least)

    lower = "" if least is None else f" of at least {least}"
    return _sequence(fields, name, default, null, f"a list of whole numbers{lower}", fits)


def inner(fields: Fields, name: str, *, default: Any = REQUIRED, null: bool = False) -> Fields | Any:
    """A mapping inside the mapping; its messages name both."""
    value = _value(fields, name, default, null, "a mapping of fields")
    if value is default:
        return value
    if not isinstance(value, dict):
        raise wrong(fields, name, "a mapping of fields")
    return mapping(value, f"{fields.source}: {name}")


def unknown(fields: Fields, expected: Iterable[str]) -> list[str]:
    """Names of the fields that are not among the expected ones, in order."""
    names = set(expected)
    return [name for name in fields.values if name not in names]


def _value(fields: Fields, name: str, default: Any, null: bool, expected: str) -> Any:
    """The value of a field; the default where the field is absent."""
    if name not in fields.values or (null and fields.values[name] is None):
        if default is REQUIRED:
            raise wrong(fields, name, expected)
        return default
    return fields.values[name]


def _sequence(fields: Fields, name: str, default: Any, null: bool, expected: str, fits) -> Any:
    value = _value(fields, name, default, null, expected)
    if value is default:
        return value
    if not isinstance(value, list | tuple) or not all(fits(item) for item in value):
        raise wrong(fields, name, expected)
    return tuple(value)
