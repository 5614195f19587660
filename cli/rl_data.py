"""Prompts of reinforcement learning: rows of any shape -> core.data.prompts.Prompt, held out or not."""

import inspect
import json
from typing import Any, NamedTuple

from treetune.cli import checks, pairs
from treetune.cli.options.data import PromptRows
from treetune.cli.options.rollout import RolloutOptions
from treetune.core import fields
from treetune.core.data import custom, kinds, prompts, sources, turns

SOURCE_KEYS = frozenset(inspect.signature(sources.read).parameters) - {"path"}
OWN_KEYS = frozenset({"path", "type", "field_prompt"})


class Prompts(NamedTuple):
    """Prompts to train on and to hold out, and a line about each data set."""

    train: list[prompts.Prompt]
    val: list[prompts.Prompt]
    lines: list[str]


def load(options: Any, tokenizer: Any, *, seed: int) -> Prompts:
    """All prompts of the options. Errors: ValueError naming file, row and fix."""
    if not options.data and not options.datasets:
        raise ValueError("no prompts: give --data at least one file or data set")
    parts = [_rows(entry, options, tokenizer) for entry in options.datasets or [{"path": path} for path in options.data]]
    held = [_rows({"path": path}, options, tokenizer) for path in getattr(options, "val_data", ())]
    if not held and (size := checks.held_out(options) if hasattr(options, "val_set_size") else 0):
        size = size if size < 1 else int(size)
        pairs = [sources.split_validation(part, size, seed, key=kinds.prompt) for part in parts]
        parts, held = ([pair[side] for pair in pairs] for side in (0, 1))
    train, lines = _read(parts, options, tokenizer, "train")
    val, more = _read(held, options, tokenizer, "held out")
    return Prompts(train, val, lines + more)


def _rows(entry: dict, options: PromptRows, tokenizer: Any) -> sources.Rows:
    """The rows of a data set, each with its prompt in the column `prompt`."""
    if unknown := sorted(entry.keys() - SOURCE_KEYS - OWN_KEYS):
        known = sources.join_names(sorted(SOURCE_KEYS | OWN_KEYS))
        raise ValueError(f"datasets: {entry.get('path')} has the unknown key {unknown[0]}; prompts take {known}")
    source = {"split": options.split, "limit": options.max_rows} | {key: entry[key] for key in SOURCE_KEYS & entry.keys()}
    with fields.reading(entry.get("path") or entry.get("data_files")):
        rows = sources.read(entry.get("path"), **source)
    if transform := entry.get("type") or options.prompt_transform:
        rows = custom.apply_transform(rows, custom.load_transform(transform, options), tokenizer)
    name = _column(rows, entry.get("field_prompt") or options.field_prompt)
    return rows._replace(rows=[_with_prompt(row, name, sources.locate_row(rows, i)) for i, row in enumerate(rows.rows)])


def _column(rows: sources.Rows, named: str) -> str:
    columns = sources.columns(rows)
    if named != "auto":
        if named not in columns:
            raise ValueError(f"{rows.name} has no column {named}; it has {sources.join_names(columns)}")
        return named
    if (found := next((name for name in ("prompt", "messages", "question") if name in columns), None)) is None:
        raise ValueError(f"{rows.name} has the columns {sources.join_names(columns)}: name that of the prompt with --field-prompt")
    return found


def _with_prompt(row: dict, name: str, where: str) -> dict:
    """The row with `prompt`; an answer at the end of messages becomes a column, for rewards to compare with."""
    value, rest = row.get(name), {key: kept for key, kept in row.items() if key != name}
    if name == "question" and isinstance(value, str):
        return rest | {"prompt": [{"role": "user", "content": value}]}
    if not isinstance(value, list):
        return rest | {"prompt": value}
    said = turns.read_turns(value, f"{where}: field {name}")
    if said[-1]["role"] != "assistant":
        return rest | {"prompt": said}
    if len(said) == 1:
        raise ValueError(f"{where}: field {name} holds an answer and no prompt")
    answer = said[-1].get("content") or said[-1].get("tool_calls")
    return {"answer": answer} | rest | {"prompt": said[:-1]}


def _read(parts: list[sources.Rows], options: PromptRows, tokenizer: Any, label: str) -> tuple[list[prompts.Prompt], list[str]]:
    found, lines, offset = [], [], 0
    chosen = {"system": options.default_system_message or "", "max_prompt_len": options.max_prompt_len}
    chosen |= {
        "chat_template": options.chat_template,
        "chat_template_kwargs": named_values(options.chat_template_kwargs, "chat-template-kwargs"),
    }
    for part in parts:
        with fields.reading(part.name):
            some, report = prompts.read(part, tokenizer, **chosen)
        found += [one._replace(row=one.row + offset) for one in some]
        offset += max(part.numbers, default=0) + 1
        dropped = "".join(f", {count} dropped: {why}" for why, count in report.dropped.items())
        lines.append(f"{label} {part.name}: {report.prompts} prompts, the longest {report.longest} tokens{dropped}")
    return found, lines


def named_values(texts: tuple[str, ...], option: str) -> dict[str, Any]:
    """NAME=VALUE texts as a mapping, values as JSON where they are JSON."""
    return {name: _value(text) for name, text in pairs.named_texts(texts, option).items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def check_fits(data: Prompts, rollout: RolloutOptions, cfg: Any) -> None:
    """Errors: ValueError when a prompt with a completion needs more positions than the model has, or an id is none of its own."""
    new, longest = rollout.max_completion_length, max(data.train + data.val, key=lambda one: len(one.tokens))
    if len(longest.tokens) + new > cfg.max_positions:
        raise ValueError(
            f"row {longest.row} has a prompt of {len(longest.tokens)} tokens, with max_completion_length {new} more than the "
            f"{cfg.max_positions} positions of the model: lower max_prompt_len or max_completion_length"
        )
    check_ids(data, rollout, cfg)


def check_ids(data: Prompts, rollout: RolloutOptions, cfg: Any) -> None:
    """Errors: ValueError when an id of the prompts or of stop_token_ids is none of the model's."""
    largest = max(int(one.tokens.max()) for one in data.train + data.val)
    if largest >= cfg.vocab_size:
        raise ValueError(f"the prompts hold token id {largest}, the model has {cfg.vocab_size}: the tokenizer is of another model")
    if wrong := [one for one in rollout.stop_token_ids if not 0 <= one < cfg.vocab_size]:
        raise ValueError(f"stop_token_ids has {wrong[0]}, expected ids from 0 to {cfg.vocab_size - 1}")
