"""Prompts of structured energy-based fine-tuning: prompts with a true reply, and perhaps what followed it, as ids beside the prompt.

Columns of a prompt: ground_truth and remaining_turns as the transform gave them; truth, the ids of the true conversation after the prompt;
replies, True where these are a reply; between, for each later reply the ids that stand between it and the one before.
No end token closes a truth: a sampled reply is compared without its own.
"""

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from treetune.core import fields
from treetune.core.data import (
    chat_templates,
    custom,
    dataset,
    dedup,
    ebft,
    prompt_rows,
    prompts,
    reporting,
    row_formats,
    sources,
    spans,
)
from treetune.core.data.dataset import Dataset, RowSettings
from treetune.core.data.prompts import Prompt

OWN_KEYS = frozenset({"path", "type"})  # of an entry of `datasets`, besides the source's
REPLY = "A reply that nobody would write: 7f3a19."  # stands for one where a chat template shows what it puts around it
TOO_LONG = "longer than sequence_len with the true reply"


def load(settings: RowSettings, tokenizer: Any, *, seed: int) -> Dataset:
    """All prompts of the settings. Errors: ValueError naming file, row and fix."""
    if not settings.data and not settings.datasets:
        raise ValueError("no data: give --data at least one file or data set")
    parts = [_rows(entry, settings, tokenizer) for entry in settings.training_entries()]
    val_parts = [_rows(entry, settings, tokenizer) for entry in settings.held_out_entries()]
    lines = []
    if settings.drop_duplicates:
        parts, val_parts, lines = _without_duplicates(parts, val_parts)
    if not val_parts and settings.val_set_size:
        parts, val_parts = dataset.hold_out(parts, settings.val_set_size, seed, key=_opening)
    train, train_lines = _read(parts, settings, tokenizer, "train")
    val, val_lines = _read(val_parts, settings, tokenizer, "held out")
    return Dataset(train, val, None, "prompts", lines + train_lines + val_lines)


def _without_duplicates(train: list[sources.Rows], val: list[sources.Rows]) -> tuple[list[sources.Rows], list[sources.Rows], list[str]]:
    """The data sets without repeated rows, training rows first, and a line where rows went."""
    (*unique,), counts = dedup.drop_duplicates(train + val)
    lines = [f"{part.name}: {count} rows that repeat an earlier one left out" for part, count in zip(unique, counts, strict=True) if count]
    train, val = ([part for part in side if part.rows] for side in (unique[: len(train)], unique[len(train) :]))
    return train, val, lines


def _rows(entry: Mapping[str, Any], settings: RowSettings, tokenizer: Any) -> sources.Rows:
    """The targets of a data set, as rows with prompt, ground_truth and remaining_turns."""
    dataset.check_keys(entry, OWN_KEYS, "structured mode takes")
    rows = dataset.read_source(entry, settings)
    name = entry.get("type") or settings.format
    if custom.is_path(name, [*row_formats.of_kind("truths"), *row_formats.of_kind("strided")]):
        transform = custom.load_transform(name, settings.transform_config)
        rows, form = custom.apply_transform(rows, transform, tokenizer), ebft.as_target
    else:
        name = _detect(rows) if name == "auto" else name
        form = _transform(name)
    rows = sources.track_reads(rows)
    with fields.reading(rows.name):
        targets, dropped = ebft.read_structured(rows, form)
    unread = sources.unread_columns(rows)
    if sources.SYSTEM in unread:
        raise sources.unplaced_system(rows, unread[sources.SYSTEM], name)
    plain = [
        {"prompt": target.prompt, "ground_truth": target.ground_truth, "remaining_turns": list(target.remaining_turns)}
        for target in targets
    ]
    notes = prompt_rows.describe_dropped(dropped)
    notes += f", not read: {reporting.abbreviate(list(unread))}" if unread else ""
    return rows._replace(name=f"{rows.name} as {name}{notes}", rows=plain, numbers=[target.row for target in targets])


def _detect(rows: sources.Rows) -> str:
    columns = sources.columns(rows)
    if (detected := row_formats.detect("truths", columns)) is not None:
        return detected.name
    names = "; ".join(row_format.name for row_format in row_formats.detect_order("truths"))
    raise ValueError(
        f"{rows.name} has the columns {sources.join_names(sorted(columns))}: structured mode reads {names}; name a transform "
        "with --format, or give --mode strided for documents"
    )


def _transform(name: str) -> ebft.RowTransform:
    """The reader of a format. Errors: ValueError for one of strided mode, and for an unknown one."""
    formats = row_formats.of_kind("truths")
    if name in formats:
        return formats[name].reader
    transforms = [transform for transform in formats if "." in transform]  # the others go by columns
    if name in row_formats.of_kind("strided") and "." in name:
        raise ValueError(f"format {name} makes documents for --mode strided; structured mode takes {sources.join_names(transforms)}")
    close = difflib.get_close_matches(name, transforms, n=1, cutoff=0.8)
    suggestion = f" (did you mean {close[0]}?)" if close else ""
    raise ValueError(f"unknown format {name}{suggestion}: expected one of {sources.join_names(transforms)}")


