"""From data options to documents: read, split, encode, and say what became of the rows."""

from pathlib import Path
from typing import NamedTuple

from treetune.cli import parse
from treetune.cli.options import DataOptions, PretrainData, RowOptions
from treetune.core.data import formats, loader, sources
from treetune.core.data.spans import Doc
from treetune.models.dense import Config


class Corpus(NamedTuple):
    """Documents to train on and to hold out, the first held-out row, its format, and a line per data set."""

    train: list[Doc]
    val: list[Doc]
    first_row: dict | None
    format: str
    lines: list[str]


def template(text: str | None) -> str | None:
    """Jinja text, or what a .jinja file holds."""
    if text is None or not text.endswith((".jinja", ".jinja2")):
        return text
    if not Path(text).is_file():
        raise ValueError(f"chat template file {text} does not exist")
    return Path(text).read_text(encoding="utf-8")


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


def ignored(options: RowOptions | PretrainData, names: set[str]) -> dict[str, str]:
    """Options that rows of these formats would ignore, with the reason."""
    out = {}
    if isinstance(options, PretrainData):
        return out
    if "chat" not in names:
        out |= {key: "the rows are not chats" for key in ("chat_template", "roles_to_train", "train_on_eos")}
    if names == {"completion"}:
        out |= {"train_on_inputs": "every token of raw text is trained on", "overlong": "raw text is split, not dropped"}
    return out


def _encode(rows: sources.Rows, name: str, options: RowOptions | PretrainData, tokenizer) -> tuple[list[Doc], formats.Report]:
    overlong = "split" if name == "completion" else options.overlong
    encoding = _encoding(options, name)
    return formats.encode_rows(rows, tokenizer, format=name, sequence_len=options.sequence_len, overlong=overlong, **encoding)


def encode_all(parts: list[sources.Rows], names: list[str], options, tokenizer, label: str) -> tuple[list[Doc], list[str]]:
    """Documents of several data sets, in the named formats, with rows numbered through, and a line about each."""
    docs, lines, offset = [], [], 0
    for rows, name in zip(parts, names, strict=True):
        found, report = _encode(rows, name, options, tokenizer)
        docs += [doc._replace(row=doc.row + offset) for doc in found]
        offset += max(rows.numbers, default=0) + 1
        lines.append(f"{label} {rows.name}: {formats.describe(report)}")
    return docs, lines


def formats_of(parts: list[sources.Rows], options: RowOptions | PretrainData) -> list[str]:
    """The format of each data set, as named or by its columns. Found before any split: a part may lack a column."""
    return [_format(options, rows) for rows in parts]


def read_all(paths: tuple[str, ...], options: RowOptions | PretrainData) -> list[sources.Rows]:
    """The rows of each named file or data set."""
    return [sources.read(path, split=options.split, limit=options.max_rows) for path in paths]


def read_and_encode(options: RowOptions, tokenizer, *, given: frozenset[str]) -> tuple[list[Doc], list[str]]:
    """All documents of the data sets and a line about each, for commands that hold nothing out."""
    parts = read_all(options.data, options)
    names = formats_of(parts, options)
    parse.refuse_ignored(given, ignored(options, set(names)))
    return encode_all(parts, names, options, tokenizer, "rows of")


def load(options: DataOptions | PretrainData, tokenizer, *, seed: int, given: frozenset[str]) -> Corpus:
    """Documents for training and evaluation. Errors: ValueError naming file, row and fix; BadInput for options that would be ignored."""
    if not options.data:
        raise ValueError("no training data: give --data at least one file or data set")
    parts, held = read_all(options.data, options), read_all(options.val_data, options)
    names, held_names = formats_of(parts, options), formats_of(held, options)
    parse.refuse_ignored(given, ignored(options, {*names, *held_names}))
    if not held and options.val_set_size:
        size = options.val_set_size if options.val_set_size < 1 else int(options.val_set_size)
        pairs = [sources.val_split(rows, size, seed) for rows in parts]
        parts, held, held_names = [train for train, _ in pairs], [val for _, val in pairs], names
    train, lines = encode_all(parts, names, options, tokenizer, "train")
    val, val_lines = encode_all(held, held_names, options, tokenizer, "held out")
    first = held[0].rows[0] if held else None
    return Corpus(train, val, first, (held_names or names)[0], lines + val_lines)


def check_fits(docs: list[Doc], sequence_len: int, cfg: Config) -> None:
    """Raise ValueError when documents may be longer than the model's positions, or hold ids that its vocabulary lacks."""
    if sequence_len > cfg.max_positions:
        raise ValueError(f"sequence_len {sequence_len} is longer than the {cfg.max_positions} positions of the model")
    largest = max(int(doc.tokens.max()) for doc in docs)
    if largest >= cfg.vocab_size:
        raise ValueError(f"the rows hold token id {largest}, the model has {cfg.vocab_size}: the tokenizer is of another model")


def batching(options: RowOptions | PretrainData, micro_batch_size: int) -> dict:
    """How documents form micro-batches: a token budget when packing, else a number of rows."""
    if options.sample_packing:
        return {"budget": micro_batch_size * options.sequence_len}
    return {"rows": micro_batch_size}


def lengths(docs: list[Doc]) -> list[int]:
    """Tokens of each document."""
    return [len(doc.tokens) for doc in docs]


def total_steps(docs: list[Doc], *, epochs: int, max_steps: int | None, **options) -> int:
    """Optimiser steps of a whole run: `max_steps` if given, else `epochs` times through the documents."""
    if max_steps is not None:
        return max_steps
    sizes = lengths(docs)
    return sum(loader.steps_per_epoch(sizes, epoch=epoch, **options) for epoch in range(epochs))
