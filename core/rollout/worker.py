"""A worker process of `rewards.Pool`: loads reward functions by name and calls them in its main thread, so that signal.alarm works.

Started as `python -m treetune.core.rollout.worker` with a socket as standard input; a message is its length (8 bytes) and JSON.
First {"names", "limit_s"} -> {"functions": [{"takes", "required", "rest"}]} or {"error"}; then, as often as asked,
{"function": k, "rows": {name: list}, "limit_s"} -> {"values": [number, null, or a text that says what it was]}, {"length"} or {"error"}.
No torch and no numpy here: a worker is up at once, and imports what its functions import.
"""

import asyncio
import contextlib
import difflib
import faulthandler
import importlib
import importlib.util
import inspect
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from treetune.core.rollout import builtin, descendants, wire

GRACE_S = 5  # beyond the limit that the parent keeps: a worker whose parent was killed must end by itself
LONGEST = 400  # characters of a message
LARGEST = 1e30  # a reward beyond it overflows the moments that advantages are made of


class Loaded(NamedTuple):
    """A reward function, and which of the columns it takes."""

    call: Callable
    takes: list[str]
    required: list[str]
    rest: bool  # **kwargs: every column


def parse(name: str) -> tuple[str, dict]:
    """`path?option=value,option=value` as the path and its options; values are JSON where they can be, else text."""
    path, _, tail = name.partition("?")
    options = {}
    for part in filter(None, tail.replace("&", ",").split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"the option {part!r} of {path} has no value: write {path}?name=value,name=value")
        options[key] = _json(value)
    return path, options


def resolve(path: str) -> Callable:
    """The function of a built-in name, `module.function`, `module:function` or `path/to/file.py:function`.

    Errors: ValueError for what is none of these; whatever importing the module raises.
    """
    if path in builtin.BUILTIN:
        return builtin.BUILTIN[path]
    place, _, attribute = path.rpartition(":" if ":" in path else ".")
    if not place or not attribute:
        raise ValueError(f"{path!r} is not built in{_nearest(path)}: use {', '.join(builtin.BUILTIN)}, module.function or file.py:function")
    target = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    for part in attribute.split("."):
        if not hasattr(target, part):
            names = [name for name, value in vars(target).items() if inspect.isfunction(value)]
            raise ValueError(f"{place} has no {part}; its functions are {', '.join(names) or 'none'}")
        target = getattr(target, part)
    if not callable(target):
        raise ValueError(f"{path} is of type {type(target).__name__}, expected a function")
    return target


def load(name: str) -> Loaded:
    """A reward function with its options bound, and its columns. Errors: as `resolve`; ValueError for options it does not have."""
    path, options = parse(name)
    function = resolve(path)
    parameters = inspect.signature(function).parameters.values()
    rest = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    if only := [
        parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty
    ]:
        raise ValueError(f"{path} takes {only[0]} by position alone (before a /), but rewards are called by name: take the / out")
    _refuse_signature(path, parameters)
    named = [parameter for parameter in parameters if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)]
    fixed = {parameter.name for parameter in named if path in builtin.BUILTIN and parameter.kind is parameter.KEYWORD_ONLY}
    allowed = fixed if path in builtin.BUILTIN else {parameter.name for parameter in named}
    if unknown := [key for key in options if key not in allowed and not rest]:
        raise ValueError(f"{path} has no option {unknown[0]}; its options are {', '.join(sorted(allowed)) or 'none'}")
    columns = [parameter for parameter in named if parameter.name not in fixed | set(options)]
    needed = [parameter.name for parameter in columns if parameter.default is parameter.empty]
    if path in builtin.BUILTIN:
        function(**{column.name: [] for column in columns}, **options)  # it checks its options before it looks at rows
    return Loaded(partial(function, **options), [parameter.name for parameter in columns], needed, rest)


def _refuse_signature(path: str, parameters) -> None:
    """ValueError for a function that completions cannot be given to by name."""
    taken = [parameter.name for parameter in parameters if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters) or {"completions", "completion_ids"} & set(taken):
        return
    have = f"takes {', '.join(taken) or 'no named argument'}"
    raise ValueError(
        f"{path} {have}: columns are given by name, so write def {path.rpartition(':')[2].rpartition('.')[2]}(completions, **kwargs)"
    )


