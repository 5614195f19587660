"""Import paths of functions of the user's own: FILE.py:FUNCTION?option=value,option=value, or package.module.function.

What is asked of a function (its file, its parameters) is read from the source, without importing it. Imports no torch.
"""

import ast
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


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


def named(values: Mapping[str, Any]) -> list[str]:
    """The import paths among the values of options."""
    listed = [one for value in values.values() for one in (value if isinstance(value, list | tuple) else [value])]
    return [one for one in listed if isinstance(one, str) and is_path(one)]
