"""Functions of the user's own, named by import path: package.module.function or FILE.py:FUNCTION, with options behind a question mark.

What a function takes is read from its source, without importing it. Imports the standard library only.
"""

import ast
import functools
import importlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

FORM = "FILE.py:FUNCTION"
RAISED = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)
_LOADED: dict[tuple[Path, int], ModuleType] = {}  # files that were run, by path and time of the last change


class Failed(RuntimeError):
    """A function of the user's raised an error, or gave what cannot be used; the message names the function and the line."""


class Signature(NamedTuple):
    """Parameters of a function, those without a default, and whether it takes any others (**kwargs)."""

    takes: tuple[str, ...]
    required: tuple[str, ...]
    rest: bool


def is_path(text: str) -> bool:
    """Whether a value has the form of an import path: package.module.function, module:function or file.py:function."""
    return re.fullmatch(r"([^?]*\.py|\w+(\.\w+)*):\w+|\w+(\.\w+)+", text.partition("?")[0]) is not None


def split_options(path: str) -> tuple[str, dict[str, Any]]:
    """The name in "name?option=value,option=value", and its options, values as JSON where they are JSON.

    Errors: ValueError for an option without a value, and for one that comes twice.
    """
    name, _, tail = path.partition("?")
    options: dict[str, Any] = {}
    for part in filter(None, tail.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier() or key in options:
            raise ValueError(f"the option {part!r} of {name} is not name=value, each name once: write {name}?name=value,name=value")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return name, options


def source(place: str) -> Path | None:
    """The file of a module or file; None where only importing it would tell."""
    if place.endswith(".py"):
        return Path(place) if Path(place).is_file() else None
    names = place.split(".")
    parts = [Path.cwd().joinpath(*names)]
    for size in range(1, len(names) + 1):
        parts += [root.joinpath(*names[size:]) for root in _roots(".".join(names[:size]))]
    return next((file for part in parts for file in (part.with_suffix(".py"), part / "__init__.py") if file.is_file()), None)


def _roots(name: str) -> list[Path]:
    """Where a package or a module is, without importing it or the packages around it."""
    try:
        if "." not in name:
            spec = importlib.util.find_spec(name)
        else:
            # An editable install maps packages inside a package by finders of its own. The finder of sys.path would look for the last name.
            finders = [one for one in sys.meta_path if one is not PathFinder and hasattr(one, "find_spec")]
            spec = next(filter(None, (one.find_spec(name, None) for one in finders)), None)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return []
    return [Path(folder) for folder in spec.submodule_search_locations or ()] or [Path(spec.origin or "").with_suffix("")]


def signature(text: str) -> Signature | None:
    """What the function takes; None where its file only assigns or imports it. Errors: ValueError where there is no such function."""
    path = split_options(text)[0]
    place, _, name = path.rpartition(":" if ":" in path else ".")
    file = source(place)
    if file is None:
        missing = f"no file {place}" if place.endswith(".py") else f"no module {place}"
        raise ValueError(f"{text}: there is {missing} in {Path.cwd()}")
    try:
        body = ast.parse(file.read_bytes()).body
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{text}: {file} does not load ({type(error).__name__}: {error})") from error
    for node in reversed(body):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return _signature(node.args)
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _of_class(node)
    if name not in {part.id for node in body for part in ast.walk(node) if isinstance(part, ast.Name)} | _bound(body):
        functions = [node.name for node in body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
        raise ValueError(f"{text}: {file} has no function {name}; its functions are {', '.join(functions) or 'none'}")
    return None


def _bound(body: list[ast.stmt]) -> set[str]:
    """Names that classes and imports bind."""
    classes = {node.name for node in body if isinstance(node, ast.ClassDef)}
    return classes | {alias.asname or alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}


def _of_class(node: ast.ClassDef) -> Signature | None:
    """What an instance is made with; None where a base class may say."""
    init = next((one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)
    if init is None:
        return None
    takes, required, rest = _signature(init.args)
    return Signature(takes[1:], required[1:], rest)


def _signature(arguments: ast.arguments) -> Signature:
    placed = [one.arg for one in (*arguments.posonlyargs, *arguments.args)]
    named = [one.arg for one in arguments.kwonlyargs]
    required = placed[: len(placed) - len(arguments.defaults)]
    required += [name for name, default in zip(named, arguments.kw_defaults, strict=True) if default is None]
    return Signature((*placed, *named), tuple(required), arguments.kwarg is not None)


def takes(text: str, name: str) -> bool:
    """Whether the function of an import path has a parameter; True where only importing it would tell."""
    function = signature(text)
    return function is None or name in function.takes or function.rest


def named(values: Mapping[str, Any]) -> list[str]:
    """The import paths among the values of options."""
    listed = [one for value in values.values() for one in (value if isinstance(value, list | tuple) else [value])]
    return [one for one in listed if isinstance(one, str) and is_path(one)]


def load(text: str) -> Callable[..., Any]:
    """The function of an import path with its options bound, imported now; of a class with options, an instance of it.

    Errors: ValueError where there is none.
    """
    path, options = split_options(text)
    function = import_function(path, "function")
    _check_options(text, function, options)
    if isinstance(function, type) and options:
        return _instance(text, function, options)
    return partial(function, **options) if options else function


def load_guarded(text: str) -> Callable[..., Any]:
    """`load`, of a class an instance, whose errors become `Failed` with the name of the function and the line that raised."""
    function = load(text)
    function = _instance(text, function, {}) if isinstance(function, type) else function

    @functools.wraps(function, updated=())
    def call(*args: Any, **named: Any) -> Any:
        try:
            return function(*args, **named)
        except Exception as error:
            raise Failed(f"{split_options(text)[0]} failed{_line(text, error)}: {type(error).__name__}: {error}") from error

    # `wraps` leaves out the signature of an instance with __call__.
    call.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return call


def _instance(text: str, kind: type, options: Mapping[str, Any]) -> Any:
    try:
        return kind(**options)
    except Exception as error:
        raise ValueError(f"{text}: {kind.__name__} cannot be made{_line(text, error)}: {type(error).__name__}: {error}") from error


def _check_options(text: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Errors: ValueError for a text where the parameter's default is a number."""
    parameters = inspect.signature(function).parameters if options else {}
    for name, value in options.items():
        default = parameters[name].default if name in parameters else None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(default, int | float) and not isinstance(default, bool) and not number:
            raise ValueError(f"{text}: {name} must be a number, as its default {default}, got {value!r}")


def _line(text: str, error: BaseException) -> str:
    """ " in line N" of the user's file, the last that an error went through."""
    file, frame, line = source(split_options(text)[0].rpartition(":")[0]), error.__traceback__, None
    while file is not None and frame is not None:
        line = frame.tb_lineno if Path(frame.tb_frame.f_code.co_filename).resolve() == file.resolve() else line
        frame = frame.tb_next
    return "" if line is None else f" in line {line}"


def import_function(path: str, role: str = "transform") -> Callable[..., Any]:
    """The function at "module.function" or "folder/file.py:function". Errors: ValueError, saying `role`, when there is none."""
    module_path, _, name = path.rpartition(":" if ":" in path else ".")
    if not module_path or not name:
        raise ValueError(f"{role} {path!r}: expected module.function or file.py:function")
    function = getattr(_module(module_path, path, role), name, None)
    if not callable(function):
        raise ValueError(f"{role} {path!r}: {module_path} has no function {name}")
    return function


def _module(module_path: str, path: str, role: str) -> ModuleType:
    file = Path(module_path if module_path.endswith(".py") else module_path.replace(".", "/") + ".py")
    if not module_path.endswith(".py"):
        try:
            module = importlib.import_module(module_path)
            # A file of this folder comes first, as it does for `source`: a module of that name may be that of another folder.
            if not file.is_file() or Path(module.__file__ or "").resolve() == file.resolve():
                return module
        except ImportError as error:
            if not file.is_file():
                raise ValueError(f"{role} {path!r}: no module {module_path} ({error}), and no file {file} in {Path.cwd()}") from error
        except (Exception, SystemExit) as error:
            if not file.is_file():
                raise ValueError(f"{role} {path!r}: {module_path} does not load ({type(error).__name__}: {error})") from error
    if not file.is_file():
        raise ValueError(f"{role} {path!r}: no file {file} in {Path.cwd()}")
    key = (file.resolve(), file.stat().st_mtime_ns)
    if key not in _LOADED:
        _LOADED[key] = _run_file(file, f"{role} {path!r}")
    return _LOADED[key]


def _run_file(file: Path, subject: str) -> ModuleType:
    name = file.stem if file.stem not in sys.modules else f"{file.stem}@{file.resolve()}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and `inspect` look a class's module up by name, while the file still runs.
    sys.modules[name] = module
    # Behind all others, so that the files beside this one can be imported and hide no package.
    if (folder := str(file.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    # A file may raise anything, and may leave by sys.exit.
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(f"{subject}: {file} does not load ({type(error).__name__}: {error})") from error
    return module


def load_object(path: str, role: str) -> Any:
    """What a file or module binds to the last name of an import path; runs the file. Errors: ValueError, saying `role`, for none."""
    module_path, _, name = path.rpartition(":" if ":" in path else ".")
    module = _module(module_path, path, role)
    value = getattr(module, name, None)
    if value is None:
        raise ValueError(f"{role} {path!r}: {module_path} has no {name}")
    return value
