"""Pages that open anywhere: one file of HTML, without scripts and without anything fetched, for light and dark and for phones."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from treetune.cli import curves, guard, passages, terminal

FOLDER = Path(__file__).parent / "pages"
SIZES = {"width": curves.WIDTH, "height": curves.HEIGHT, "left": curves.LEFT, "right": curves.RIGHT}
LONG = 8  # blanks in a row that are counted instead of drawn
CODES = r"\\x[0-9a-f]{2}|\\u[0-9a-f]{4}"  # what `terminal.safe` writes
_INSIDE = re.compile(rf"\n{{3,}}|\n|\t+| {{{LONG + 1},}}|{CODES}")
_ENDS = re.compile(rf"\A +| +(?=\n|\Z)|{_INSIDE.pattern}")


def visible(text: str, *, ends: bool = True) -> Iterator[tuple[str, str]]:
    """(kind, part) of a text: kind "" for what can be seen, a CSS class for line breaks, tabs, long gaps and control characters.

    ends: spaces at both ends of the text and of its lines are marked, too.
    """
    shown, end = terminal.safe(text), 0
    for match in (_ENDS if ends else _INSIDE).finditer(shown):
        part = match.group()
        if part.startswith("\\") and part in text:
            continue  # the text itself has a backslash there
        if match.start() > end:
            yield "", shown[end : match.start()]
        end = match.end()
        yield from _blank(part)
    if end < len(shown):
        yield "", shown[end:]


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


def documents(docs: Sequence, tokenizer: Any, kind: Any) -> dict[str, Any]:
    """`shown`, documents as the template of that name takes them, and `hows`, what occurs in them."""
    shown = [(doc.row, passages.of(doc, tokenizer, kind)) for doc in docs]
    return {"shown": shown, "hows": {how for _, parts in shown for part in parts for _, how in part.pieces}}


def render(template: str, *, name: str, **values: Any) -> str:
    """The page that a file of `pages/` makes of these values; every text is escaped."""
    import jinja2

    environment = jinja2.Environment(autoescape=True)
    environment.globals |= {"visible": visible, "runs": passages.runs, "meanings": passages.MEANINGS, "beginning": guard.PAGE, **SIZES}
    source, style = ((FOLDER / file).read_text(encoding="utf-8") for file in ("parts.jinja", "style.css"))
    return environment.from_string(source + (FOLDER / template).read_text(encoding="utf-8")).render(name=name, style=style, **values)
