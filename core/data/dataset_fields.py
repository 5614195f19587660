"""The fields of an entry of `datasets` and `test_datasets`: one table, field -> what it must be. Imports no torch.

Which of them a format takes is for the format to say, once the columns are known; a field that no format has is refused here.
"""

import difflib
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from treetune.core.data import yamlvalues
from treetune.core.data.files import FILE_TYPES
from treetune.core.data.yamltext import Reading, Written

EOS = ("turn", "all", "last")
BAD: Any = object()
ROWS_MAX, FLOAT_MAX = 10**9, 3e38  # counters are kept in JSON; what float32 holds


class Field(NamedTuple):
    """What a field must be, in words, and `read(written)` -> its value, or BAD."""

    expected: str
    read: Callable[[Written], Any]


def _checked(read: Callable, fits: Callable[[Any], bool] = lambda value: True) -> Callable[[Written], Any]:
    def found(written: Written) -> Any:
        value = read(written)
        return BAD if value is None or not fits(value) else value

    return found


def _or_null(field: Field) -> Field:
    return Field(f"{field.expected}, or null", lambda written: None if written.value is None else field.read(written))


def _whole(low: int) -> Field:
    fits = _checked(yamlvalues.integer, lambda value: low <= value <= ROWS_MAX)
    return Field(f"a whole number from {low} to {ROWS_MAX}", fits)


def _choice(*choices: str) -> Field:
    return Field(f"one of {', '.join(choices)}", _checked(lambda written: yamlvalues.text(written, choices)))


def _items(written: Written, read: Callable[[Written], Any]) -> Any:
    if not isinstance(written.value, list):
        return BAD
    out = [read(item) for item in written.value]
    return BAD if any(item is BAD for item in out) else out


def _mapping(written: Written, read: Callable[[Written], Any]) -> Any:
    if not isinstance(written.value, dict):
        return BAD
    out = {name: read(item) for name, item in written.value.items()}
    return BAD if any(item is BAD for item in out.values()) else out


def _json(written: Written) -> Any:
    """Any value that is JSON: what a chat template takes."""
    if isinstance(written.value, Reading):
        return BAD
    if isinstance(written.value, list):
        return _items(written, _json)
    if isinstance(written.value, dict):
        return _mapping(written, _json)
    if isinstance(written.value, float) and abs(written.value) > FLOAT_MAX or written.value != written.value:
        return BAD
    return written.value


_text = _checked(yamlvalues.text)
TEXT = Field("a text", _text)
NAME = Field("a text that is not empty", _checked(yamlvalues.text, lambda value: bool(value.strip())))
FLAG = Field("true or false", _checked(yamlvalues.flag))
TEXTS = Field("a list of texts", lambda written: _items(written, _text))
WEIGHT = Field("a number above 0: 2 reads its rows twice an epoch", _checked(yamlvalues.number, lambda value: 0 < value <= ROWS_MAX))
FILES = Field(
    "a file name, or a list of them",
    lambda written: value if (value := (TEXTS if isinstance(written.value, list) else NAME).read(written)) else BAD,
)
COLUMNS = Field("a mapping from a name to the name of its column", lambda written: _mapping(written, NAME.read))
ROLES = Field("a mapping from a role to the list of names that it has in the rows", lambda written: _mapping(written, TEXTS.read))
VALUES = Field("a mapping of the template's variables", lambda written: _mapping(written, _json))

