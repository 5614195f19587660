"""Options whose value is a built-in name or the import path of a function of the user's own: FILE.py:FUNCTION?option=value,option=value.

A function takes by name what the option gives it, values of other options, and options of its own. Importing this imports no torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tyro.constructors import PrimitiveConstructorSpec

from treetune.cli.errors import BadInput
from treetune.cli.options.marks import Unused, Values
from treetune.core import import_path
from treetune.core.registry import Named
from treetune.losses import presets


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
        metavar=f"{{{','.join(names)}}}|{import_path.FORM}" if names else import_path.FORM,
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
        (path, options), found = import_path.split_options(text), import_path.signature(text)
    except ValueError as error:
        raise BadInput(f"{option} {error}") from error
    if clash := options.keys() & set(door.gives):
        raise BadInput(f"{option} {text}: {min(clash)} is what the function is called with, so it cannot be an option of it")
    if found is None:
        return
    name = path.replace(":", ".").rpartition(".")[2]
    if unknown := [key for key in options if key not in found.takes and not found.rest]:
        own = ", ".join(key for key in found.takes if key not in door.gives) or "none"
        raise BadInput(f"{option} {text}: {name} has no option {unknown[0]}; its options are {own}")
    if missing := [key for key in found.required if key not in door.gives and key not in options]:
        raise BadInput(f"{option} {text}: {name} takes {missing[0]}, but the {door.what} is called with {', '.join(door.gives)}")


def unused_unless_taken(option: str, table: Mapping[str, Named], parameter: str, *, reason: str = "") -> Unused:
    """The mark of an option that sets a parameter: unused where the function that the other option names does not take it."""

    def unused(values: Values) -> str:
        name = values[option]
        if name in table:
            return "" if parameter in table[name].takes else reason.format(**values)
        return "" if import_path.takes(name, parameter) else f"{name} takes no {parameter}"

    return Unused(unused)


def row(table: Mapping[str, presets.Row], text: str) -> presets.Row:
    """The row of a table of losses that a value names, or one of its own for a function, imported now."""
    return table[text] if text in table else presets.own(table, import_path.load(text))
