"""Rows of structured energy-based fine-tuning: prompts with a true reply, and perhaps what followed it, as ids beside the prompt.

Columns of a prompt: ground_truth and remaining_turns as the transform gave them; truth, the ids of the true conversation after the prompt;
replies, True where these are a reply; between, for each later reply the ids that stand between it and the one before.
No end token closes a truth: a sampled reply is compared without its own.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from treetune.cli import checks, rl_data, samplers
from treetune.cli.methods.ebft import EbftData
from treetune.cli.names import nearest
from treetune.core import fields
from treetune.core.data import chat_templates, custom, dedup, ebft, preference, prompts, reporting, sources, turns
from treetune.core.data.ebft_rows import document, first_reply
from treetune.core.data.prompts import Prompt

__all__ = ["check_fits", "document", "first_reply", "load"]

OWN_KEYS = frozenset({"path", "type"})
REPLY = "A reply that nobody would write: 7f3a19."  # stands for one where a chat template shows what it puts around it
TOO_LONG = "longer than sequence_len with the true reply"


def load(config: Any, tokenizer: Any) -> rl_data.Prompts:
    """All prompts of the options. Errors: ValueError naming file, row and fix."""
    options = config.data
    if options.chat_template is not None:  # sample answers and a saved adapter use it too
        tokenizer.chat_template = chat_templates.resolve(tokenizer, options.chat_template) or tokenizer.chat_template
    if not options.data and not options.datasets:
        raise ValueError("no data: give --data at least one file or data set")
    parts = [_rows(entry, options, tokenizer) for entry in options.datasets or [{"path": path} for path in options.data]]
    held = [_rows(entry, options, tokenizer) for entry in options.test_datasets or [{"path": path} for path in options.val_data]]
    lines = []
    if options.dataset_exact_deduplication:
        (*found,), gone = dedup.drop_duplicates(parts + held)
        lines = [f"{part.name}: {lost} rows that repeat an earlier one left out" for part, lost in zip(found, gone, strict=True) if lost]
        parts, held = ([part for part in some if part.rows] for some in (found[: len(parts)], found[len(parts) :]))
    if not held and (size := checks.held_out(options)):
        pairs = [sources.split_validation(part, size if size < 1 else int(size), config.optim.seed, key=_opening) for part in parts]
        parts, held = ([pair[side] for pair in pairs] for side in (0, 1))
    train, told = _read(parts, options, tokenizer, "train")
    val, more = _read(held, options, tokenizer, "held out")
    return rl_data.Prompts(train, val, lines + told + more)


def _rows(entry: dict, options: EbftData, tokenizer: Any) -> sources.Rows:
    """The targets of a data set, as rows with prompt, ground_truth and remaining_turns."""
    if unknown := sorted(entry.keys() - rl_data.SOURCE_KEYS - OWN_KEYS):
        known = sources.join_names(sorted(rl_data.SOURCE_KEYS | OWN_KEYS))
        raise ValueError(f"datasets: {entry.get('path')} has the unknown key {unknown[0]}; structured mode takes {known}")
    source = {"split": options.split, "limit": options.max_rows} | {key: entry[key] for key in rl_data.SOURCE_KEYS & entry.keys()}
    with fields.reading(entry.get("path") or entry.get("data_files")):
        rows = sources.read(entry.get("path"), **source)
    named = entry.get("type") or options.format
    if _is_own(named):
        rows, form = custom.apply_transform(rows, custom.load_transform(named, options), tokenizer), ebft_row
    else:
        named = _detected(rows) if named == "auto" else named
        form = _transform(named)
    rows = sources.track_reads(rows)
    with fields.reading(rows.name):
        targets, dropped = ebft.structured(rows, form)
    unread = sources.unread_columns(rows)
    if sources.SYSTEM in unread:
        raise sources.unplaced_system(rows, unread[sources.SYSTEM], named)
    made = [{"prompt": one.prompt, "ground_truth": one.ground_truth, "remaining_turns": list(one.remaining_turns)} for one in targets]
    why = "".join(f", {count} dropped: {reason}" for reason, count in dropped.items())
    why += f", not read: {reporting.abbreviate(list(unread))}" if unread else ""
    return rows._replace(name=f"{rows.name} as {named}{why}", rows=made, numbers=[one.row for one in targets])


def ebft_row(row: dict, where: str) -> list[dict]:
    """A row that has the documents' columns already."""
    return [row]


def _question(row: dict, where: str) -> list[dict]:
    asked = turns.with_system([{"role": "user", "content": preference.text(row, ("question",), where)}], row, where)
    return [{"prompt": asked, "ground_truth": preference.text(row, ("answer",), where)}]


def _completion(row: dict, where: str) -> list[dict]:
    return [{"prompt": row.get("prompt"), "ground_truth": preference.text(row, ("completion",), where)}]


# What auto takes, by columns; the first that fits.
PLAIN: dict[str, tuple[tuple[str, ...], ebft.Transform]] = {
    "prompt, ground_truth": (("prompt", "ground_truth"), ebft_row),
    "ebft_opencode.transform": (("input", "output"), ebft.opencode),
    "ebft_chat_multiturn.transform": (("messages",), ebft.first_turn),
    "conversations": (("conversations",), ebft.first_turn),
    "question, answer": (("question", "answer"), _question),
    "prompt, completion": (("prompt", "completion"), _completion),
}


def _detected(rows: sources.Rows) -> str:
    columns = set(sources.columns(rows))
    if found := next((name for name, (needed, _) in PLAIN.items() if columns.issuperset(needed)), None):
        return found
    raise ValueError(
        f"{rows.name} has the columns {sources.join_names(sorted(columns))}: structured mode reads {'; '.join(PLAIN)}; name a transform "
        "with --format, or give --mode strided for documents"
    )


