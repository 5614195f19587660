"""Rows that are tokens already: input_ids, labels (-100 where nothing is trained) and optionally attention_mask.

n tokens of one row.
"""

from collections.abc import Callable

import numpy as np

from treetune.core.data import sources, spans, turns
from treetune.core.data.rows import Row
from treetune.core.protocols import Tokenizer

IGNORED = -100


def reader(tokenizer: Tokenizer) -> Callable[[sources.Rows], list[spans.EncodedText]]:
    """A function from rows to tokens with weights; nothing is added and nothing tokenised. Padding (mask 0 at an end) is taken off.

    Errors: ValueError (row and field named) for ids outside the vocabulary, fields of different lengths, labels other than the
    token or -100, masked tokens between others, and labels on masked tokens.
    """
    size = len(tokenizer)
    return lambda rows: [encode_row(row, size, sources.locate_row(rows, i)) for i, row in enumerate(rows.rows)]


def encode_row(row: Row, vocabulary: int, location: str) -> spans.EncodedText:
    """One row's tokens [n] and weights [n]."""
    tokens, labels = (read_integers(row.get(name), f"{location}: field {name}") for name in ("input_ids", "labels"))
    mask_column = row.get("attention_mask")
    mask = np.ones_like(tokens) if mask_column is None else read_integers(mask_column, f"{location}: field attention_mask")
    for name, values in (("labels", labels), ("attention_mask", mask)):
        if len(values) != len(tokens):
            raise ValueError(f"{location}: field {name} has {len(values)} entries, expected {len(tokens)}, one for each of input_ids")
    _check(
        np.flatnonzero((tokens < 0) | (tokens >= vocabulary)), tokens, f"{location}: field input_ids", f"a token from 0 to {vocabulary - 1}"
    )
    _check(np.flatnonzero((mask != 0) & (mask != 1)), mask, f"{location}: field attention_mask", "0 or 1")
    wrong = (labels != IGNORED) & (labels != tokens)
    _check(np.flatnonzero(wrong), labels, f"{location}: field labels", "the token of input_ids there, or -100")
    _check(np.flatnonzero((labels != IGNORED) & (mask == 0)), labels, f"{location}: field labels", "-100 where attention_mask is 0")
    seen = np.flatnonzero(mask)
    begin, end = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, 0)
    _check(begin + np.flatnonzero(mask[begin:end] == 0), mask, f"{location}: field attention_mask", "1 between other tokens")
    weight = (labels[begin:end] != IGNORED).astype(np.float32)
    weight[:1] = 0.0
    return spans.EncodedText(tokens[begin:end].astype(np.int32), weight, 0, 0)


def read_integers(value: object, location: str) -> np.ndarray:
    """A list of whole numbers as int64 [n]. Errors: ValueError naming the field and the first entry that is none."""
    if not isinstance(value, list):
        raise ValueError(f"{location} is {turns.type_name(value)}, expected a list of whole numbers")
    wrong = next((i for i, entry in enumerate(value) if isinstance(entry, bool) or not isinstance(entry, int) or abs(entry) > 2**31), None)
    if wrong is not None:
        raise ValueError(f"{location}: entry {wrong + 1} is {sources.quote(value[wrong])}, expected a whole number below 2**31")
    return np.array(value, dtype=np.int64)


def _check(wrong: np.ndarray, values: np.ndarray, location: str, expected: str) -> None:
    if len(wrong):
        raise ValueError(f"{location}: entry {int(wrong[0]) + 1} is {int(values[wrong[0]])}, expected {expected}")
