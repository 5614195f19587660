"""Go's text/template, as far as Ollama's chat templates for text go: fields, strings, `if`, `range`, `eq`, `ne`, `not`, `and`, `or`, `len`.

Source: pkg.go.dev/text/template. Values are texts, numbers, booleans, lists and mappings.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

ACTION = re.compile(r"\{\{(- )?(.*?)( -)?\}\}", re.S)
WORD = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|`[^`]*`|[()]|[^\s()"`]+)""")
BLANKS = " \t\r\n"  # what trim markers take away
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "eq": lambda first, *others: any(first == other for other in others),
    "ne": lambda first, other: first != other,
    "not": lambda value: not value,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
    "len": len,
}

Piece = tuple[str, str]  # "text" and the text, or "action" and what it says


def render(text: str, data: Mapping[str, Any]) -> str:
    """The text that a template writes. Errors: ValueError for what is not of the subset, or not well formed."""
    pieces = list(_pieces(text))
    out, end = _run(pieces, 0, data, data, write=True)
    if end != len(pieces):
        raise ValueError(f"the template has {pieces[end][1]!r} that ends nothing")
    return out


def _pieces(text: str) -> Iterator[Piece]:
    begin, trimmed = 0, False
    for match in ACTION.finditer(text):
        before = text[begin : match.start()]
        before = before.lstrip(BLANKS) if trimmed else before
        yield "text", before.rstrip(BLANKS) if match[1] else before
        if not match[2].strip().startswith("/*"):
            yield "action", match[2].strip()
        begin, trimmed = match.end(), bool(match[3])
    yield "text", text[begin:].lstrip(BLANKS) if trimmed else text[begin:]


def _run(pieces: list[Piece], at: int, dot: Any, root: Any, *, write: bool) -> tuple[str, int]:
    """What is written up to the `else` or `end` that closes this block, and where that is."""
    out = []
    while at < len(pieces):
        kind, said = pieces[at]
        word = said.partition(" ")[0]
        if kind == "text":
            out.append(said)
        elif word in ("else", "end"):
            break
        elif word in ("if", "range"):
            text, at = (_branch if word == "if" else _loop)(pieces, at, said.partition(" ")[2], dot, root, write)
            out.append(text)
        elif write:
            out.append(_shown(_value(said, dot, root)))
        at += 1
    return "".join(out) if write else "", at


def _branch(pieces: list[Piece], at: int, condition: str, dot: Any, root: Any, write: bool) -> tuple[str, int]:
    """What `if` writes, and where its `end` is."""
    holds = write and bool(_value(condition, dot, root))
    text, at = _run(pieces, at + 1, dot, root, write=holds)
    if at == len(pieces):
        raise ValueError("the template has an if without its end")
    said = pieces[at][1]
    if said == "end":
        return text, at
    if said == "else":
        other, at = _run(pieces, at + 1, dot, root, write=write and not holds)
        if at == len(pieces) or pieces[at][1] != "end":
            raise ValueError("the template has an else without its end")
        return text + other, at
    other, at = _branch(pieces, at, said.removeprefix("else if "), dot, root, write and not holds)
    return text + other, at


def _loop(pieces: list[Piece], at: int, over: str, dot: Any, root: Any, write: bool) -> tuple[str, int]:
    """What `range` writes, and where its `end` is."""
    _, end = _run(pieces, at + 1, dot, root, write=False)
    if end == len(pieces) or pieces[end][1] != "end":
        raise ValueError("the template has a range without its end")
    values = (_value(over, dot, root) or ()) if write else ()
    return "".join(_run(pieces, at + 1, value, root, write=True)[0] for value in values), end


def _value(said: str, dot: Any, root: Any) -> Any:
    words = WORD.findall(said)
    value, rest = _call(words, dot, root)
    if rest or not words:
        raise ValueError(f"{said!r} is not of the part of Go's templates that is known here")
    return value


def _call(words: list[str], dot: Any, root: Any) -> tuple[Any, list[str]]:
    """A function with its arguments, or a single term; and the words behind it."""
    if words and words[0] in FUNCTIONS:
        name, words, values = words[0], words[1:], []
        while words and words[0] != ")":
            value, words = _term(words, dot, root)
            values.append(value)
        return FUNCTIONS[name](*values), words
    return _term(words, dot, root)


def _term(words: list[str], dot: Any, root: Any) -> tuple[Any, list[str]]:
    word, rest = (words[0], words[1:]) if words else ("", [])
    if word == "(":
        value, rest = _call(rest, dot, root)
        if rest[:1] != [")"]:
            raise ValueError("the template has a ( without its )")
        return value, rest[1:]
    if word[:1] in ('"', "`"):
        return json.loads(word) if word[0] == '"' else word[1:-1], rest
    if re.fullmatch(r"-?\d+|true|false", word):
        return json.loads(word), rest
    if re.fullmatch(r"\$?(\.\w*)(\.\w+)*|\$", word):
        value = root if word[0] == "$" else dot
        for name in filter(None, word.lstrip("$").split(".")):
            value = value.get(name, "")
        return value, rest
    raise ValueError(f"{word!r} is not of the part of Go's templates that is known here")


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
