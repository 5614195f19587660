"""Readers of preference rows: a prompt, a chosen and a rejected reply. `row_formats.FORMATS` names the formats that they read.

Formats of fixed wording (chatml, llama3, zephyr) give texts; the others give messages for the chat template, or texts as they are.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import NamedTuple

from treetune.core.data import sources, trees, turns, wording
from treetune.core.data.rows import Message, Row

PROMPTS = ("prompt", "input", "question", "instruction")
WRITTEN_TALK = re.compile(r"""\s*\[\s*\{\s*["'](role|from|content|value)["']\s*:""")  # messages as the text of a list
MAX_MARGIN = 1e6  # of a margin


class PairColumns(NamedTuple):
    """Which columns hold what, the documented name first; `talks` when chosen and rejected are conversations."""

    prompt: tuple[str, ...]  # none: the question is the first part of the conversations
    chosen: tuple[str, ...] = ("chosen",)
    rejected: tuple[str, ...] = ("rejected",)
    talks: bool = False


CHOSEN, REJECTED = ("chosen", "chosen_response"), ("rejected", "rejected_response")
PAIR_COLUMNS = {
    "default": PairColumns(PROMPTS, CHOSEN, REJECTED),
    "argilla": PairColumns(("instruction", *PROMPTS[:-1]), CHOSEN[::-1], REJECTED[::-1]),
    "argilla_chat": PairColumns((), talks=True),
    "icr": PairColumns(("input",)),
    "intel": PairColumns(("question",)),
    "prompt_pairs": PairColumns(("prompt",)),
    "ultra": PairColumns(("prompt",), talks=True),
}


def column_text(row: Row, names: Sequence[str], location: str) -> str:
    """The text under the first of `names` that the row has. Errors: ValueError when there is none, or something else than text."""
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        raise sources.missing_field(names, row, location)
    if not isinstance(row[name], str):
        raise ValueError(f"{location}: field {name} is {turns.type_name(row[name])}, expected text")
    if WRITTEN_TALK.match(row[name]):
        raise ValueError(f"{location}: field {name} is a list of messages written as text: write it as a list (in .jsonl or .parquet)")
    return row[name]


def system_messages(row: Row, location: str, name: str = "system") -> list[Message]:
    """The row's system message, if it has one."""
    return turns.with_system([], row, location, name)


def pair_numbers(row: Row, name: str, location: str) -> dict[str, tuple]:
    """The optional number `name` of a pair, for both sides, also as text, since CSV files have nothing else.

    Errors: ValueError for anything but a number of at most LARGEST in size.
    """
    value = row.get(name)
    if value is None or value == "":
        return {}
    margin = parse_number(value)
    if margin is None or not abs(margin) <= MAX_MARGIN:
        raise ValueError(f"{location}: field {name} is {sources.quote(value)}, expected a number from {-MAX_MARGIN:g} to {MAX_MARGIN:g}")
    return {name: (margin, margin)}


def parse_number(value: object) -> float | None:
    """A number, or the text of one, as a float; None for anything else, and for what a float cannot hold."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def worded_pairs(style: wording.TurnStyle, fields: PairColumns) -> Callable[[Row, str], trees.PromptReplies]:
    """Reader of rows in a fixed wording."""

    def read(row: Row, location: str) -> trees.PromptReplies:
        conversations: list[tuple[str, list[Message]]] = [
            _talk(row, names[0], location) if fields.talks else (column_text(row, names, location), [])
            for names in (fields.chosen, fields.rejected)
        ]
        if fields.prompt:
            question = column_text(row, fields.prompt, location)
            if fields.talks:
                _check_single(conversations, location)
                _check_question(
                    question, [history for _, history in conversations], location, next(name for name in fields.prompt if row.get(name))
                )
            history = [{"role": "user", "content": question}]
        else:
            history = _shared(conversations, location)
        replies = tuple(reply for reply, _ in conversations)
        prompt = wording.render_prompt(style, turns.with_system(history, row, location), location)
        return trees.PromptReplies(prompt, replies, pair_numbers(row, "margin", location), style.end)

    return read


def _talk(row: Row, name: str, location: str) -> tuple[str, list[Message]]:
    history, reply = turns.read_dialogue(row.get(name), f"{location}: field {name}")
    return turns.turn_text(reply, f"{location}: field {name}: the reply"), history


def _check_question(prompt: str, histories: Sequence[list[Message]], location: str, name: str = "prompt") -> None:
    """Errors: ValueError for conversations in which nobody asks what the prompt says."""
    for side, history in zip(("chosen", "rejected"), histories, strict=True):
        questions = [message.get("content") for message in history if message["role"] == "user"]
        if not any(isinstance(message, str) and message.strip() == prompt.strip() for message in questions):
            other = sources.quote(questions[-1] if questions else "")
            raise ValueError(
                f"{location}: field {name} is {sources.quote(prompt)}, but the question in {side} is {other}: "
                f"make them alike, or remove {name}"
            )


def _shared(conversations: Sequence[tuple], location: str) -> list[Message]:
    """The history that both sides have. Errors: ValueError when they differ."""
    if conversations[0][1] != conversations[1][1]:
        raise ValueError(
            f"{location}: fields chosen and rejected differ before their last message: expected one conversation with two endings"
        )
    return conversations[0][1]


def _check_single(conversations: Sequence[tuple], location: str) -> None:
    for name, (_, history) in zip(("chosen", "rejected"), conversations, strict=True):
        if [message["role"] for message in history] != ["user"]:
            raise ValueError(
                f"{location}: field {name} has {len(history) + 1} messages, expected one question and one reply besides the prompt"
            )


def nectar(row: Row, location: str) -> trees.PromptReplies:
    """zephyr.nectar: the answer of the best rank (the lowest number) against the next best."""
    prompt, answers = column_text(row, ("prompt",), location), row.get("answers")
    if not isinstance(answers, list) or len(answers) < 2:
        raise ValueError(
            f"{location}: field answers is {turns.type_name(answers)}, expected a list of two or more answers with their ranks"
        )
    for i, candidate in enumerate(answers, 1):
        answer_location = f"{location}: field answers, answer {i}"
        rank = candidate.get("rank") if isinstance(candidate, dict) else None
        if isinstance(rank, bool) or not isinstance(rank, int | float) or rank != rank:
            raise ValueError(
                f"{answer_location}: field rank is {sources.quote(rank)}, expected an object with a text and a number (answer, rank)"
            )
        column_text(candidate, ("answer",), answer_location)
    best, second = sorted(answers, key=lambda candidate: candidate["rank"])[:2]
    before = "".join(candidate["content"] for candidate in system_messages(row, location))
    prompt = f"<|system|>\n{before}</s>\n<|user|>\n{prompt}</s>\n<|assistant|>\n"
    return trees.PromptReplies(prompt, (best["answer"], second["answer"]), {})


def templated(
    *,
    field_messages: str = "messages",
    field_chosen: str = "chosen",
    field_rejected: str = "rejected",
    message_field_role: str = "role",
    message_field_content: str = "content",
    message_property_mappings: Mapping[str, str] | None = None,
    roles: Mapping[str, Sequence[str]] = turns.ROLES,
) -> Callable[[Row, str], trees.PromptReplies]:
    """chat_template.default: a conversation (or a question as text), and two replies: a message, a text, or a conversation with it last.

    message_property_mappings: {"role": ..., "content": ...}, the same as the two message_field_ options.
    """
    names = {"role": message_field_role, "content": message_field_content} | dict(message_property_mappings or {})
    extra = set(names) - {"role", "content"}
    if extra:
        raise ValueError(f"message_property_mappings has {', '.join(sorted(extra))}: expected role and content")

    def reply(row: Row, name: str, history: list[Message], location: str) -> dict:
        value, location = row.get(name), f"{location}: field {name}"
        if isinstance(value, str):
            return {"role": "assistant", "content": column_text(row, (name,), location.removesuffix(f": field {name}"))}
        messages = turns.read_turns([value] if isinstance(value, dict) else value, location, roles=roles, replies=1, **names)
        if messages[-1]["role"] != "assistant":
            raise ValueError(
                f"{location} has {len(messages)} messages: expected the assistant's reply, alone or after the messages of the prompt"
            )
        if messages[:-1] not in ([], history, history[-1:]):
            raise ValueError(
                f"{location} has {len(messages)} messages, and those before the reply are not the prompt's: give the reply alone"
            )
        return messages[-1]

    def read(row: Row, location: str) -> trees.PromptReplies:
        if isinstance(row.get(field_messages), str):
            messages = [{"role": "user", "content": column_text(row, (field_messages,), location)}]
        else:
            messages = turns.read_turns(row.get(field_messages), f"{location}: field {field_messages}", roles=roles, replies=0, **names)
        replies = tuple(reply(row, name, messages, location) for name in (field_chosen, field_rejected))
        return trees.PromptReplies(turns.with_system(messages, row, location), replies, pair_numbers(row, "margin", location))

    return read


def argilla(row: Row, location: str) -> trees.PromptReplies:
    """chat_template.argilla: two conversations of user and assistant in turn, alike up to the last message.

    A `prompt` must be a question of both conversations; a `system_messages` text goes before.
    """
    dialogues = [turns.read_dialogue(row.get(name), f"{location}: field {name}") for name in ("chosen", "rejected")]
    for name, (history, _) in zip(("chosen", "rejected"), dialogues, strict=True):
        order = [message["role"] for message in history if message["role"] != "system"]
        if order != ["user", "assistant"] * (len(order) // 2) + ["user"]:
            raise ValueError(
                f"{location}: field {name} has the roles {sources.join_names(order)}, assistant: expected user and assistant in turn"
            )
    if row.get("prompt") is not None:
        _check_question(column_text(row, ("prompt",), location), [history for history, _ in dialogues], location)
    history = _shared([(None, history) for history, _ in dialogues], location)
    return trees.PromptReplies(
        turns.with_system(history, row, location), tuple(reply for _, reply in dialogues), pair_numbers(row, "margin", location)
    )


def user_defined(
    *,
    field_prompt: str = "prompt",
    field_system: str = "system",
    field_chosen: str = "chosen",
    field_rejected: str = "rejected",
    prompt_format: str = "{prompt}",
    chosen_format: str = "{chosen}",
    rejected_format: str = "{rejected}",
) -> Callable[[Row, str], trees.PromptReplies]:
    """user_defined.default: columns of any name, put into texts of any wording. A missing system leaves its place empty.

    Errors: ValueError for a format that lacks its own field or names an unknown one.
    """
    fill = [
        wording.compile_wording("prompt_format", prompt_format or "{prompt}", ("prompt",), ("system",)),
        wording.compile_wording("chosen_format", chosen_format or "{chosen}", ("chosen",)),
        wording.compile_wording("rejected_format", rejected_format or "{rejected}", ("rejected",)),
    ]

    def read(row: Row, location: str) -> trees.PromptReplies:
        before = "".join(message["content"] for message in system_messages(row, location, field_system))
        question = column_text(row, (field_prompt,), location)
        replies = [column_text(row, (name,), location) for name in (field_chosen, field_rejected)]
        if not all(reply.strip() for reply in replies):
            return trees.PromptReplies(question, ("", ""), {})
        filled = fill[1](chosen=replies[0]), fill[2](rejected=replies[1])
        return trees.PromptReplies(fill[0](prompt=question, system=before), filled, pair_numbers(row, "margin", location))

    return read


def passthrough(row: Row, location: str) -> trees.PromptReplies:
    """Prompt, chosen and rejected as they are: three texts, or a conversation with two replies for the chat template."""
    if isinstance(row.get("prompt"), list):
        return templated(field_messages="prompt")(row, location)
    if row.get("prompt") is None and isinstance(row.get("chosen"), list):
        return argilla(row, location)
    texts = [column_text(row, (name,), location) for name in ("prompt", "chosen", "rejected")]
    return trees.PromptReplies(texts[0], tuple(texts[1:]), pair_numbers(row, "margin", location))


def without_options(read: Callable[[Row, str], trees.PromptReplies]) -> Callable[[], Callable]:
    """A `make` without options."""
    return lambda: read
