"""Options whose value is a built-in name, or the import path of a function of the user's own: FILE.py:FUNCTION?option=value,option=value.

A function's signature says what it takes: what the option gives it by name, values of other options, and options behind the question mark.
It is read from the source, without importing it. Importing this imports no torch.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from tyro.constructors import PrimitiveConstructorSpec

from treetune.cli.errors import BadInput
from treetune.cli.options.marks import Unused, Values
from treetune.core.import_path import is_path as is_path
from treetune.core.import_path import parse, signature
from treetune.core.registry import Named
from treetune.losses import presets

FORM = "FILE.py:FUNCTION"


@dataclass(frozen=True)
class Door(PrimitiveConstructorSpec[str]):
    """The mark of such an option, for a table of options as for tyro.

    names: built-in ones. what: the function in words. gives: names of what it is called with, of which it takes those that it wants.
    """

    names: tuple[str, ...] = ()
    what: str = ""
    gives: tuple[str, ...] = ()


def door(names: Iterable[str], what: str, *gives: str) -> Door:
    """An option that holds one of the names, or the import path of a function that is called with `gives`, by name."""
    names = tuple(names)
    return Door(
        nargs=1,
        metavar=f"{{{','.join(names)}}}|{FORM}" if names else FORM,
        instance_from_str=lambda texts: texts[0],
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
        names=names,
        what=what,
        gives=gives,
    )


def check(text: str, option: str, door: Door) -> None:
    """Raise BadInput for a path whose function is not there, or takes other things than it is given."""
    try:
        path, found = parse(text), signature(text)
    except ValueError as error:
        raise BadInput(f"{option} {error}") from error
    if clash := path.options.keys() & set(door.gives):
        raise BadInput(f"{option} {text}: {min(clash)} is what the function is called with, so it cannot be an option of it")
    if found is None:
        return
    if unknown := [name for name in path.options if name not in found.takes and not found.rest]:
        own = ", ".join(name for name in found.takes if name not in door.gives) or "none"
        raise BadInput(f"{option} {text}: {path.name} has no option {unknown[0]}; its options are {own}")
    if missing := [name for name in found.required if name not in door.gives and name not in path.options]:
        raise BadInput(f"{option} {text}: {path.name} takes {missing[0]}, but the {door.what} is called with {', '.join(door.gives)}")


def takes(text: str, name: str) -> bool:
    """Whether the function of an import path has a parameter; True where only importing it would tell."""
    found = signature(text)
    return found is None or name in found.takes or found.rest


def unused_unless_taken(option: str, table: Mapping[str, Named], parameter: str, *, reason: str = "") -> Unused:
    """The mark of an option that sets a parameter: unused where the function that the other option names does not take it."""

    def unused(values: Values) -> str:
        name = values[option]
        if name in table:
            return "" if parameter in table[name].takes else reason.format(**values)
        return "" if takes(name, parameter) else f"{name} takes no {parameter}"

    return Unused(unused)


def load(text: str) -> Callable[..., Any]:
    """The function of an import path with its options bound, imported now; of a class with options, an instance of it.

    Errors: ValueError where there is none.
    """
    from treetune.core.data import custom  # here, since it is the only part that reads rows

    function, options = custom.import_function(text.partition("?")[0], "function"), parse(text).options
    if isinstance(function, type) and options:
        return function(**options)
    return partial(function, **options) if options else function


def row(table: Mapping[str, presets.Row], text: str) -> presets.Row:
    """The row of a table of losses that a value names, or one of its own for a function, imported now."""
    return table[text] if text in table else presets.own(table, load(text))
