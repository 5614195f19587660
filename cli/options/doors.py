"""Options that take a built-in name or the import path of a function, as tyro reads them. Importing this imports no torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tyro.constructors import PrimitiveConstructorSpec

from treetune.core import import_path
from treetune.core.config.doors import Door


@dataclass(frozen=True)
class Flag(Door, PrimitiveConstructorSpec[str]):
    """A `Door` whose text tyro takes as it is."""


def door(names: Iterable[str], what: str, *gives: str, aliases: Mapping[str, str] = MappingProxyType({})) -> Flag:
    """An option that holds one of the names, or the import path of a function that is called with `gives`, by name.

    aliases: names of other tools, each of which stands for one of ours.
    """
    names = tuple(names)
    return Flag(
        nargs=1,
        metavar=f"{{{','.join(names)}}}|{import_path.FORM}" if names else import_path.FORM,
        instance_from_str=lambda texts: aliases.get(texts[0], texts[0]),
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
        names=names,
        what=what,
        gives=gives,
        aliases=aliases,
    )
