"""Preference rows: a prompt, a chosen and a rejected reply. One table, from the name of a format to how its rows are read.

Formats of fixed wording (chatml, llama3, zephyr) give texts; the others give messages for the chat template, or texts as they are.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from treetune.core.data import sources, trees, turns, wording

PROMPTS = ("prompt", "input", "question", "instruction")


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
        raise ValueError(f"{where} has no field {' or '.join(names)}; it has {sources.listed(map(str, row))}")
    if not isinstance(row[name], str):
        raise ValueError(f"{where}: field {name} is {turns.kind(row[name])}, expected text")
    return row[name]


def system(row: dict, where: str, name: str = "system") -> list[dict]:
    """The row's system message, if it has one."""
    return [{"role": "system", "content": text(row, (name,), where)}] if row.get(name) not in (None, "") else []


def numbers(row: dict, name: str, where: str) -> dict[str, tuple]:
    """The optional number `name` of a pair, for both sides. Errors: ValueError for anything but a finite number."""
    value = row.get(name)
    if value is None:
        return {}
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise ValueError(f"{where}: field {name} is {value!r}, expected a number")
    return {name: (float(value), float(value))}


def styled(style: wording.Style, fields: Fields) -> Callable[[dict, str], trees.Sides]:
    """Reader of rows in a fixed wording."""

    def read(row: dict, where: str) -> trees.Sides:
        said = [(text(row, names, where), None) if not fields.talks else _talk(row, names[0], where) for names in fields[1:3]]
        history = [{"role": "user", "content": text(row, fields.prompt, where)}] if fields.prompt else _shared(said, where)
        if fields.prompt and fields.talks:
            _check_single(said, where)
        first = [] if history[0]["role"] == "system" else system(row, where)
        replies = tuple(reply for reply, _ in said)
        return trees.Sides(wording.prompt(style, first + history), replies, numbers(row, "margin", where), style.end)

    return read


def _talk(row: dict, name: str, where: str) -> tuple[str, list[dict]]:
    history, reply = turns.dialogue(row.get(name), f"{where}: field {name}")
    return reply["content"], history


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
        raise ValueError(f"{where}: field answers is {turns.kind(answers)}, expected a list of two or more answers with their ranks")
    for i, one in enumerate(answers, 1):
        here = f"{where}: field answers, answer {i}"
        rank = one.get("rank") if isinstance(one, dict) else None
        if isinstance(rank, bool) or not isinstance(rank, int | float) or rank != rank:
            raise ValueError(f"{here}: field rank is {rank!r}, expected an object with a text and a number (answer, rank)")
        text(one, ("answer",), here)
    best, second = sorted(answers, key=lambda one: one["rank"])[:2]
    prompt = f"<|system|>\n</s>\n<|user|>\n{prompt}</s>\n<|assistant|>\n"
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
            return {"role": "assistant", "content": value}
        said = [turns.message(value, where, roles=roles, **names)] if isinstance(value, dict) else None
        said = said or turns.messages(value, where, roles=roles, **names)
        if said[-1]["role"] != "assistant" or said[:-1] not in ([], history, history[-1:]):
            raise ValueError(f"{where} has {len(said)} messages: expected the assistant's reply, alone or after the messages of the prompt")
        return said[-1]

    def read(row: dict, where: str) -> trees.Sides:
        value = row.get(field_messages)
        said = [{"role": "user", "content": value}] if isinstance(value, str) else None
        said = said or turns.messages(value, f"{where}: field {field_messages}", roles=roles, **names)
        replies = tuple(reply(row, name, said, where) for name in (field_chosen, field_rejected))
        return trees.Sides(said, replies, numbers(row, "margin", where))

    return read


def argilla(row: dict, where: str) -> trees.Sides:
    """chat_template.argilla: two conversations of user and assistant in turn, alike up to the last message.

    A `prompt` is the question of a conversation of two messages; a `system` text goes before.
    """
    said = [turns.dialogue(row.get(name), f"{where}: field {name}") for name in ("chosen", "rejected")]
    for name, (history, _) in zip(("chosen", "rejected"), said, strict=True):
        order = [one["role"] for one in history if one["role"] != "system"]
        if order != ["user", "assistant"] * (len(order) // 2) + ["user"]:
            raise ValueError(f"{where}: field {name} has the roles {sources.listed(order)}, assistant: expected user and assistant in turn")
    prompt = text(row, ("prompt",), where) if row.get("prompt") is not None else ""
    if prompt and all(len(history) == 1 for history, _ in said):
        history = [{"role": "user", "content": prompt}]
    else:
        history = _shared([(None, history) for history, _ in said], where)
    first = [] if history[0]["role"] == "system" else system(row, where)
    return trees.Sides(first + history, tuple(reply for _, reply in said), numbers(row, "margin", where))


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
        wording.filler("prompt_format", prompt_format or "{prompt}", ("prompt",), ("system",)),
        wording.filler("chosen_format", chosen_format or "{chosen}", ("chosen",)),
        wording.filler("rejected_format", rejected_format or "{rejected}", ("rejected",)),
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


def _styles() -> dict[str, trees.Form]:
    forms = {}
    for style in ("chatml", "llama3"):
        for name, fields in FIELDS.items():
            columns = tuple(names[0] for names in fields[:3] if names)
            forms[f"{style}.{name}"] = trees.Form(columns, fixed(styled(wording.STYLES[style], fields)))
    return forms


FORMATS: dict[str, trees.Form] = _styles() | {
    "zephyr.nectar": trees.Form(("prompt", "answers"), fixed(nectar)),
    "chat_template.default": trees.Form(("messages", "chosen", "rejected"), templated),
    "chat_template.argilla": trees.Form(("chosen", "rejected"), fixed(argilla)),
    "chat_template.argilla_chat": trees.Form(("chosen", "rejected"), fixed(argilla)),
    "user_defined.default": trees.Form(("prompt", "chosen", "rejected"), user_defined),
    "passthrough": trees.Form(("prompt", "chosen", "rejected"), fixed(passthrough)),
}
