"""Preference rows: a prompt, a chosen and a rejected reply. One table, from the name of a format to how its rows are read.

Formats of fixed wording (chatml, llama3, zephyr) give texts; the others give messages for the chat template, or texts as they are.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import NamedTuple

from treetune.core.data import sources, trees, turns, wording

PROMPTS = ("prompt", "input", "question", "instruction")
WRITTEN_TALK = re.compile(r"""\s*\[\s*\{\s*["'](role|from|content|value)["']\s*:""")  # messages as the text of a list
LARGEST = 1e6  # of a margin


class Fields(NamedTuple):
    """Which columns hold what, the documented name first; `talks` when chosen and rejected are conversations."""

    prompt: tuple[str, ...]  # none: the question is the first part of the conversations
    chosen: tuple[str, ...] = ("chosen",)
    rejected: tuple[str, ...] = ("rejected",)
    talks: bool = False


RESPONSES = (("chosen", "chosen_response"), ("rejected", "rejected_response"))
FIELDS = {
    "default": Fields(PROMPTS, *RESPONSES),
    "argilla": Fields(("instruction", *PROMPTS[:-1]), *(names[::-1] for names in RESPONSES)),
    "argilla_chat": Fields((), talks=True),
    "icr": Fields(("input",)),
    "intel": Fields(("question",)),
    "prompt_pairs": Fields(("prompt",)),
    "ultra": Fields(("prompt",), talks=True),
}


def text(row: dict, names: Sequence[str], where: str) -> str:
    """The text under the first of `names` that the row has. Errors: ValueError when there is none, or something else than text."""
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        raise sources.missing_field(names, row, where)
    if not isinstance(row[name], str):
        raise ValueError(f"{where}: field {name} is {turns.type_name(row[name])}, expected text")
    if WRITTEN_TALK.match(row[name]):
        raise ValueError(f"{where}: field {name} is a list of messages written as text: write it as a list (in .jsonl or .parquet)")
    return row[name]


def system(row: dict, where: str, name: str = "system") -> list[dict]:
    """The row's system message, if it has one."""
    return turns.with_system([], row, where, name)


def numbers(row: dict, name: str, where: str) -> dict[str, tuple]:
    """The optional number `name` of a pair, for both sides, also as text, since CSV files have nothing else.

    Errors: ValueError for anything but a number of at most LARGEST in size.
    """
    value = row.get(name)
    if value is None or value == "":
        return {}
    found = number(value)
    if found is None or not abs(found) <= LARGEST:
        raise ValueError(f"{where}: field {name} is {sources.quote(value)}, expected a number from {-LARGEST:g} to {LARGEST:g}")
    return {name: (found, found)}


def number(value: object) -> float | None:
    """A number, or the text of one, as a float; None for anything else, and for what a float cannot hold."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def styled(style: wording.TurnStyle, fields: Fields) -> Callable[[dict, str], trees.Sides]:
    """Reader of rows in a fixed wording."""

    def read(row: dict, where: str) -> trees.Sides:
        said = [(text(row, names, where), None) if not fields.talks else _talk(row, names[0], where) for names in fields[1:3]]
        if fields.prompt:
            asked = text(row, fields.prompt, where)
            if fields.talks:
                _check_single(said, where)
                _check_question(asked, [history for _, history in said], where, next(name for name in fields.prompt if row.get(name)))
            history = [{"role": "user", "content": asked}]
        else:
            history = _shared(said, where)
        replies = tuple(reply for reply, _ in said)
        prompt = wording.render_prompt(style, turns.with_system(history, row, where), where)
        return trees.Sides(prompt, replies, numbers(row, "margin", where), style.end)

    return read


def _talk(row: dict, name: str, where: str) -> tuple[str, list[dict]]:
    history, reply = turns.read_dialogue(row.get(name), f"{where}: field {name}")
    return turns.turn_text(reply, f"{where}: field {name}: the reply"), history


def _check_question(prompt: str, histories: Sequence[list[dict]], where: str, name: str = "prompt") -> None:
    """Errors: ValueError for conversations in which nobody asks what the prompt says."""
    for side, history in zip(("chosen", "rejected"), histories, strict=True):
        asked = [one.get("content") for one in history if one["role"] == "user"]
        if not any(isinstance(one, str) and one.strip() == prompt.strip() for one in asked):
            other = sources.quote(asked[-1] if asked else "")
            raise ValueError(
                f"{where}: field {name} is {sources.quote(prompt)}, but the question in {side} is {other}: "
                f"make them alike, or remove {name}"
            )


def _shared(said: Sequence[tuple], where: str) -> list[dict]:
    """The history that both sides have. Errors: ValueError when they differ."""
    if said[0][1] != said[1][1]:
        raise ValueError(
            f"{where}: fields chosen and rejected differ before their last message: expected one conversation with two endings"
        )
    return said[0][1]


def _check_single(said: Sequence[tuple], where: str) -> None:
    for name, (_, history) in zip(("chosen", "rejected"), said, strict=True):
        if [one["role"] for one in history] != ["user"]:
            raise ValueError(
                f"{where}: field {name} has {len(history) + 1} messages, expected one question and one reply besides the prompt"
            )


def nectar(row: dict, where: str) -> trees.Sides:
    """zephyr.nectar: the answer of the best rank (the lowest number) against the next best."""
    prompt, answers = text(row, ("prompt",), where), row.get("answers")
    if not isinstance(answers, list) or len(answers) < 2:
        raise ValueError(f"{where}: field answers is {turns.type_name(answers)}, expected a list of two or more answers with their ranks")
    for i, one in enumerate(answers, 1):
        here = f"{where}: field answers, answer {i}"
        rank = one.get("rank") if isinstance(one, dict) else None
        if isinstance(rank, bool) or not isinstance(rank, int | float) or rank != rank:
            raise ValueError(f"{here}: field rank is {sources.quote(rank)}, expected an object with a text and a number (answer, rank)")
        text(one, ("answer",), here)
    best, second = sorted(answers, key=lambda one: one["rank"])[:2]
    before = "".join(one["content"] for one in system(row, where))
    prompt = f"<|system|>\n{before}</s>\n<|user|>\n{prompt}</s>\n<|assistant|>\n"
    return trees.Sides(prompt, (best["answer"], second["answer"]), {})


def templated(
    *,
    field_messages: str = "messages",
    field_chosen: str = "chosen",
    field_rejected: str = "rejected",
    message_field_role: str = "role",
    message_field_content: str = "content",
    message_property_mappings: Mapping[str, str] | None = None,
    roles: Mapping[str, Sequence[str]] = turns.ROLES,
) -> Callable[[dict, str], trees.Sides]:
    """chat_template.default: a conversation (or a question as text), and two replies: a message, a text, or a conversation with it last.

    message_property_mappings: {"role": ..., "content": ...}, the same as the two message_field_ options.
    """
    names = {"role": message_field_role, "content": message_field_content} | dict(message_property_mappings or {})
    extra = set(names) - {"role", "content"}
    if extra:
        raise ValueError(f"message_property_mappings has {', '.join(sorted(extra))}: expected role and content")

    def reply(row: dict, name: str, history: list[dict], where: str) -> dict:
        value, where = row.get(name), f"{where}: field {name}"
        if isinstance(value, str):
            return {"role": "assistant", "content": text(row, (name,), where.removesuffix(f": field {name}"))}
        said = turns.read_turns([value] if isinstance(value, dict) else value, where, roles=roles, replies=1, **names)
        if said[-1]["role"] != "assistant":
            raise ValueError(f"{where} has {len(said)} messages: expected the assistant's reply, alone or after the messages of the prompt")
        if said[:-1] not in ([], history, history[-1:]):
            raise ValueError(f"{where} has {len(said)} messages, and those before the reply are not the prompt's: give the reply alone")
        return said[-1]

    def read(row: dict, where: str) -> trees.Sides:
        if isinstance(row.get(field_messages), str):
            said = [{"role": "user", "content": text(row, (field_messages,), where)}]
        else:
            said = turns.read_turns(row.get(field_messages), f"{where}: field {field_messages}", roles=roles, replies=0, **names)
        replies = tuple(reply(row, name, said, where) for name in (field_chosen, field_rejected))
        return trees.Sides(turns.with_system(said, row, where), replies, numbers(row, "margin", where))

    return read


def argilla(row: dict, where: str) -> trees.Sides:
    """chat_template.argilla: two conversations of user and assistant in turn, alike up to the last message.

    A `prompt` must be a question of both conversations; a `system` text goes before.
    """
    said = [turns.read_dialogue(row.get(name), f"{where}: field {name}") for name in ("chosen", "rejected")]
    for name, (history, _) in zip(("chosen", "rejected"), said, strict=True):
        order = [one["role"] for one in history if one["role"] != "system"]
        if order != ["user", "assistant"] * (len(order) // 2) + ["user"]:
            raise ValueError(
                f"{where}: field {name} has the roles {sources.join_names(order)}, assistant: expected user and assistant in turn"
            )
    if row.get("prompt") is not None:
        _check_question(text(row, ("prompt",), where), [history for history, _ in said], where)
    history = _shared([(None, history) for history, _ in said], where)
    return trees.Sides(turns.with_system(history, row, where), tuple(reply for _, reply in said), numbers(row, "margin", where))


def user_defined(
    *,
    field_prompt: str = "prompt",
    field_system: str = "system",
    field_chosen: str = "chosen",
    field_rejected: str = "rejected",
    prompt_format: str = "{prompt}",
    chosen_format: str = "{chosen}",
    rejected_format: str = "{rejected}",
) -> Callable[[dict, str], trees.Sides]:
    """user_defined.default: columns of any name, put into texts of any wording. A missing system leaves its place empty.

    Errors: ValueError for a format that lacks its own field or names an unknown one.
    """
    fill = [
        wording.compile_wording("prompt_format", prompt_format or "{prompt}", ("prompt",), ("system",)),
        wording.compile_wording("chosen_format", chosen_format or "{chosen}", ("chosen",)),
        wording.compile_wording("rejected_format", rejected_format or "{rejected}", ("rejected",)),
    ]

    def read(row: dict, where: str) -> trees.Sides:
        before = "".join(one["content"] for one in system(row, where, field_system))
        asked = text(row, (field_prompt,), where)
        replies = [text(row, (name,), where) for name in (field_chosen, field_rejected)]
        if not all(reply.strip() for reply in replies):
            return trees.Sides(asked, ("", ""), {})
        filled = fill[1](chosen=replies[0]), fill[2](rejected=replies[1])
        return trees.Sides(fill[0](prompt=asked, system=before), filled, numbers(row, "margin", where))

    return read


def passthrough(row: dict, where: str) -> trees.Sides:
    """Prompt, chosen and rejected as they are: three texts, or a conversation with two replies for the chat template."""
    if isinstance(row.get("prompt"), list):
        return templated(field_messages="prompt")(row, where)
    if row.get("prompt") is None and isinstance(row.get("chosen"), list):
        return argilla(row, where)
    texts = [text(row, (name,), where) for name in ("prompt", "chosen", "rejected")]
    return trees.Sides(texts[0], tuple(texts[1:]), numbers(row, "margin", where))


def fixed(read: Callable[[dict, str], trees.Sides]) -> Callable[[], Callable]:
    """A `make` without options."""
    return lambda: read