SOURCE = {
    "path": NAME, "split": NAME, "name": _or_null(NAME), "revision": _or_null(NAME), "data_files": FILES,
    "ds_type": _or_null(_choice(*FILE_TYPES)), "shards": _or_null(_whole(1)), "shard_index": _whole(0), "limit": _or_null(_whole(1)),
    "skip": _whole(0), "train_on_split": NAME, "weight": WEIGHT,
}  # fmt: skip
# What rows of fixed columns in a wording of one's own take: `type: {field_instruction: ...}`, and the user_defined formats.
WORDED = {
    "field_system": _or_null(TEXT), "field_instruction": NAME, "field_input": _or_null(TEXT), "field_output": NAME, "format": TEXT,
    "no_input_format": _or_null(TEXT), "system_prompt": _or_null(TEXT), "system_format": TEXT, "train_on_inputs": FLAG,
    "field_prompt": NAME, "field_chosen": NAME, "field_rejected": NAME,
    "field_completion": NAME, "field_label": NAME, "prompt_format": _or_null(TEXT), "chosen_format": _or_null(TEXT),
    "rejected_format": _or_null(TEXT), "completion_format": _or_null(TEXT),
}  # fmt: skip
FORMATS = WORDED | {
    "field": NAME, "chat_template": _or_null(NAME), "chat_template_jinja": _or_null(NAME), "chat_template_kwargs": _or_null(VALUES),
    "roles_to_train": _or_null(TEXTS), "train_on_eos": _or_null(_choice(*EOS)), "field_messages": NAME, "field_tools": _or_null(NAME),
    "message_property_mappings": _or_null(COLUMNS), "message_field_role": _or_null(NAME), "message_field_content": _or_null(NAME),
    "roles": _or_null(ROLES), "message_field_training": NAME, "message_field_training_detail": NAME, "split_thinking": FLAG,
    "drop_system_message": FLAG,
    "default_system_message": _or_null(TEXT), "step_separator": TEXT, "train_on_last_step_only": FLAG,
}  # fmt: skip
LIST = "must be a list of mappings with a path each, such as `- path: rows.jsonl`"
TYPE = Field(
    "the name of a format or an import path, a mapping of field_ options, or null for rows that are tokens",
    lambda written: None if written.value is None else NAME.read(written),
)


def entries(written: Written, name: str, place: str, fields: dict[str, Field]) -> tuple[dict, ...]:
    """The entries of `datasets`, with some of these fields. Errors: ValueError: file, entry, field, what was expected, what was there."""
    if not isinstance(written.value, list):
        raise ValueError(f"{place}: {name} {LIST}, got {yamlvalues.shown(written)}")
    for i, item in enumerate(written.value, 1):
        if not isinstance(item.value, dict) or not item.value.keys() & {"path", "data_files"}:
            arrived = f"has {', '.join(item.value) or 'nothing'}" if isinstance(item.value, dict) else f"is {yamlvalues.shown(item)}"
            raise ValueError(f"{place}: {name} {LIST}; entry {i} {arrived}")
    return tuple(_entry(item.value, f"{place}: {name} entry {i}", fields) for i, item in enumerate(written.value, 1))


def _entry(values: dict[str, Written], place: str, fields: dict[str, Field]) -> dict:
    if isinstance(values.get("path", Written(None)).value, str):
        place = f"{place} ({values['path'].value})"
    refuse_unknown(values, fields, place)
    return {name: _type(item, place) if fields[name] is TYPE else _field(name, item, fields[name], place) for name, item in values.items()}


def refuse_unknown(values: Collection[str], names: Collection[str], place: str) -> None:
    """Raise ValueError for fields with other names, all of them, each with the nearest name."""
    if unknown := [name for name in values if name not in names]:
        listed = ", ".join(f"{name}{_nearest(name, names)}" for name in unknown)
        raise ValueError(f"{place}: unknown key{'s' * (len(unknown) > 1)} {listed}; expected some of {', '.join(names)}")


def _nearest(word: str, names: Collection[str]) -> str:
    match = difflib.get_close_matches(word, list(names), n=1, cutoff=0.8)
    return f" (did you mean {match[0]}?)" if match else ""


def _field(name: str, written: Written, field: Field, place: str) -> Any:
    value = field.read(written)
    if value is BAD:
        raise yamlvalues.wrong(written, f"{place}: {name}", field.expected)
    return value


def _type(written: Written, place: str) -> Any:
    """A name, an import path, null for rows that are tokens, or a mapping of what the columns are called."""
    if isinstance(written.value, dict):
        refuse_unknown(written.value, WORDED, f"{place}: type")
        return {name: _field(name, item, WORDED[name], f"{place}: type") for name, item in written.value.items()}
    return _field("type", written, TYPE, place)


ROWS = SOURCE | {"type": TYPE} | FORMATS
PROMPTS = {name: field for name, field in SOURCE.items() if name not in ("train_on_split", "weight")}
PROMPTS |= {"type": Field("a transform, as module.function or file.py:function", NAME.read), "field_prompt": NAME}
TEXTS_ONLY = {name: field for name, field in SOURCE.items() if name != "train_on_split"}
TEXTS_ONLY |= {"text_column": NAME, "field": NAME, "type": _choice("completion", "pretrain")}


def of_options(names: Collection[str]) -> dict[str, Field]:
    """The fields of entries for a command with these options."""
    if "field_prompt" in names:
        return PROMPTS
    return TEXTS_ONLY if "text_column" in names else ROWS
