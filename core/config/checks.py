"""What the marks of options forbid: values out of range, texts that name nothing, options that a command would ignore. Imports no torch."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from treetune.core import import_path
from treetune.core.config import doors, table
from treetune.core.config.ranges import Range
from treetune.core.config.table import Config


def check_ranges(config: Config) -> None:
    """Raise ValueError for a number out of its option's range."""
    options = table.options(type(config))
    for name, value in table.flatten(config).items():
        if (known := options[name].range) and (wrong := known.outside(value)):
            raise ValueError(f"{name} {wrong}")


def check_texts(config: Config) -> None:
    """Raise ValueError for a text without its equals sign, and for an import path whose function is not there or takes other things."""
    values = table.flatten(config)
    for name, option in table.options(type(config)).items():
        if option.pairs is not None:
            option.pairs.read(values[name], name.replace("_", "-"))
        for text in values[name] if isinstance(values[name], list) else [values[name]]:
            if option.door is not None and text is not None and text not in option.choices:
                _check_function(option, option.door, text)


def _check_function(option: table.Option, door: doors.Door, text: str) -> None:
    """The function is looked for, and its parameters compared with what it is given, without importing it."""
    if not import_path.is_path(text):
        raise ValueError(f"{option.name} must be {option.expected()}, got {text!r}")
    doors.check(text, option.name, door)


def refuse_unused(explicit: Collection[str], reasons: Mapping[str, str]) -> None:
    """Raise ValueError for an option that the user set and this run would ignore; `reasons` maps it to the reason."""
    for name in sorted(set(explicit) & reasons.keys()):
        raise ValueError(f"--{name.replace('_', '-')} would be ignored: {reasons[name]}")


def check_named(
    values: Mapping[str, Any], option: str, of: str, takes: Sequence[str], kinds: Mapping[str, Range | tuple[str, ...] | type[bool]]
) -> None:
    """Errors: ValueError for a name that `of` does not take, and for a value that is not of its kind: a range, words, or true or false."""
    for name, value in values.items():
        if name not in takes:
            raise ValueError(f"--{option} {name}: {of} takes no such; it takes {', '.join(takes) or 'none'}")
        if wrong := _wrong(kinds[name], value):
            raise ValueError(f"--{option} {name} must be {wrong}, got {value!r}")


def _wrong(kind: Range | tuple[str, ...] | type[bool], value: Any) -> str:
    """What a value should have been; empty for one that is right."""
    if isinstance(kind, Range):
        return "" if type(value) in (int, float) and kind.holds(value) else kind.expected()
    if isinstance(kind, tuple):
        return "" if value in kind else f"one of {', '.join(kind)}"
    return "" if isinstance(value, bool) else "true or false"
