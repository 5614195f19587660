"""pygmalion rows: conversations of system, human and bot in a wording of their own, of which the bot's messages are trained."""

from collections.abc import Callable
from typing import Any

from treetune.core.data import sources, spans, turns
from treetune.core.data.rows import Row
from treetune.core.protocols import Tokenizer

TAGS = {"system": "<|system|>Persona: ", "human": "<|user|> ", "bot": "<|model|>"}
START = "\n<START>"  # ends a persona in the files of this format


def reader(tokenizer: Tokenizer, *, train_on_inputs: bool = False) -> Callable[[sources.Rows], list[spans.Text]]:
    """Reader of `conversations`, a list of messages with `role` and `value`: each of the bot is trained, with an EOS behind it.

    What follows the bot's last message has no answer and is left out. Errors: ValueError for a tokenizer without EOS, and for rows without
    messages, roles that are none of system, human and bot, and values that are no text (named).
    """
    spans.require_eos(tokenizer)
    eos = str(tokenizer.eos_token)
    return lambda rows: [_text(row, sources.locate_row(rows, i), eos, train_on_inputs) for i, row in enumerate(rows.rows)]


def _text(row: Row, location: str, eos: str, whole: bool) -> spans.Text:
    messages = _read(row, location)
    last = max((i for i, (role, _) in enumerate(messages) if role == "bot"), default=-1)
    text, trained = "", []
    for i, (role, value) in enumerate(messages[: last + 1]):
        text += TAGS[role]
        begin = len(text)
        # The EOS of the last message is the one that ends the document.
        text += f" {value}{eos if i < last else ''}" if role == "bot" else value
        if role == "bot":
            trained.append(spans.Turn(begin, len(text), len(text), len(text), 1.0, 0.0))
    return spans.Text(text, () if whole else tuple(trained), whole=whole and bool(text), eos=1.0 if trained else None)


def _read(row: Row, location: str) -> list[tuple[str, str]]:
    """(role, what is said) of the messages, in order."""
    value: Any = row.get("conversations")
    if not isinstance(value, list) or not value:
        raise ValueError(f"{location}: field conversations is {turns.type_name(value)}, expected a list of objects with role and value")
    return [_message(part, f"{location}: field conversations, message {i}") for i, part in enumerate(value, 1)]


def _message(part: Any, here: str) -> tuple[str, str]:
    if not isinstance(part, dict):
        raise ValueError(f"{here} is {turns.type_name(part)}, expected an object with role and value")
    role, said = part.get("role"), part.get("value")
    if not isinstance(role, str) or role.lower() not in TAGS:
        raise ValueError(f"{here}: field role is {sources.quote(role)}, expected one of {', '.join(TAGS)}")
    if not isinstance(said, str):
        raise ValueError(f"{here}: field value is {turns.type_name(said)}, expected text")
    return role.lower(), (said.removesuffix(START) if role.lower() == "system" else said).strip()
