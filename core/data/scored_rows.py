"""Rows for a reward model: answers, pairs and steps as documents to score, and what their scores amount to."""

from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import Any, NamedTuple, Protocol

from treetune.core import fields
from treetune.core.data import kinds, pack, row_formats, sources, trees
from treetune.core.data.dataset import Refuse
from treetune.core.data.rows import Advance, Message
from treetune.core.protocols import Tokenizer
from treetune.core.state import Batch

COLUMNS = ("score", "chosen_score", "rejected_score", "step_scores")  # what a row is given
Values = list[list[float]]  # for each document the scores of its sequences, or of its steps


class Settings(NamedTuple):
    """Which rows are read, and how they become documents: None leaves the choice to the format and the tokenizer."""

    data: Sequence[str]
    sequence_len: int
    overlong: str
    format: str = "auto"
    split: str = "train"
    max_rows: int | None = None
    chat_template: str | None = None
    step_separator: str | None = None


class ScoredRows(NamedTuple):
    """The rows of one data set and the documents that they became. labelled: whether the classes of steps are known; line: a report."""

    rows: sources.Rows
    format: str
    docs: list[trees.TreeDoc]
    line: str
    labelled: bool


class Forward(Protocol):
    """Scores of a stream by a reward model."""

    def __call__(self, batch: Batch, *, documents: int) -> Values:
        """The scores of each of the `documents` of the stream that are no padding."""
        ...


def detect(rows: sources.Rows, format: str, *, steps: bool) -> str:
    """The format of rows for a reward model, or for one of steps: as named, or by the columns for "auto".

    Errors: ValueError for a format or columns that the model does not score.
    """
    columns = set(sources.columns(rows))
    names = sources.join_names(sources.columns(rows))
    if steps:
        if format not in ("auto", *row_formats.of_kind("steps")) or not {"prompt", "completions"} <= columns:
            what = f"the columns {names}" if format in ("auto", *row_formats.of_kind("steps")) else f"format {format}"
            raise ValueError(f"{rows.name} has {what}: a process reward model scores rows of prompt + completions, a text for each step")
        return "stepwise_supervised"
    if format != "auto":
        return format if format in row_formats.of_kind("answers") else kinds.KINDS["ranked"].canonical(format)
    if {"chosen", "rejected"} <= columns:
        return kinds.KINDS["ranked"].detect(sources.columns(rows), rows.rows[0])
    single = row_formats.detect("answers", sources.columns(rows))
    if single is None:
        needs = "chosen + rejected, prompt + completion, or messages"
        raise ValueError(f"{rows.name} has the columns {names}: a reward model scores rows of {needs}; rename columns or name a --format")
    return single.name


def options(format: str, rows: sources.Rows) -> tuple[str, ...]:
    """Encoding options that rows of a format take."""
    if format in row_formats.of_kind("answers"):
        return row_formats.CHAT if format == "messages" or isinstance(rows.rows[0].get("prompt"), list) else ()
    return kinds.KINDS["steps" if format in row_formats.of_kind("steps") else "ranked"].takes(format, rows.rows[0])


def read(settings: Settings, tokenizer: Tokenizer, *, steps: bool, refuse: Refuse) -> list[ScoredRows]:
    """The documents of each data set, for a reward model or for one of steps.

    Errors: ValueError naming file, row and fix; what `refuse` raises for an encoding option that none of the rows takes.
    """
    data = []
    for path in settings.data:
        with fields.reading(path):
            rows = sources.read(path, split=settings.split, limit=settings.max_rows)
        data.append(encode(rows, detect(rows, settings.format, steps=steps), tokenizer, settings))
    used = {option for scored in data for option in options(scored.format, scored.rows)}
    reason = f"rows of format {', '.join(sorted({scored.format for scored in data}))} do not take it"
    refuse({name: reason for name in ("chat_template", "step_separator") if name not in used})
    return data


def check_columns(rows: sources.Rows) -> None:
    """Errors: ValueError for rows that have a column which their scores would go to."""
    if taken := [name for name in COLUMNS if name in sources.columns(rows)]:
        raise ValueError(f"{rows.name} has a column {taken[0]} already, which --output would write over: rename it")


def encode(rows: sources.Rows, format: str, tokenizer: Tokenizer, settings: Settings) -> ScoredRows:
    """The documents of rows of a format. Errors: ValueError naming file, row and fix."""
    lengths: dict[str, Any] = {"sequence_len": settings.sequence_len, "overlong": settings.overlong}
    chat: dict[str, Any] = {"chat_template": settings.chat_template} if "chat_template" in options(format, rows) else {}
    labelled = format in row_formats.of_kind("steps") and "labels" in sources.columns(rows)
    answers = row_formats.of_kind("answers")
    if format in answers:
        watched = sources.track_reads(rows)
        docs, report = trees.encode_rows(watched, answers[format].reader(), tokenizer, name=format, distinct=False, **lengths, **chat)
        report = kinds.with_unread(report, watched)
    elif format in row_formats.of_kind("steps"):
        step_options = {} if settings.step_separator is None else {"step_separator": settings.step_separator}
        labels = rows if labelled else _with_labels(rows)
        docs, report = kinds.KINDS["steps"].encode(labels, tokenizer, format=format, format_options=step_options, **lengths)
    else:
        docs, report = kinds.KINDS["ranked"].encode(rows, tokenizer, format=format, format_options=chat, **lengths)
    return ScoredRows(rows, format, docs, f"rows of {rows.name}: {trees.describe_trees(report)}", labelled)


