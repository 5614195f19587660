"""HTML pages in one file: nothing fetched, for light and dark and for phones. Only the page of a run that goes on has a script."""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from treetune.core import drafts, masking, owned
from treetune.core.data import passages
from treetune.core.data.spans import Doc
from treetune.core.data.trees import TreeDoc
from treetune.core.run import curves

FOLDER = Path(__file__).parent / "pages"
SIZES = {"width": curves.WIDTH, "height": curves.HEIGHT, "left": curves.LEFT, "right": curves.RIGHT}
LONG = 8  # blanks in a row that are counted instead of drawn
_INSIDE = re.compile(rf"\n{{3,}}|\n|\t+| {{{LONG + 1},}}|{masking.ESCAPES}")
_ENDS = re.compile(rf"\A +| +(?=\n|\Z)|{_INSIDE.pattern}")


def mark_blanks(text: str, *, ends: bool = True) -> Iterator[tuple[str, str]]:
    """(class, part) of a text: class "" for what can be seen, a CSS class for line breaks, tabs, long gaps and control characters.

    ends: whether spaces at both ends of the text and of its lines are marked, too.
    """
    escaped, end = masking.escape_controls(text), 0
    for match in (_ENDS if ends else _INSIDE).finditer(escaped):
        part = match.group()
        if part.startswith("\\") and part in text:
            continue  # the text itself has a backslash there
        if match.start() > end:
            yield "", escaped[end : match.start()]
        end = match.end()
        yield from _blank(part)
    if end < len(escaped):
        yield "", escaped[end:]


def _blank(part: str) -> Iterator[tuple[str, str]]:
    if part.startswith("\\"):
        yield "code", part
    elif part == "\n":
        yield "nl", part
    elif part[0] == "\n":
        yield "gap", f"{len(part)} line breaks"
        yield "", "\n"
    elif part[0] == "\t":
        yield "tab", part
    else:
        yield ("gap", f"{len(part)} spaces") if len(part) > LONG else ("space", part)


def documents(docs: Sequence[Doc | TreeDoc], tokenizer: Any, read: str | None) -> dict[str, Any]:
    """Values for the macros `documents` and `legend`: (row, passages) of each document, and the labels that occur in them."""
    rows = [(doc.row, passages.split(doc, tokenizer, read)) for doc in docs]
    return {"docs": rows, "labels": {label for _, parts in rows for part in parts for _, label in part.pieces}}


def write_documents(path: Path, values: dict[str, Any], *, name: str, rows: Mapping[str, str], histogram: str) -> None:
    """Write the page of some documents (`documents`), with lines by name and the histogram of their lengths before them."""
    text = render("rows.jinja", name=name, rows=rows, histogram=histogram, **values)
    path.parent.mkdir(parents=True, exist_ok=True)
    drafts.write(path, text)


def render(template: str, *, name: str, **values: Any) -> str:
    """The page that a file of `pages/` makes of these values; every text is escaped."""
    source = _text("parts.jinja") + _text("head.jinja") + _text(template)
    return _compiled(source).render(name=name, style=_text("style.css"), **values)


def part(template: str, **values: Any) -> str:
    """A part of a page: what a template makes of these values with the macros of `parts.jinja`, a file of `pages/` or a line."""
    return _compiled(_text("parts.jinja") + (_text(template) if template.endswith(".jinja") else template)).render(**values)


@functools.cache
def _text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


@functools.cache
def _compiled(source: str) -> Any:
    """A template: compiling takes longer than writing a page."""
    import jinja2

    environment = jinja2.Environment(autoescape=True)
    environment.globals |= {"mark_blanks": mark_blanks, "join_runs": passages.join_runs, "meanings": passages.MEANINGS}
    environment.globals |= {"beginning": owned.PAGE, **SIZES}
    return environment.from_string(source)
