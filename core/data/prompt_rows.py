"""Prompts of reinforcement learning: rows of any shape -> core.data.prompts.Prompt, held out or not."""

from collections.abc import Mapping, Sequence
from typing import Any

from treetune.core import fields
from treetune.core.data import custom, dataset, kinds, nested, prompts, row_formats, sources
from treetune.core.data.dataset import Dataset, RowSettings
from treetune.core.data.prompts import Prompt

OWN_KEYS = frozenset({"path", "type", "field_prompt"})  # of an entry of `datasets`, besides the source's


def load(settings: RowSettings, tokenizer: Any, *, seed: int) -> Dataset:
    """All prompts of the settings. Errors: ValueError naming file, row and fix."""
    if not settings.data and not settings.datasets:
        raise ValueError("no prompts: give --data at least one file or data set")
    parts = [_rows(entry, settings, tokenizer) for entry in settings.training_entries()]
    val_parts = [_rows(entry, settings, tokenizer) for entry in settings.held_out_entries()]
    if not val_parts and settings.val_set_size:
        parts, val_parts = dataset.hold_out(parts, settings.val_set_size, seed, key=kinds.prompt_key)
    train, lines = _read(parts, settings, tokenizer, "train")
    val, val_lines = _read(val_parts, settings, tokenizer, "held out")
    return Dataset(train, val, None, "prompts", lines + val_lines)


def _rows(entry: Mapping[str, Any], settings: RowSettings, tokenizer: Any) -> sources.Rows:
    """The rows of a data set, each with its prompt in the column `prompt`."""
    dataset.check_keys(entry, OWN_KEYS, "prompts take")
    rows = dataset.read_source(entry, settings)
    transform = entry.get("type") or (None if settings.format == "auto" else settings.format)
    if transform:
        rows = custom.apply_transform(rows, custom.load_transform(transform, settings.transform_config), tokenizer)
    named = entry.get("field_prompt") or settings.prompt_column
    rows = nested.lifted(rows, [named])
    name = _column(rows, named)
    formats = row_formats.of_kind("prompts")
    read = formats[name].reader if name in formats else prompts.from_column
    return rows._replace(rows=[read(row, name, sources.locate_row(rows, i)) for i, row in enumerate(rows.rows)])


def _column(rows: sources.Rows, named: str) -> str:
    columns = sources.columns(rows)
    if named != "auto":
        if named not in columns:
            raise ValueError(f"{rows.name} has no column {named}; it has {sources.join_names(columns)}")
        return named
    detected = row_formats.detect("prompts", columns)
    if detected is None:
        raise ValueError(f"{rows.name} has the columns {sources.join_names(columns)}: name that of the prompt with --field-prompt")
    return detected.name


def _read(parts: Sequence[sources.Rows], settings: RowSettings, tokenizer: Any, label: str) -> tuple[list[Prompt], list[str]]:
    """The prompts of all data sets, with rows numbered through, and a line about each set."""
    read, lines, offset = [], [], 0
    for part in parts:
        with fields.reading(part.name):
            some, report = prompts.read_prompts(part, tokenizer, **settings.encoding)
        read += [prompt._replace(row=prompt.row + offset) for prompt in some]
        offset += max(part.numbers, default=0) + 1
        lines.append(
            f"{label} {part.name}: {report.prompts} prompts, the longest {report.longest} tokens{describe_dropped(report.dropped)}"
        )
    return read, lines


def example(data: Dataset) -> Dataset:
    """What sample answers, evaluations and a report show of prompts: the first one, and those that are held out."""
    prompt = data.train[0]
    row = {"messages": prompt.messages} if prompt.messages is not None else None
    return Dataset([], data.val, row, "chat", data.lines)


def describe_dropped(dropped: Mapping[str, int]) -> str:
    """The rows that were dropped, by reason, as the end of a line."""
    return "".join(f", {count} dropped: {why}" for why, count in dropped.items())


def check_fits(
    prompts: Sequence[Prompt], *, max_completion_length: int, stop_ids: Sequence[int], vocab_size: int, max_positions: int
) -> None:
    """Errors: ValueError when a prompt with a completion needs more positions than the model has, or an id is none of its own."""
    longest = max(prompts, key=lambda prompt: len(prompt.tokens))
    if len(longest.tokens) + max_completion_length > max_positions:
        raise ValueError(
            f"row {longest.row} has a prompt of {len(longest.tokens)} tokens, with max_completion_length {max_completion_length} more than "
            f"the {max_positions} positions of the model: lower max_prompt_len or max_completion_length"
        )
    check_ids(prompts, stop_ids=stop_ids, vocab_size=vocab_size)


def check_ids(prompts: Sequence[Prompt], *, stop_ids: Sequence[int], vocab_size: int) -> None:
    """Errors: ValueError when an id of the prompts or of stop_token_ids is none of the model's."""
    largest = max(int(prompt.tokens.max()) for prompt in prompts)
    if largest >= vocab_size:
        raise ValueError(f"the prompts hold token id {largest}, the model has {vocab_size}: the tokenizer is of another model")
    if wrong := [token for token in stop_ids if not 0 <= token < vocab_size]:
        raise ValueError(f"stop_token_ids has {wrong[0]}, expected ids from 0 to {vocab_size - 1}")
