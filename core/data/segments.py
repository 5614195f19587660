"""input_output rows: a text in segments, each trained or not. Nothing is added: BOS, EOS, blanks and newlines are the row's own."""

from collections.abc import Callable
from itertools import pairwise

from treetune.core.data import instruction, sources, spans, turns
from treetune.core.data.rows import Row
from treetune.core.protocols import Tokenizer


def reader(tokenizer: Tokenizer, *, train_on_inputs: bool = False) -> Callable[[sources.Rows], list[spans.Text]]:
    """Reader of segments: the `segments` of a row one after another, those with label true trained.

    Trained neighbours are one stretch, so a token across their border is trained too. train_on_inputs: every token is trained.
    Errors: ValueError for rows without segments, or segments without a text and a label (named).
    """

    def text(row: Row, location: str) -> spans.Text:
        parts = read_segments(row, location)
        joined = "".join(part for part, _ in parts)
        if train_on_inputs:
            return spans.Text(joined, (), whole=bool(joined))
        trained = tuple(spans.Turn(begin, end, end, end, 1.0, 0.0) for begin, end in trained_stretches(parts))
        return spans.Text(joined, trained, trailing_space_boundaries=count_trailing_spaces(parts))

    return lambda rows: [text(row, sources.locate_row(rows, i)) for i, row in enumerate(rows.rows)]


def read_segments(row: Row, location: str) -> list[tuple[str, bool]]:
    """(text, whether it is trained) in order. Errors: ValueError naming row, segment and field."""
    value = row.get("segments")
    if not isinstance(value, list) or not value:
        raise ValueError(f"{location}: field segments is {turns.type_name(value)}, expected a list of objects with text and label")
    for i, part in enumerate(value, 1):
        here = f"{location}: field segments, segment {i}"
        if not isinstance(part, dict):
            raise ValueError(f"{here} is {turns.type_name(part)}, expected an object with text and label")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{here}: field text is {turns.type_name(part.get('text'))}, expected text")
        if not isinstance(part.get("label"), bool):
            raise ValueError(f"{here}: field label is {sources.quote(part.get('label'))}, expected true or false")
    return [(part["text"], part["label"]) for part in value]


def count_trailing_spaces(parts: list[tuple[str, bool]]) -> int:
    """Borders between a trained segment and another that come right after a space."""
    nonempty = [(text, label) for text, label in parts if text]
    return sum(a[1] != b[1] and instruction.trailing_space(a[0], b[0]) for a, b in pairwise(nonempty))


def trained_stretches(parts: list[tuple[str, bool]]) -> list[tuple[int, int]]:
    """Characters [begin, end) of the trained stretches, neighbours joined."""
    stretches, begin = [], 0
    for text, label in parts:
        end = begin + len(text)
        if label and text and stretches and stretches[-1][1] == begin:
            stretches[-1] = (stretches[-1][0], end)
        elif label and text:
            stretches.append((begin, end))
        begin = end
    return stretches