def call(loaded: Loaded, rows: dict) -> dict:
    """What a function says about rows, as a message; whatever it raises becomes a message too."""
    wanted = len(rows["completions"])  # a function may empty the lists that it is given
    try:
        values = loaded.call(**{name: values for name, values in rows.items() if loaded.rest or name in loaded.takes})
        if inspect.isawaitable(values):
            values = asyncio.run(_awaited(values))
        return _checked(values, wanted)
    except BaseException as error:  # what a foreign function raises, SystemExit included, costs its rows and nothing else
        return {"error": described(error)}
    finally:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)  # an alarm left over must not go off in the next call


def described(error: BaseException) -> str:
    """An exception in one line, with the place it comes from."""
    message = " ".join("".join(traceback.format_exception_only(error)).split())[:LONGEST]
    ours = ("<frozen importlib", importlib.__file__, __file__)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    return f"{message} ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else message


def main() -> None:
    """Answers messages until the channel closes."""
    channel, me = wire.standard_input(), os.getpid()
    # What functions leave behind stays below this process, and ends when the trainer is gone, however it ended.
    descendants.adopt()
    descendants.end_with(os.getppid())
    # It is the trainer that ends its workers on Ctrl-C: one that ended first would look like a fault of its function.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Only now, see -P in `reward_pool`: the worker has its own modules by here, and functions may import files of the folder.
    sys.path.insert(0, os.getcwd())
    functions: list[Loaded] = []
    with open(os.devnull, "w") as nowhere, contextlib.suppress(ConnectionError):  # the parent is gone: nobody wants to read why
        while (message := wire.receive(channel)) is not None:
            # A thread of C that needs no lock of the interpreter: it also ends a function that holds that lock for ever.
            faulthandler.dump_traceback_later(message["limit_s"] + GRACE_S, exit=True, file=nowhere)
            answer = _load_all(message["names"], functions) if "names" in message else call(functions[message["function"]], message["rows"])
            if os.getpid() != me:
                os._exit(1)  # a function forked and let its child return
            faulthandler.cancel_dump_traceback_later()
            wire.send(channel, answer)
    descendants.kill(me)


def _load_all(names: list[str], functions: list[Loaded]) -> dict:
    for name in names:
        try:
            functions.append(load(name))
        except ValueError as error:
            return {"error": f"reward {name}: {error}"}
        except BaseException as error:  # importing a foreign module can raise anything
            return {"error": f"reward {name} cannot be loaded in {os.getcwd()}: {described(error)}"}
    return {"functions": [{"takes": loaded.takes, "required": loaded.required, "rest": loaded.rest} for loaded in functions]}


def _checked(values, wanted: int) -> dict:
    if isinstance(values, str | bytes | dict | set) or not hasattr(values, "__iter__"):
        return {"length": f"returned {_shown(values)}, expected a list of {wanted} numbers, one for each completion"}
    values = list(values)
    if len(values) != wanted:
        return {"length": f"returned {len(values)} values for {wanted} completions, expected one for each"}
    return {"values": [_value(value) for value in values]}


def _value(value) -> float | str | None:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isfinite(number) and abs(number) > LARGEST:
        return f"gave {_shown(value)}, expected a number of size up to {LARGEST:g}: what is larger overflows advantages"
    return number if math.isfinite(number) else f"gave {_shown(value)}, expected a finite number or None"


def _shown(value) -> str:
    try:
        return f"{value!r:.60}"
    except Exception:  # an integer of thousands of digits, or a foreign class
        return f"a value of type {type(value).__name__}"


async def _awaited(values):
    return await values


def _json(value: str):
    try:
        return json.loads(value)
    except ValueError:
        return {"True": True, "False": False}.get(value, value)


def _nearest(path: str) -> str:
    near = difflib.get_close_matches(path, builtin.BUILTIN, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def _from_file(path: Path):
    """The module of a file, once: it may import its neighbours, and its name cannot hide another module's."""
    path = path.resolve()
    name = f"rewards_of_{path.stem}@{path.parent}"
    if name not in sys.modules:
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        # At the end: neighbours of the file must not hide modules that others import.
        sys.path.append(str(path.parent))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec and spec.loader
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


if __name__ == "__main__":
    main()
