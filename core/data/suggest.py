"""The entry of `datasets` that would read rows whose columns no format fits: names of columns are matched with what they mostly hold."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

PLAIN = re.compile(r"[A-Za-z_./][\w./-]*")  # what YAML reads as a text without quotes, but for its own words
WORDS = ("yes", "no", "on", "off", "true", "false", "null", "y", "n")
ASKED = "question instruction prompt input query problem ask task user human source context".split()
ANSWERED = "answer response output completion reply solution target assistant bot gpt result label summary".split()
BETTER = "chosen chosen_response preferred better good accepted winner win positive".split()
WORSE = "rejected rejected_response dispreferred worse bad refused loser lose negative".split()
JUDGED = "label desirable good is_good score rating correct thumbs".split()
TEXTS = "content body document passage article story code markdown raw".split()


def suggest_entry(path: str, kind: str, columns: Sequence[str], row: Mapping[str, Any]) -> str:
    """Entry of `datasets` in one line of YAML; "" where the columns do not suggest any.

    kind: that of `kinds.KINDS`. row: the first one, which tells conversations from texts.
    """
    type_fields = _type(kind, list(columns), row)
    return "" if type_fields is None else f"datasets: [{{path: {_written(path)}, {type_fields}}}]"


def _type(kind: str, columns: list[str], row: Mapping[str, Any]) -> str | None:
    if kind == "text":
        return _text_type(columns, row)
    question = _named(columns, ASKED)
    if kind in ("pairs", "ranked"):
        fields = {"field_prompt": question, "field_chosen": _named(columns, BETTER), "field_rejected": _named(columns, WORSE)}
    elif kind in ("unpaired", "judged"):
        label = _named(columns, JUDGED)
        fields = {
            "field_prompt": question,
            "field_completion": _named([name for name in columns if name != label], ANSWERED),
            "field_label": label,
        }
    else:
        return None
    columns_by_field = {field: column for field, column in fields.items() if column is not None}
    if len(set(columns_by_field.values())) < len(fields):
        return None
    return f"type: {_mapping(columns_by_field)}"


def _text_type(columns: list[str], row: Mapping[str, Any]) -> str | None:
    if talk := next((name for name in columns if _is_talk(row.get(name))), None):
        return f"type: chat_template, field_messages: {_written(talk)}"
    question = _named(columns, ASKED)
    answer = _named([name for name in columns if name != question], ANSWERED)
    if question and answer:
        rest = [name for name in columns if name not in (question, answer)]
        more = {} if "input" in rest else {"field_input": ""} if "input" in (question, answer) else {}
        return f"type: {_mapping({'field_instruction': question, 'field_output': answer} | more)}"
    text = _named(columns, TEXTS) or (columns[0] if len(columns) == 1 and isinstance(row.get(columns[0]), str) else None)
    return f"type: completion, field: {_written(text)}" if text else None


def _is_talk(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and bool({"role", "from"} & value[0].keys())


def _named(columns: Sequence[str], words: Sequence[str]) -> str | None:
    """Column that equals one of the words, earlier words first; else a column with such a word in its name."""
    parts = {name: re.split(r"[^a-z]+", name.lower()) for name in columns}
    whole = next((name for word in words for name in columns if name.lower() == word), None)
    return whole or next((name for word in words for name in columns if word in parts[name]), None)


def _mapping(fields: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{name}: {_written(value)}" for name, value in fields.items()) + "}"


def _written(text: str) -> str:
    """A text as YAML has it inside braces."""
    return text if PLAIN.fullmatch(text) and text.lower() not in WORDS else json.dumps(text)
