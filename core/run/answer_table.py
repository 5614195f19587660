"""The table of a page: answers to held-out prompts by evaluation, beside the answers of their rows."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from treetune.core.records import JsonRecord

PROMPTS, EVALUATIONS = 50, 8  # at most on a page


class Row(NamedTuple):
    """A prompt. answers: one for each evaluation, None where it was not asked. reference: None where none is known."""

    number: int
    prompt: str
    reference: str | None
    answers: list[JsonRecord | None]


class Table(NamedTuple):
    """Rows, the steps of the evaluations from the last to the first, and how many prompts and evaluations are left out."""

    rows: list[Row]
    steps: list[int]
    more_prompts: int = 0
    more_evaluations: int = 0


def is_answer(record: JsonRecord) -> bool:
    """Whether a record of samples.jsonl is an answer to a held-out prompt."""
    return "row" in record


def build(records: Iterable[JsonRecord], steps: Sequence[int]) -> Table | None:
    """The table of the answers among records of samples.jsonl, of the first prompts and of evaluations all through the run.

    steps: of all evaluations. None where nothing was asked.
    """
    chosen = _spread(steps)
    found: dict[tuple[int, str], dict[int, JsonRecord] | None] = {}
    for record in records:
        if not is_answer(record):
            continue
        key = record["row"], record["prompt"]
        answers = found.setdefault(key, {} if len(found) < PROMPTS else None)
        if answers is not None and record["step"] in chosen:
            answers[record["step"]] = record
    asked = [answers for answers in found.values() if answers]
    if not asked:
        return None
    columns = sorted({step for answers in asked for step in answers}, reverse=True)
    rows = [_row(answers, columns) for answers in asked]
    return Table(rows, columns, len(found) - len(rows), len(set(steps)) - len(chosen))


def _row(answers: dict[int, JsonRecord], steps: Sequence[int]) -> Row:
    one = next(iter(answers.values()))
    return Row(one["row"], one["prompt"], one.get("reference"), [answers.get(step) for step in steps])


def _spread(steps: Sequence[int]) -> set[int]:
    """The first step, the last, and others as far apart as can be."""
    ordered = sorted(set(steps))
    if len(ordered) <= EVALUATIONS:
        return set(ordered)
    return {ordered[round(i * (len(ordered) - 1) / (EVALUATIONS - 1))] for i in range(EVALUATIONS)}
