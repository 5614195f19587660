"""What the help says of each option: the text below its field, or in its mark. Imports no torch."""

import ast
import dataclasses
import functools
import inspect
import textwrap
import typing
from collections.abc import Iterator
from typing import Any


@functools.cache
def texts(config: type) -> dict[str, str]:
    """{option: what it is} of a config class and its groups."""
    out: dict[str, str] = {}
    kinds = typing.get_type_hints(config)
    for entry in dataclasses.fields(config):
        if dataclasses.is_dataclass(kinds[entry.name]):
            out |= texts(kinds[entry.name])
    return out | _own(config)


def _own(config: type) -> dict[str, str]:
    out: dict[str, str] = {}
    marked = typing.get_type_hints(config, include_extras=True)
    for owner in reversed(config.__mro__):
        if dataclasses.is_dataclass(owner):
            out |= dict(_below(owner))
    helps = {name: _help(kind) for name, kind in marked.items()}
    return out | {name: text for name, text in helps.items() if text}


def _below(owner: type) -> Iterator[tuple[str, str]]:
    """(field, text below it) of one class."""
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]).body
    for field, text in zip(body, body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            value = text.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield field.target.id, " ".join(value.value.split())


def _help(kind: Any) -> str:
    """The text of a mark `arg(help=...)`."""
    return next((mark.help for mark in getattr(kind, "__metadata__", ()) if getattr(mark, "help", None)), "")
