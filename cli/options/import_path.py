"""Options whose value is a built-in name, or the import path of a function of the user's own: FILE.py:FUNCTION?option=value,option=value.

A function's signature says what it takes: what the option gives it by name, values of other options, and options behind the question mark.
It is read from the source, without importing it. Importing this imports no torch.
"""

import ast
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tyro.constructors import PrimitiveConstructorSpec

from treetune.cli.errors import BadInput
from treetune.cli.options.marks import Unused, Values
from treetune.core.registry import Named
from treetune.losses import presets

FORM = "FILE.py:FUNCTION"


class ImportPath(NamedTuple):
    """place: a file or a module. options: values as JSON where they can be, else text."""

    place: str
    name: str
    options: dict[str, Any]


class Signature(NamedTuple):
    """Parameters of a function, those without a default, and whether it takes any others (**kwargs)."""

    takes: tuple[str, ...]
    required: tuple[str, ...]
    rest: bool


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


def is_path(text: str) -> bool:
    """Whether a value has the form of an import path: package.module.function, module:function or file.py:function."""
    return re.fullmatch(r"([^?]*\.py|\w+(\.\w+)*):\w+|\w+(\.\w+)+", text.partition("?")[0]) is not None


def parse(text: str) -> ImportPath:
    """The parts of an import path. Errors: ValueError for an option without a value."""
    path, _, tail = text.partition("?")
    place, _, name = path.rpartition(":" if ":" in path else ".")
    options: dict[str, Any] = {}
    for part in filter(None, tail.replace("&", ",").split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier() or key in options:
            raise ValueError(f"the option {part!r} of {path} is not name=value, each name once: write {path}?name=value,name=value")
        options[key] = _json(value)
    return ImportPath(place, name, options)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def source(place: str) -> Path | None:
    """The file of a module or file; None where only importing it would tell."""
    if place.endswith(".py"):
        return Path(place) if Path(place).is_file() else None
    top, _, rest = place.partition(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    roots = [Path.cwd() / top]
    if spec is not None:
        roots += [Path(folder) for folder in spec.submodule_search_locations or ()] or [Path(spec.origin or "").with_suffix("")]
    parts = [root.joinpath(*rest.split(".")) if rest else root for root in roots]
    return next((file for part in parts for file in (part.with_suffix(".py"), part / "__init__.py") if file.is_file()), None)


def signature(text: str) -> Signature | None:
    """What the function takes; None where its file only assigns or imports it. Errors: ValueError where there is no such function."""
    path = parse(text)
    file = source(path.place)
    if file is None:
        missing = f"no file {path.place}" if path.place.endswith(".py") else f"no module {path.place}"
        raise ValueError(f"{text}: there is {missing} in {Path.cwd()}")
    try:
        body = ast.parse(file.read_bytes()).body
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{text}: {file} does not load ({type(error).__name__}: {error})") from error
    for node in reversed(body):
        if isinstance(node, ast.FunctionDef) and node.name == path.name:
            return _signature(node.args)
        if isinstance(node, ast.ClassDef) and node.name == path.name:
            return _of_class(node)
    if path.name not in {name.id for node in body for name in ast.walk(node) if isinstance(name, ast.Name)} | _bound(body):
        functions = [node.name for node in body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
        raise ValueError(f"{text}: {file} has no function {path.name}; its functions are {', '.join(functions) or 'none'}")
    return None


def _bound(body: list[ast.stmt]) -> set[str]:
    """Names that classes and imports bind."""
    classes = {node.name for node in body if isinstance(node, ast.ClassDef)}
    return classes | {alias.asname or alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}


def _of_class(node: ast.ClassDef) -> Signature | None:
    """What an instance is made with; None where a base class may say."""
    made = next((one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)
    if made is None:
        return None
    takes, required, rest = _signature(made.args)
    return Signature(takes[1:], required[1:], rest)


def _signature(arguments: ast.arguments) -> Signature:
    placed = [one.arg for one in (*arguments.posonlyargs, *arguments.args)]
    named = [one.arg for one in arguments.kwonlyargs]
    required = placed[: len(placed) - len(arguments.defaults)]
    required += [name for name, default in zip(named, arguments.kw_defaults, strict=True) if default is None]
    return Signature((*placed, *named), tuple(required), arguments.kwarg is not None)


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


def named(values: Mapping[str, Any]) -> list[str]:
    """The import paths among the values of options."""
    listed = [one for value in values.values() for one in (value if isinstance(value, list | tuple) else [value])]
    return [one for one in listed if isinstance(one, str) and is_path(one)]
