"""Questions to a policy: what held-out rows ask, and the answers that they have.

n tokens of one document.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from treetune.core.data.prompts import Prompt
from treetune.core.data.trees import TreeDoc
from treetune.core.protocols import Tokenizer
from treetune.core.rollout import judge

OPENING = 16  # words or tokens of a text without a prompt, to go on from
REFERENCES = judge.REFERENCES  # columns of prompts that hold a good answer, see `judge.good_answer`


class Question(NamedTuple):
    """What is asked. prompt: as people read it. ids: up to where the answer begins. reference: a good answer, where one is known.

    row: its number in the data; None for a prompt of one's own. prompt_row: what rewards may look at, where the row is a prompt.
    end: the text of the token that ends the answer of the row, if one does.
    """

    prompt: str
    ids: list[int]
    reference: str | None = None
    row: int | None = None
    prompt_row: Prompt | None = None
    end: str = ""


def held_out(rows: Sequence[Any], count: int, tokenizer: Tokenizer, stop_ids: Sequence[int], length: int) -> list[Question]:
    """The questions of the first documents that have a prompt and an answer, or of the first prompts, at most `count`.

    length: tokens of the reference of a text without a prompt, which is asked to go on from its beginning.
    """
    found: list[Question] = []
    for row in rows:
        found += _of_prompt(row) if isinstance(row, Prompt) else _of_document(row, tokenizer, stop_ids, length)
        if len(found) == count:
            break
    return found


def _of_prompt(prompt: Prompt) -> list[Question]:
    return [Question(prompt.text, prompt.tokens.tolist(), judge.good_answer(prompt.columns), prompt.row, prompt)]


def _of_document(doc: Any, tokenizer: Tokenizer, stop_ids: Sequence[int], length: int) -> list[Question]:
    ids, answer = split(doc, length)
    reference = decode(answer, tokenizer, stop_ids)
    if not ids or not reference.strip():
        return []
    end = tokenizer.decode([token for token in answer if token in stop_ids][:1])
    return [Question(tokenizer.decode(ids, skip_special_tokens=True), ids, reference, doc.row, end=end)]


def split(doc: Any, length: int | None = None) -> tuple[list[int], list[int]]:
    """The ids of a document's prompt and of its answer: the last that is trained, of a pair the better one. Both empty where one lacks.

    A text that is trained from its beginning is asked to go on from its first tokens, for at most `length` tokens.
    """
    tokens, weight = _better(doc) if isinstance(doc, TreeDoc) else (doc.tokens, doc.weight)
    trained = np.flatnonzero(weight > 0)
    if len(trained) == 0:
        return [], []
    gaps = np.flatnonzero(np.diff(trained) > 1)
    begin, end = int(trained[gaps[-1] + 1] if len(gaps) else trained[0]), int(trained[-1]) + 1
    if begin < 2:  # at most the mark of a beginning is before it
        begin, end = OPENING, len(tokens) if length is None else OPENING + length
    answer = tokens[begin:end].tolist()
    return (tokens[:begin].tolist(), answer) if answer else ([], [])


def _better(doc: TreeDoc) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and weight of the prompt with its first answer; no weight where that one is marked bad."""
    inside = doc.branch <= 1
    desirable = bool(doc.extras.get("desirable", (True,))[0])
    return doc.tokens[inside], doc.weight[inside] * desirable


def decode(ids: Sequence[int], tokenizer: Tokenizer, stop_ids: Sequence[int]) -> str:
    """The text of an answer, up to the token that ends it."""
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    return tokenizer.decode(list(ids[:end]), skip_special_tokens=True)