def _opening(row: dict) -> str:
    """What rows of one conversation have in common: their prompt, up to the first reply in it."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt
    first = next((i for i, message in enumerate(prompt) if message["role"] == "assistant"), len(prompt))
    return json.dumps(prompt[:first], sort_keys=True, default=repr)


def _read(parts: Sequence[sources.Rows], settings: RowSettings, tokenizer: Any, label: str) -> tuple[list[Prompt], list[str]]:
    """The prompts of all data sets with their truths, rows numbered through, and a line about each set."""
    encoding: dict[str, Any] = {"chat_template": None, "chat_template_jinja": None, "chat_template_kwargs": None} | dict(settings.encoding)
    read, lines, offset = [], [], 0
    for part in parts:
        some, report = prompts.read_prompts(part, tokenizer, **encoding)
        complete = [_with_truth(prompt, tokenizer, tuple(encoding.values()), f"{part.name}, row {prompt.row}") for prompt in some]
        lengths = [len(prompt.tokens) + len(prompt.columns["truth"]) for prompt in complete]
        fitting = [prompt for prompt, size in zip(complete, lengths, strict=True) if size <= settings.sequence_len]
        if not fitting:
            fix = f"raise it to {min(lengths)} or more"
            raise ValueError(f"{part.name}: all {len(some)} rows are {TOO_LONG} {settings.sequence_len}: {fix}")
        dropped = report.dropped | ({TOO_LONG: len(some) - len(fitting)} if len(fitting) < len(some) else {})
        size = f"the longest {max(lengths)} tokens with its true reply"
        lines.append(f"{label} {part.name}: {len(fitting)} prompts, {size}{prompt_rows.describe_dropped(dropped)}")
        read += [prompt._replace(row=prompt.row + offset) for prompt in fitting]
        offset += max(part.numbers, default=0) + 1
    return read, lines


def _with_truth(prompt: Prompt, tokenizer: Any, template: Sequence, location: str) -> Prompt:
    """The prompt with the ids of the true conversation. Turns after the last reply are left out: nobody writes there."""
    encode = _encoder(tokenizer)
    rest = prompt.columns["remaining_turns"]
    if rest and prompt.messages is None:
        raise ValueError(f"{location}: remaining_turns need a prompt of messages, got plain text")
    pieces, between, turns_between = [(encode(prompt.columns["ground_truth"]), True)], [], []
    for message in rest:
        if message["role"] != "assistant":
            turns_between.append(message)
            continue
        between.append(encode(_around(tokenizer, template, turns_between, location)))
        pieces += [(between[-1], False), (encode(message["content"]), True)]
        turns_between = []
    truth = np.concatenate([np.array(ids, np.int32) for ids, _ in pieces])
    replies = np.concatenate([np.full(len(ids), reply) for ids, reply in pieces])
    return prompt._replace(columns=prompt.columns | {"truth": truth, "replies": replies, "between": between})


def _encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def _around(tokenizer: Any, template: Sequence, messages: list[dict], location: str) -> str:
    """What the chat template puts between two replies: the end of the first, the turns between them, the header of the second."""
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": REPLY}, *messages]
    try:
        text = chat_templates.renderer(tokenizer, *template)(talk, add_generation_prompt=True)
    except ValueError as error:
        raise ValueError(f"{location}: field remaining_turns: {error}") from error
    _, marker, after = text.partition(REPLY)
    if not marker or not after:
        raise ValueError(
            f"{location}: the chat template does not show what stands between two replies, so remaining_turns cannot be played"
        )
    return after


def first_reply(prompt: Prompt) -> int:
    """Tokens of the true reply itself, without what followed it."""
    replies = prompt.columns["replies"]
    return len(replies) if replies.all() else int(np.argmin(replies))


def true_reply(prompt: Prompt) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the true conversation after the prompt, and the weights of those that are replies."""
    return prompt.columns["truth"], prompt.columns["replies"].astype(np.float32)


def document(prompt: Prompt) -> spans.Doc:
    """The prompt with the true conversation, its replies scored: what supervised fine-tuning would train on."""
    tokens = np.concatenate([prompt.tokens, prompt.columns["truth"]]).astype(np.int32)
    weight = np.concatenate([np.zeros(len(prompt.tokens)), prompt.columns["replies"]]).astype(np.float32)
    return spans.Doc(tokens, weight, prompt.row)


def check_fits(
    prompts: Sequence[Prompt],
    *,
    max_completion_length: int,
    limit: int,
    limit_of: str,
    vocab_size: int,
    stop_ids: Sequence[int] = (),
    custom_rollout: bool = False,
) -> None:
    """Errors: ValueError when a prompt with its true or its longest sampled conversation is too long, or ids are not the model's.

    limit: tokens that fit, of the model or a server (limit_of). custom_rollout: a user's function plays the prompts.
    """
    for prompt in prompts:
        between = prompt.columns["between"]
        longest = max(len(prompt.columns["truth"]), max_completion_length * (1 + len(between)) + sum(map(len, between)))
        if len(prompt.tokens) + longest > limit:
            raise ValueError(
                f"row {prompt.row} has a prompt of {len(prompt.tokens)} tokens, with up to {longest} after it more than the {limit} "
                f"positions of {limit_of}: lower sequence_len or max_completion_length "
                f"({max_completion_length} for each of {1 + len(between)} replies)"
            )
        if between and custom_rollout:
            raise ValueError(f"row {prompt.row} has remaining_turns, which rollout_func would not play: leave out one of them")
        if max(prompt.columns["truth"], default=0) >= vocab_size:
            raise ValueError(f"row {prompt.row}: the tokenizer is of another model, its ids are not below {vocab_size}")
    prompt_rows.check_ids(prompts, stop_ids=stop_ids, vocab_size=vocab_size)