def _with_labels(rows: sources.Rows) -> sources.Rows:
    """Stepwise rows without labels, given some: only the places where steps end are read."""
    counts = [len(steps) if isinstance(steps := row.get("completions"), list) else 0 for row in rows.rows]
    return rows._replace(rows=[row | {"labels": [True] * count} for row, count in zip(rows.rows, counts, strict=True)])


def score(docs: Sequence[trees.TreeDoc], forward: Forward, *, read: str, budget: int, pad: bool, progress: Advance) -> Values:
    """The scores of each document, in forward passes of up to `budget` tokens, or of so many if `pad`; progress counts documents."""
    values: Values = [[] for _ in docs]
    for group in pack.pack([len(doc.tokens) for doc in docs], budget, seed=None):
        batch = score_batch([docs[i] for i in group], forward, read=read, pad_to=budget if pad else None)
        for i, value in zip(group, batch, strict=True):
            values[i] = value
        progress(len(group))
    return values


def score_batch(docs: Sequence[trees.TreeDoc], forward: Forward, *, read: str, pad_to: int | None = None) -> Values:
    """The scores of documents in one forward pass. read: what the head scores, as of `pack.collate_trees`."""
    return forward(pack.collate_trees(docs, read=read, budget=pad_to, pad=pad_to is not None), documents=len(docs))


def describe(scored: ScoredRows, values: Values) -> dict[str, str]:
    """Lines by name: how many scores there are, their mean, and accuracy where it is known what should score higher."""
    if scored.format in row_formats.of_kind("steps"):
        return _describe_steps(scored, values)
    if scored.format in row_formats.of_kind("answers"):
        flat = [value[0] for value in values]
        spread = f"deviation {pstdev(flat):.4f}, from {min(flat):.4f} to {max(flat):.4f}"
        return {"answers": str(len(flat)), "score": f"{fmean(flat):.4f} on average, {spread}"}
    margins = [chosen - rejected for chosen, rejected in values]
    means = [fmean(side) for side in zip(*values, strict=True)]
    return {
        "pairs": str(len(values)),
        "accuracy": f"{fmean(margin > 0 for margin in margins):.4f} (chosen scores above rejected)",
        "margin": f"{fmean(margins):.4f} on average",
        "score": f"chosen {means[0]:.4f}, rejected {means[1]:.4f} on average",
    }


def _describe_steps(scored: ScoredRows, values: Values) -> dict[str, str]:
    flat = [value for row in values for value in row]
    lines = {"steps": f"{len(flat)} in {len(values)} rows", "score": f"{fmean(flat):.4f} on average (probability that a step is good)"}
    if not scored.labelled:
        return lines
    classes = [int(label) for doc in scored.docs if doc.classes is not None for label in doc.classes[doc.classes >= 0]]
    hits = [(label, (value > 0.5) == bool(label)) for label, value in zip(classes, flat, strict=True)]
    by_label = {name: [hit for label, hit in hits if label == number] for name, number in (("good", 1), ("bad", 0))}
    parts = [f"{fmean(group):.4f} of {len(group)} {name}" for name, group in by_label.items() if group]
    return lines | {"accuracy": f"{fmean(hit for _, hit in hits):.4f} ({', '.join(parts)})"}


def lines(scored: ScoredRows, values: Values, count: int) -> list[str]:
    """The scores of the first rows, each with where it is."""
    places = (sources.locate_row(scored.rows, scored.rows.numbers.index(doc.row)) for doc in scored.docs[:count])
    return [f"  {place}: {' '.join(f'{score:.4f}' for score in value)}" for place, value in zip(places, values, strict=False)]


def records(scored: ScoredRows, values: Values) -> list[Message]:
    """Each row that was scored, with its scores in further columns."""
    rows = dict(zip(scored.rows.numbers, scored.rows.rows, strict=True))
    return [rows[doc.row] | _columns(scored.format, value) for doc, value in zip(scored.docs, values, strict=True)]


def _columns(format: str, value: list[float]) -> dict[str, Any]:
    if format in row_formats.of_kind("steps"):
        return {"step_scores": value}
    return (
        {"score": value[0]}
        if format in row_formats.of_kind("answers")
        else dict(zip(("chosen_score", "rejected_score"), value, strict=True))
    )
