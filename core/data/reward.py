"""Rows for reward models: pairs to rank (Bradley-Terry), and reasoning whose steps carry a judgement each.

Pairs are preference rows; a scalar head reads the last token of each branch (`pack.collate_trees(docs, read="last")`).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from treetune.core.data import preference, reporting, sources, spans, trees, turns, unpaired
from treetune.core.data.rows import Row
from treetune.core.protocols import Tokenizer


class Steps(NamedTuple):
    """A prompt, the steps after it as texts, and a class for each: 1 for a good step, 0 for a bad one, -1 for one that is not read."""

    prompt: str
    steps: tuple[str, ...]
    classes: tuple[int, ...]


def ranked(row: Row, location: str) -> trees.PromptReplies:
    """bradley_terry.chat_template: system (optional), input, chosen, rejected and margin (optional), as messages."""
    question, chosen, rejected = (preference.column_text(row, (name,), location) for name in ("input", "chosen", "rejected"))
    replies = tuple({"role": "assistant", "content": reply} for reply in (chosen, rejected))
    history = turns.with_system([{"role": "user", "content": question}], row, location)
    return trees.PromptReplies(history, replies, preference.pair_numbers(row, "margin", location))


def stepwise(*, step_separator: str = "\n", train_on_last_step_only: bool = False) -> Callable[[Row, str], Steps]:
    """stepwise_supervised: prompt, completions (one text for each step) and labels (true or false for each).

    step_separator: text after each step; its last token is the one that is judged.
    """
    if not isinstance(step_separator, str) or not step_separator:
        raise ValueError(f"step_separator is {step_separator!r}, expected text")

    def read(row: Row, location: str) -> Steps:
        prompt = preference.column_text(row, ("prompt",), location)
        steps, labels = (_step_list(row, name, location) for name in ("completions", "labels"))
        if len(steps) != len(labels):
            raise ValueError(f"{location}: field labels has {len(labels)} entries for {len(steps)} completions: expected one for each")
        texts = tuple(
            preference.column_text({"completions": step}, ("completions",), f"{location}, step {i}") for i, step in enumerate(steps, 1)
        )
        classes = [
            int(unpaired.read_label({"labels": label}, "labels", f"{location}, step {i}")["desirable"][0])
            for i, label in enumerate(labels, 1)
        ]
        if train_on_last_step_only:
            classes[:-1] = [-1] * (len(classes) - 1)
        return Steps(prompt, tuple(step + step_separator for step in texts), tuple(classes))

    return read


def _step_list(row: Row, name: str, location: str) -> list:
    value = row.get(name)
    if not isinstance(value, list):
        raise ValueError(f"{location}: field {name} is {turns.type_name(value)}, expected a list with one entry for each step")
    return value


def encode_steps(
    rows: sources.Rows,
    read: Callable[[Row, str], Steps],
    tokenizer: Tokenizer,
    *,
    name: str = "stepwise_supervised",
    sequence_len: int | None = None,
    overlong: str = "drop",
) -> tuple[list[trees.TreeDoc], trees.TreeReport]:
    """Documents of stepwise rows: bare trunks with a class at the last token of each step.

    The prompt and every step are tokenised by themselves, so that no token belongs to two steps, and joined behind the tokenizer's
    default prefix. overlong "truncate" drops the steps that do not fit whole.
    Errors: ValueError for bad rows (named), and when no row is left.
    """
    trees.check_length(sequence_len, overlong)
    special = spans.read_special_tokens(tokenizer)
    docs, tally, lengths = [], trees.TreeReport(name, len(rows.rows)), []
    for i, row in enumerate(rows.rows):
        location = sources.locate_row(rows, i)
        steps = read(row, location)
        reason = trees.EMPTY if not steps.steps or not all(step.strip() for step in steps.steps) else ""
        doc = None if reason else _joined(steps, tokenizer, special, rows.numbers[i], location)
        if doc is not None:
            lengths.append(len(doc.tokens))
            tally = tally._replace(longest=max(tally.longest, len(doc.tokens)))
            doc, reason, tally = _fit(doc, sequence_len, overlong, location, tally)
        if doc is None:
            tally = trees.count_drop(tally, reason)
            continue
        docs.append(doc)
    return docs, trees.finish_report(docs, tally, rows)._replace(sizes=reporting.count_lengths(lengths))


def _joined(steps: Steps, tokenizer: Tokenizer, special: spans.SpecialTokens, row: int, location: str) -> trees.TreeDoc:
    texts = [steps.prompt, *steps.steps]
    for text in texts:
        trees.check_unicode(text, location)
    prompt, *parts = (part.tokens for part in spans.encode([spans.Text(text, ()) for text in texts], tokenizer, special))
    prefix = [] if prompt[: len(special.prefix)].tolist() == special.prefix else special.prefix
    if not all(len(part) for part in parts):
        raise ValueError(f"{location}: field completions has a step without any token: remove it")
    tokens = np.concatenate([np.array(prefix, np.int32), prompt, *parts]).astype(np.int32)
    classes = np.full(len(tokens), -1, np.int32)
    classes[len(tokens) - 1 - np.cumsum([0, *(len(part) for part in parts[:0:-1])])[::-1]] = steps.classes
    none = np.zeros(len(tokens), np.int32)
    return trees.TreeDoc(tokens, none, none, (classes >= 0).astype(np.float32), row, {}, classes)


def _fit(
    doc: trees.TreeDoc, size: int | None, overlong: str, location: str, tally: trees.TreeReport
) -> tuple[trees.TreeDoc | None, str, trees.TreeReport]:
    if size is None or len(doc.tokens) <= size:
        return doc, "", tally
    if overlong == "error":
        raise ValueError(
            f"{location} has {len(doc.tokens)} tokens, more than sequence_len {size}: raise it, or set overlong to drop or truncate"
        )
    assert doc.classes is not None
    ends = np.flatnonzero(doc.classes[:size] >= 0)
    if overlong == "drop" or len(ends) == 0:
        return None, trees.TOO_LONG if overlong == "drop" else trees.FULL, tally
    return trees.truncate_tree(doc, int(ends[-1]) + 1), "", tally._replace(truncated=tally.truncated + 1, dropped_eos=tally.dropped_eos + 1)
