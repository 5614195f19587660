"""The options of a command as a table, read from the fields of its config class. Importing this imports no torch.

A config class is a frozen dataclass; its fields are options, or groups of options, which are dataclasses themselves.
"""

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

from treetune.core.config.doors import Door
from treetune.core.config.marks import FUNCTION_PATH, REFUSED, EqualsTexts, Place, Rule, Secret, Switch, Unused
from treetune.core.config.ranges import Range
from treetune.core.import_path import FORM, is_path

REQUIRED = dataclasses.MISSING
T = TypeVar("T")


class Config(Protocol):
    """A config: an instance of any config class."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


class Option(NamedTuple):
    """What the field of an option says.

    kind: its type, without marks. single: the type of one value, of a list or of what may be left out. choices: of texts, where they are
    named. default: REQUIRED where there is none.
    """

    name: str
    kind: Any
    default: Any
    single: Any
    optional: bool = False
    many: bool = False
    choices: tuple[str, ...] = ()
    range: Range | None = None
    rule: Rule | None = None
    unused: tuple[Unused, ...] = ()
    pairs: EqualsTexts | None = None
    door: Door | None = None
    place: Place | None = None
    switch: Switch | None = None
    secret: bool = False

    def expected(self) -> str:
        """What one value must be, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}" + (f", or {FORM}" if self.door else "")
        if self.range is not None:
            return self.range.expected()
        return {bool: "true or false", int: "a whole number", float: "a finite number"}.get(self.single, FORM if self.door else "a text")

    @property
    def of_mappings(self) -> bool:
        """Whether it is a list of mappings, which only a config file can hold."""
        return typing.get_origin(self.single) is dict

    def holds(self, text: str) -> bool:
        """Whether a text is one of the choices, or the import path of a function where the option takes such."""
        return not self.choices or text in self.choices or self.door is not None and (text in self.door.aliases or is_path(text))


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
            group = plain[entry.name]() if entry.default_factory is REQUIRED else entry.default_factory()
            out |= {name: option._replace(default=_listed(getattr(group, name))) for name, option in options(plain[entry.name]).items()}
        else:
            out[entry.name] = _option(entry.name, plain[entry.name], _listed(entry.default), marked[entry.name])
    return types.MappingProxyType(out)


def _option(name: str, kind: Any, default: Any, marked: Any) -> Option:
    marks, inner = _taken_apart(marked)
    optional = isinstance(inner, types.UnionType) or typing.get_origin(inner) is typing.Union
    if optional:
        more, inner = _taken_apart(next(one for one in typing.get_args(inner) if one is not type(None)))
        marks += more
    many = typing.get_origin(inner) is tuple
    if many:
        more, inner = _taken_apart(typing.get_args(inner)[0])
        marks += more

    def only(mark: type) -> Any:
        return next((one for one in marks if isinstance(one, mark)), None)

    door, literal = only(Door), typing.get_origin(inner) is typing.Literal
    choices = typing.get_args(inner) if literal else door.names if door else ()
    unused = tuple(one for one in marks if isinstance(one, Unused))
    single, rule = str if choices else inner, only(Rule)
    if door and rule is not None and rule.verdict == REFUSED:
        rule = rule._replace(judged_by=(name,))  # two functions in other places may be the same
    place = FUNCTION_PATH if door else only(Place)
    return Option(
        name, kind, default, single, optional, many, choices, only(Range), rule, unused, only(EqualsTexts), door, place, only(Switch),
        only(Secret) is not None,
    )  # fmt: skip


def _taken_apart(marked: Any) -> tuple[tuple, Any]:
    """The marks of an annotation, and its type."""
    return (marked.__metadata__, marked.__origin__) if hasattr(marked, "__metadata__") else ((), marked)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def defaults(config: type) -> dict[str, Any]:
    """{option: default} of a config class; REQUIRED where there is none."""
    return {name: option.default for name, option in options(config).items()}


def kinds(config: type) -> dict[str, Any]:
    """{option: type} of a config class."""
    return {name: option.kind for name, option in options(config).items()}


def flatten(config: Config) -> dict[str, Any]:
    """The config as one flat mapping, option -> value, in the order of the help."""
    return {name: _listed(value) for name, value in _values(config)}


def _values(config: Config) -> Iterator[tuple[str, Any]]:
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from _values(value)
        else:
            yield entry.name, value


def secrets(config: type) -> frozenset[str]:
    """The options of a config class that hold keys and passwords."""
    return frozenset(name for name, option in options(config).items() if option.secret)


def record(kind: Callable[..., T], config: Config, **values: Any) -> T:
    """A record whose fields have the names of options, with the values of a config; `values` go first.

    A field that is neither an option of this config nor among `values` keeps its default.
    """
    names = inspect.signature(kind).parameters
    return kind(**{name: value for name, value in _values(config) if name in names} | values)


def rules(config: type) -> dict[str, Rule]:
    """{option: what another value means on resuming} of a config class."""
    return {name: option.rule for name, option in options(config).items() if option.rule is not None}


def unused(config: Config) -> dict[str, str]:
    """{option: why the run would not look at it}, as far as the marks of the fields tell."""
    values, out = flatten(config), {}
    for name, option in options(type(config)).items():
        if reason := next(filter(None, (mark.reason(values) for mark in option.unused)), ""):
            out[name] = reason
    return out
