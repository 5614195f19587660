"""The options of a command as a table, read from the fields of its config class. Importing this imports no torch.

A config class is a frozen dataclass; its fields are options, or groups of options, which are dataclasses themselves.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from treetune.cli.options.marks import Pairs, Rule, Unused
from treetune.cli.options.ranges import Range

REQUIRED = dataclasses.MISSING
T = TypeVar("T")


class Option(NamedTuple):
    """What the field of an option says. kind: its type, without marks; default: REQUIRED where there is none."""

    name: str
    kind: Any
    default: Any
    range: Range | None = None
    rule: Rule | None = None
    unused: tuple[Unused, ...] = ()
    pairs: Pairs | None = None


def group(options: type[T], **changed: Any) -> T:
    """The field of a config class that holds a group of options, with other defaults for some of them."""
    return dataclasses.field(default_factory=functools.partial(options, **changed))


@functools.cache
def options(config: type) -> Mapping[str, Option]:
    """{option: what its field says} of a config class, in the order of the help."""
    out: dict[str, Option] = {}
    plain, marked = typing.get_type_hints(config), typing.get_type_hints(config, include_extras=True)
    for entry in dataclasses.fields(config):
        if dataclasses.is_dataclass(plain[entry.name]):
            group = entry.default_factory()
            out |= {name: option._replace(default=_listed(getattr(group, name))) for name, option in options(plain[entry.name]).items()}
        else:
            marks = getattr(marked[entry.name], "__metadata__", ())
            out[entry.name] = _option(entry.name, plain[entry.name], _listed(entry.default), marks)
    return types.MappingProxyType(out)


def _option(name: str, kind: Any, default: Any, marks: tuple) -> Option:
    def only(mark: type) -> Any:
        return next((one for one in marks if isinstance(one, mark)), None)

    return Option(name, kind, default, only(Range), only(Rule), tuple(one for one in marks if isinstance(one, Unused)), only(Pairs))


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def defaults(config: type) -> dict[str, Any]:
    """{option: default} of a config class; REQUIRED where there is none."""
    return {name: option.default for name, option in options(config).items()}


def kinds(config: type) -> dict[str, Any]:
    """{option: type} of a config class."""
    return {name: option.kind for name, option in options(config).items()}


def flatten(config: Any) -> dict[str, Any]:
    """The config as one flat mapping, option -> value, in the order of the help."""
    out: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        out |= flatten(value) if dataclasses.is_dataclass(value) else {entry.name: _listed(value)}
    return out


def unused(config: Any) -> dict[str, str]:
    """{option: why the run would not look at it}, as far as the marks of the fields tell."""
    values, out = flatten(config), {}
    for name, option in options(type(config)).items():
        if reason := next(filter(None, (mark.reason(values) for mark in option.unused)), ""):
            out[name] = reason
    return out
