"""Functions by name: the import path of each and the options that it takes. Imports no torch.

A function is imported when it is asked for, so that a command line can list names, and tell which options a choice reads, before torch is
loaded. `losses.presets` has the tables of losses. A new optimiser is one function of `core.optim` and one row here.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

from treetune.core import import_path


class Named(Protocol):
    """A row: an import path, and names of keyword-only parameters."""

    @property
    def function(self) -> str | Callable[..., Any]:
        """Import path `package.module.function`, or the function itself."""
        ...

    @property
    def takes(self) -> tuple[str, ...]:
        """Keyword-only parameters that options set."""
        ...


class Entry(NamedTuple):
    """A function, by its import path or itself, and the keyword-only parameters of it that options set."""

    function: str | Callable[..., Any]
    takes: tuple[str, ...] = ()

    @classmethod
    def of(cls, function: Callable[..., Any]) -> "Entry":
        """The row of a function; its keyword-only parameters are what it takes."""
        return cls(function, keywords(function))


_RULES = ("weight_decay", "decay", "lr_scale")
OPTIMIZERS: Mapping[str, Entry] = {
    "adamw": Entry("treetune.core.optim.adamw", ("b1", "b2", "eps", *_RULES)),
    "lion": Entry("treetune.core.optim.lion", ("b1", "b2", *_RULES)),
    "sgd": Entry("treetune.core.optim.sgd", ("momentum", *_RULES)),
}
SCHEDULES: Mapping[str, Entry] = {
    "cosine": Entry("treetune.core.optim.cosine", ("min_ratio",)),
    "linear": Entry("treetune.core.optim.linear", ("min_ratio",)),
    "constant": Entry("treetune.core.optim.constant"),
}


def keywords(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the keyword-only parameters that options may set: those that no partial has bound."""
    bound = function.keywords if isinstance(function, partial) else {}
    parameters = inspect.signature(function).parameters.values()
    return tuple(one.name for one in parameters if one.kind is one.KEYWORD_ONLY and one.name not in bound)


class Own(Protocol):
    """A row that can be made for a function of the user's."""

    @classmethod
    def of(cls, function: Callable[..., Any]) -> "Own":
        """The row of a function."""
        ...


R = TypeVar("R", bound=Own)


def choose(table: Mapping[str, R], text: str) -> R:
    """The row that a name stands for, or one like it for the function at an import path, which is imported now."""
    kind: Any = type(next(iter(table.values())))
    return table[text] if text in table else kind.of(import_path.load_guarded(text))


def resolve(function: str | Callable[..., Any]) -> Callable[..., Any]:
    """The function at the import path `package.module.function`; a function is itself."""
    if not isinstance(function, str):
        return function
    module, _, name = function.rpartition(".")
    return getattr(importlib.import_module(module), name)


def bind(entry: Named, **options: Any) -> Callable[..., Any]:
    """The function of a row, with those of `options` that it takes. An option that is left out keeps the function's own default."""
    function, chosen = resolve(entry.function), {name: options[name] for name in entry.takes if name in options}
    return partial(function, **chosen) if chosen else function
