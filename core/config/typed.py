"""Values of a config file, and texts of flags, as the types of the options. Imports no torch."""

from collections.abc import Callable
from typing import Any

from treetune.core.config import suggestions
from treetune.core.config.table import Option
from treetune.core.data import yamlvalues
from treetune.core.data.yamltext import Written

NOT_FINITE = ("nan", "inf", "-inf")


def value(written: Written, option: Option, place: str) -> Any:
    """The value of an option. Errors: ValueError with the place, the option, what was expected and what was there."""
    if written.value is None and option.optional:
        return None
    expected = f"{option.expected()}, or a list of such" if option.many else option.expected()
    if written.value is None:
        raise ValueError(f"{place}: {option.name} has no value: it must be {expected}; give one or remove the line")
    if not option.many:
        return _one(written, option, f"{place}: {option.name}")
    if isinstance(written.value, dict):
        raise yamlvalues.wrong(written, f"{place}: {option.name}", expected)
    if not isinstance(written.value, list):
        return (_one(written, option, f"{place}: {option.name}"),)
    return tuple(_one(item, option, f"{place}: {option.name} entry {i}") for i, item in enumerate(written.value, 1))


def value_of(text: str, kind: type) -> int | float | None:
    """The number that the text of a flag writes, as in a file; None where it is none."""
    return (yamlvalues.integer if kind is int else yamlvalues.number)(Written(text, text, True))


def check_argument(flag: str, text: str, option: Option) -> None:
    """Errors: ValueError where the text of a flag is not one of the choices, or no number, as its type says."""
    number = option.single not in (int, float) or value_of(text, option.single) is not None or text.lower() in NOT_FINITE
    if not number or not option.holds(text):  # the ranges of numbers are checked later
        raise ValueError(
            f"{flag} must be {option.expected()}, got {yamlvalues.shortened(text)!r}{suggestions.of_choice(text, option.choices)}"
        )


def _one(written: Written, option: Option, subject: str) -> Any:
    if option.switch is not None and isinstance(written.value, bool):
        return option.switch.on if written.value else option.switch.off
    read: Callable = {bool: yamlvalues.flag, int: yamlvalues.integer, float: yamlvalues.number}.get(option.single, yamlvalues.text)
    out = read(written)
    if out is None or isinstance(out, str) and not option.holds(out):
        near = suggestions.of_choice(written.value, option.choices) if option.choices and isinstance(written.value, str) else ""
        near = near or suggestions.of_part(option.name, written.text)
        raise yamlvalues.wrong(written, subject, option.expected(), near)
    if option.range is not None and not isinstance(out, str) and not option.range.holds(out):
        raise ValueError(f"{subject} must be {option.expected()}, got {written.text or out}")
    return option.door.name(out) if option.door is not None and isinstance(out, str) else out
