"""Options that take a built-in name or the import path of a function, as tyro reads them. Importing this imports no torch."""

from collections.abc import Iterable
from dataclasses import dataclass

from tyro.constructors import PrimitiveConstructorSpec

from treetune.core import import_path
from treetune.core.config.doors import Door


@dataclass(frozen=True)
class Flag(Door, PrimitiveConstructorSpec[str]):
    """A `Door` whose text tyro takes as it is."""


def door(names: Iterable[str], what: str, *gives: str) -> Flag:
    """An option that holds one of the names, or the import path of a function that is called with `gives`, by name."""
    names = tuple(names)
    return Flag(
        nargs=1,
        metavar=f"{{{','.join(names)}}}|{import_path.FORM}" if names else import_path.FORM,
        instance_from_str=lambda texts: texts[0],
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
        names=names,
        what=what,
        gives=gives,
    )
