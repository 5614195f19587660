"""Passages of documents on a terminal: in colours, or with marks where there are none."""

from collections.abc import Sequence

from rich.text import Text

from treetune.core import masking
from treetune.core.data.passages import MEANINGS, Passage, Pieces, join_runs

STYLES = {"on": "black on green", "bad": "black on red", "half": "black on yellow", "off": "dim"}  # by label of a passage
MARKS = {"on": ("[[", "]]"), "bad": ("{{", "}}"), "half": ("((", "))"), "off": ("", "")}


def colour(pieces: Pieces) -> Text:
    """The pieces for a terminal with colours."""
    return Text.assemble(*((masking.escape_controls("".join(texts)), STYLES[label]) for label, texts in join_runs(pieces)))


def mark(pieces: Pieces) -> str:
    """The pieces with marks around what is not read only, for a terminal without colours."""
    return "".join(f"{MARKS[label][0]}{''.join(texts)}{MARKS[label][1]}" for label, texts in join_runs(pieces))


def legend(parts: Sequence[Passage]) -> str:
    """What the marks of these passages mean, in a line."""
    labels = {label for part in parts for _, label in part.pieces}
    return ", ".join(f"{MARKS[label][0]}{meaning}{MARKS[label][1]}" for label, meaning in MEANINGS.items() if label in labels)