def _is_own(name: str) -> bool:
    """Whether a format is an import path of the user's own."""
    known = {one.partition(".")[0] for one in (*ebft.STRUCTURED, *ebft.STRIDED)}
    return ("." in name or ":" in name) and name.partition(".")[0] not in known


def _transform(name: str) -> ebft.Transform:
    if name in ebft.STRUCTURED or name in PLAIN:
        return ebft.STRUCTURED.get(name) or PLAIN[name][1]
    if name in ebft.STRIDED:
        raise ValueError(f"format {name} makes documents for --mode strided; structured mode takes {sources.join_names(ebft.STRUCTURED)}")
    raise ValueError(f"unknown format {name}{nearest(name, list(ebft.STRUCTURED))}: expected one of {sources.join_names(ebft.STRUCTURED)}")


def _opening(row: dict) -> str:
    """What rows of one conversation have in common: their prompt, up to the first reply in it."""
    asked = row["prompt"]
    if isinstance(asked, str):
        return asked
    first = next((i for i, one in enumerate(asked) if one["role"] == "assistant"), len(asked))
    return json.dumps(asked[:first], sort_keys=True, default=repr)


def _read(parts: list[sources.Rows], options: EbftData, tokenizer: Any, label: str) -> tuple[list[Prompt], list[str]]:
    template = (options.chat_template, None, rl_data.named_values(options.chat_template_kwargs, "chat-template-kwargs"))
    names = ("chat_template", "chat_template_jinja", "chat_template_kwargs")
    found, lines, offset = [], [], 0
    for part in parts:
        some, report = prompts.read(part, tokenizer, **dict(zip(names, template, strict=True)))
        with_truth = [_with_truth(one, tokenizer, template, f"{part.name}, row {one.row}") for one in some]
        lengths = [len(one.tokens) + len(one.columns["truth"]) for one in with_truth]
        kept = [one for one, size in zip(with_truth, lengths, strict=True) if size <= options.sequence_len]
        if not kept:
            raise ValueError(f"{part.name}: all {len(some)} rows are {TOO_LONG} {options.sequence_len}: raise it to {min(lengths)} or more")
        dropped = report.dropped | ({TOO_LONG: len(some) - len(kept)} if len(kept) < len(some) else {})
        why = "".join(f", {count} dropped: {reason}" for reason, count in dropped.items())
        lines.append(f"{label} {part.name}: {len(kept)} prompts, the longest {max(lengths)} tokens with its true reply{why}")
        found += [one._replace(row=one.row + offset) for one in kept]
        offset += max(part.numbers, default=0) + 1
    return found, lines


def _with_truth(prompt: Prompt, tokenizer: Any, template: Sequence, where: str) -> Prompt:
    """The prompt with the ids of the true conversation. Turns after the last reply are left out: nobody writes there."""
    encode = _encoder(tokenizer)
    rest = prompt.columns["remaining_turns"]
    if rest and prompt.messages is None:
        raise ValueError(f"{where}: remaining_turns need a prompt of messages, got plain text")
    pieces, between, said = [(encode(prompt.columns["ground_truth"]), True)], [], []
    for one in rest:
        if one["role"] != "assistant":
            said.append(one)
            continue
        between.append(encode(_around(tokenizer, template, said, where)))
        pieces += [(between[-1], False), (encode(one["content"]), True)]
        said = []
    truth = np.concatenate([np.array(ids, np.int32) for ids, _ in pieces])
    replies = np.concatenate([np.full(len(ids), reply) for ids, reply in pieces])
    return prompt._replace(columns=prompt.columns | {"truth": truth, "replies": replies, "between": between})


def _encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def _around(tokenizer: Any, template: Sequence, said: list[dict], where: str) -> str:
    """What the chat template puts between two replies: the end of the first, the turns between them, the header of the second."""
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": REPLY}, *said]
    try:
        text = chat_templates.renderer(tokenizer, *template)(talk, add_generation_prompt=True)
    except ValueError as error:
        raise ValueError(f"{where}: field remaining_turns: {error}") from error
    _, found, after = text.partition(REPLY)
    if not found or not after:
        raise ValueError(f"{where}: the chat template does not show what stands between two replies, so remaining_turns cannot be played")
    return after


def check_fits(data: rl_data.Prompts, config: Any, cfg: Any) -> None:
    """Errors: ValueError when a prompt with its true or its longest sampled conversation does not fit the model, or ids are not its own."""
    new, engine, limit, whose = config.rollout.max_completion_length, config.engine, cfg.max_positions, "the model"
    if engine.use_vllm and engine.vllm_mode == "managed" and (served := engine.vllm_max_model_len or samplers.longest(config)) < limit:
        limit, whose = served, "the server (vllm_max_model_len)"
    for one in data.train + data.val:
        between = one.columns["between"]
        longest = max(len(one.columns["truth"]), new * (1 + len(between)) + sum(map(len, between)))
        if len(one.tokens) + longest > limit:
            raise ValueError(
                f"row {one.row} has a prompt of {len(one.tokens)} tokens, with up to {longest} after it more than the {limit} positions "
                f"of {whose}: lower sequence_len or max_completion_length ({new} for each of {1 + len(between)} replies)"
            )
        if between and config.rollout.rollout_func is not None:
            raise ValueError(f"row {one.row} has remaining_turns, which rollout_func would not play: leave out one of them")
        if max(one.columns["truth"], default=0) >= cfg.vocab_size:
            raise ValueError(f"row {one.row}: the tokenizer is of another model, its ids are not below {cfg.vocab_size}")
    rl_data.check_ids(data, config.rollout, cfg)
