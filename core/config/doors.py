"""Options whose value is a built-in name or the import path of a function of the user's own: FILE.py:FUNCTION?option=value,option=value.

A function takes by name what the option gives it, values of other options, and options of its own. Importing this imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from treetune.core import import_path
from treetune.core.config.marks import Unused, Values
from treetune.core.registry import Named


@dataclass(frozen=True)
class Door:
    """The mark of such an option.

    names: built-in ones. what: the function in words. gives: names of what it is called with, of which it takes those that it wants.
    aliases: what other tools call the built-in ones.
    """

    names: tuple[str, ...] = ()
    what: str = ""
    gives: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict, hash=False)  # annotations with it are hashed

    def name(self, text: str) -> str:
        """The text, with our name for that of another tool."""
        return self.aliases.get(text, text)


def check(text: str, option: str, door: Door) -> None:
    """Raise ValueError for a path whose function is not there, or takes other things than it is given."""
    try:
        (path, options), function = import_path.split_options(text), import_path.signature(text)
    except ValueError as error:
        raise ValueError(f"{option} {error}") from error
    if clash := options.keys() & set(door.gives):
        raise ValueError(f"{option} {text}: {min(clash)} is what the function is called with, so it cannot be an option of it")
    if function is None:
        return
    name = path.replace(":", ".").rpartition(".")[2]
    if unknown := [key for key in options if key not in function.takes and not function.rest]:
        own_options = ", ".join(key for key in function.takes if key not in door.gives) or "none"
        raise ValueError(f"{option} {text}: {name} has no option {unknown[0]}; its options are {own_options}")
    if missing := [key for key in function.required if key not in door.gives and key not in options]:
        raise ValueError(f"{option} {text}: {name} takes {missing[0]}, but the {door.what} is called with {', '.join(door.gives)}")


def unused_unless_taken(option: str, table: Mapping[str, Named], parameter: str, *, reason: str = "") -> Unused:
    """The mark of an option that sets a parameter: unused where the function that the other option names does not take it."""

    def unused(values: Values) -> str:
        name = values[option]
        if name in table:
            return "" if parameter in table[name].takes else reason.format(**values)
        return "" if import_path.takes(name, parameter) else f"{name} takes no {parameter}"

    return Unused(unused)
