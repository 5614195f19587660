"""From data options to documents: read, split, encode, and say what became of the rows."""

from pathlib import Path
from typing import NamedTuple

from treetune.cli.options import DataOptions, PretrainData, RowOptions
from treetune.core.data import formats, loader, sources
from treetune.core.data.spans import Doc


class Corpus(NamedTuple):
    """Documents to train on and to hold out, the row behind the first held-out one, and a line per data set."""

    train: list[Doc]
    val: list[Doc]
    first_row: dict | None
    lines: list[str]


def template(text: str | None) -> str | None:
    """Jinja text, or what a .jinja file holds."""
    if text is None or not text.endswith((".jinja", ".jinja2")):
        return text
    if not Path(text).is_file():
        raise ValueError(f"chat template file {text} does not exist")
    return Path(text).read_text()


def _encoding(options: RowOptions | PretrainData, name: str) -> dict:
    """The encoder's options that this format takes."""
    if isinstance(options, PretrainData):
        return {"field": options.text_column}
    if name == "completion":
        return {}
    if name == "alpaca":
        return {"train_on_inputs": options.train_on_inputs}
    chat = {"roles_to_train": options.roles_to_train, "train_on_eos": options.train_on_eos, "train_on_inputs": options.train_on_inputs}
    return chat | {"chat_template": template(options.chat_template)}


def _format(options: RowOptions | PretrainData, rows: sources.Rows) -> str:
    if isinstance(options, PretrainData):
        return "completion"
    return formats.detect(sources.columns(rows)) if options.format == "auto" else options.format


def ignored(options: RowOptions, names: set[str]) -> dict[str, str]:
    """Options that rows of these formats would ignore, with the reason."""
    out = {}
    if "chat" not in names:
        out |= {key: "the rows are not chats" for key in ("chat_template", "roles_to_train", "train_on_eos")}
    if names == {"completion"}:
        out |= {"train_on_inputs": "every token of raw text is trained on", "overlong": "raw text is split, not dropped"}
    return out


def _encode(rows: sources.Rows, options: RowOptions | PretrainData, tokenizer) -> tuple[list[Doc], formats.Report]:
    name = _format(options, rows)
    overlong = "split" if name == "completion" else options.overlong
    encoding = _encoding(options, name)
    return formats.encode_rows(rows, tokenizer, format=name, sequence_len=options.sequence_len, overlong=overlong, **encoding)


def encode_all(parts: list[sources.Rows], options, tokenizer, label: str) -> tuple[list[Doc], list[str], set[str]]:
    """Documents of several data sets with rows numbered through, a line about each, and their formats."""
    docs, lines, names, offset = [], [], set(), 0
    for rows in parts:
        found, report = _encode(rows, options, tokenizer)
        docs += [doc._replace(row=doc.row + offset) for doc in found]
        offset += max(rows.numbers, default=0) + 1
        lines.append(f"{label} {rows.name}: {formats.describe(report)}")
        names.add(report.format)
    return docs, lines, names


def read_all(paths: tuple[str, ...], options: RowOptions | PretrainData) -> list[sources.Rows]:
    """The rows of each named file or data set."""
    return [sources.read(path, split=options.split, limit=options.max_rows) for path in paths]


def load(options: DataOptions | PretrainData, tokenizer, *, seed: int) -> tuple[Corpus, set[str]]:
    """Documents for training and evaluation, and the formats they came in. Errors: ValueError naming file, row and fix."""
    if not options.data:
        raise ValueError("no training data: give --data at least one file or data set")
    parts, held = read_all(options.data, options), read_all(options.val_data, options)
    if not held and options.val_set_size:
        size = options.val_set_size if options.val_set_size < 1 else int(options.val_set_size)
        pairs = [sources.val_split(rows, size, seed) for rows in parts]
        parts, held = [train for train, _ in pairs], [val for _, val in pairs]
    train, lines, names = encode_all(parts, options, tokenizer, "train")
    val, val_lines, val_names = encode_all(held, options, tokenizer, "held out") if held else ([], [], set())
    return Corpus(train, val, held[0].rows[0] if held else None, lines + val_lines), names | val_names


def batching(options: RowOptions | PretrainData, micro_batch_size: int) -> dict:
    """How documents form micro-batches: a token budget when packing, else a number of rows."""
    if options.sample_packing:
        return {"budget": micro_batch_size * options.sequence_len}
    return {"rows": micro_batch_size}


def lengths(docs: list[Doc]) -> list[int]:
    """Tokens of each document."""
    return [len(doc.tokens) for doc in docs]


def total_steps(docs: list[Doc], *, epochs: int, max_steps: int | None, **options) -> int:
    """Optimiser steps of a whole run."""
    sizes, accum, world = lengths(docs), options.pop("accum"), options.pop("world")
    planned = 0
    for epoch in range(epochs):
        planned += loader.steps_per_epoch(sizes, accum=accum, world=world, epoch=epoch, **options)
        if max_steps is not None and planned >= max_steps:
            return max_steps
    return planned
