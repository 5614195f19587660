"""Rows with a prompt and its completion, both texts or both lists of messages, as TRL's are: the completion is trained."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from treetune.core.data import chat, instruction, sources, spans
from treetune.core.data.rows import Row
from treetune.core.protocols import Tokenizer

NAMES = ("prompt", "completion")
CONTEXT = ("system", "tools")  # columns of rows of messages that stand for the whole conversation


def reader(
    tokenizer: Tokenizer,
    *,
    chat_template: str | None = None,
    chat_template_jinja: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    default_system_message: str | None = None,
    train_on_inputs: bool = False,
) -> Callable[[sources.Rows], list[spans.Text]]:
    """Reader of `prompt` and `completion`. Texts: one after the other as they are, and a trained EOS.

    Messages: one conversation through the chat template, of which the assistant's turns in the completion are trained.
    Errors: ValueError for a row with a text and a list, one that is judged good or bad, options of a chat template beside texts, and as of
    `chat.reader`.
    """
    options = {
        "chat_template": chat_template,
        "chat_template_jinja": chat_template_jinja,
        "chat_template_kwargs": chat_template_kwargs,
        "default_system_message": default_system_message,
    }
    conversations = functools.cache(lambda: chat.reader(tokenizer, train_on_inputs=train_on_inputs, **options))

    def read(rows: sources.Rows) -> list[spans.Text]:
        return [_text(rows, i) for i in range(len(rows.rows))]

    def _text(rows: sources.Rows, i: int) -> spans.Text:
        row, location = rows.rows[i], sources.locate_row(rows, i)
        if isinstance(dict.get(row, "label"), bool):  # not as a read, which would leave other labels out of what is reported as unread
            raise ValueError(f"{location}: label is true or false, so completions are judged: train with kto, or leave out the column")
        if _is_talk(row, location):
            return conversations()(sources.take(rows, [i])._replace(rows=[_talk(row, train_on_inputs)]))[0]
        if given := [name for name, value in options.items() if value]:
            raise ValueError(f"{location}: {given[0]} is for messages, and prompt and completion are texts here: leave it out")
        spans.require_eos(tokenizer)
        spans.require_text(row, list(NAMES), (), location)
        return instruction.prompt_and_output(row["prompt"], row["completion"], "", train_on_inputs)

    return read


def _is_talk(row: Row, location: str) -> bool:
    """Whether the row has messages. Errors: ValueError for a list beside something else."""
    lists = [isinstance(row.get(name), list) for name in NAMES]
    if any(lists) and not all(lists):
        kinds = " and ".join(f"{name} is {sources.value_kind(row.get(name))}" for name in NAMES)
        raise ValueError(f"{location}: {kinds}, expected two texts, or two lists of messages")
    return all(lists)


def _talk(row: Row, whole: bool) -> Row:
    """The row as one conversation, whose prompt is not trained unless the whole is."""
    prompt = [message if whole or not isinstance(message, dict) else message | {"train": False} for message in row["prompt"]]
    return {"messages": [*prompt, *row["completion"]]} | {name: row.get(name) for name in CONTEXT}
