"""tokenizer_config.json: the fields that transformers uses without looking at their type, read by type before it does."""

from pathlib import Path
from typing import Any

from treetune.core import fields
from treetune.core.fields import Fields
from treetune.models import folder

NAME = "tokenizer_config.json"
OBJECTS, TEMPLATE = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json"), "chat_template.jinja"
TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces", "legacy", "split_special_tokens", "use_fast")
SIDES = ("padding_side", "truncation_side")


def read(root: Path) -> dict[str, Any]:
    """The tokenizer_config.json of a folder, {} where there is none. Raises ValueError for a value of another type."""
    if not (root / NAME).is_file():
        return {}
    config = fields.mapping(folder.read_json(root / NAME), str(root / NAME))
    for name in TOKENS:
        _check_token(config, name)
    for name in FLAGS:
        fields.flag(config, name, default=None, null=True)
    for name in SIDES:
        fields.text(config, name, default=None, choices=("left", "right"), null=True)
    for name in ("tokenizer_class", "processor_class", "name_or_path"):
        fields.text(config, name, default=None, null=True)
    fields.number(config, "model_max_length", default=None, above=0, null=True)
    fields.texts(config, "model_input_names", default=None, null=True)
    _check_template(config)
    _check_added(config)
    return config.values


def check_files(root: Path) -> None:
    """Raise ValueError, naming the file, for one beside tokenizer_config.json that is no JSON object, or a template that is no text.

    For a tokenizer that could not be read: transformers names no file.
    """
    for name in OBJECTS:
        if (root / name).is_file():
            folder.read_json(root / name)
    if (root / TEMPLATE).is_file():
        try:
            (root / TEMPLATE).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{root / TEMPLATE} is not UTF-8 text (byte {error.start}): download or save it again") from error


def _check_token(config: Fields, name: str) -> None:
    """A token is a text, or a mapping with its text and how it is found."""
    value = config.values.get(name)
    if isinstance(value, dict):
        fields.text(fields.inner(config, name), "content")
    else:
        fields.text(config, name, default=None, null=True)


def _check_template(config: Fields) -> None:
    """A template is a text; several are a list of name and template."""
    value = config.values.get("chat_template")
    if not isinstance(value, list):
        fields.text(config, "chat_template", default=None, null=True)
        return
    for one in value:
        part = fields.mapping(one, f"{config.source}: chat_template")
        fields.text(part, "name")
        fields.text(part, "template")


def _check_added(config: Fields) -> None:
    added = fields.inner(config, "added_tokens_decoder", default=None, null=True)
    for key in added.values if added else ():
        if not key.isdecimal():
            raise ValueError(f"{added.source} has the field {key!r}; expected the number of a token")
        fields.text(fields.inner(added, key), "content")
    for name in ("additional_special_tokens", "extra_special_tokens"):
        value = config.values.get(name)
        members = list(value.values()) if isinstance(value, dict) and name[0] == "e" else value
        if value is not None and not (isinstance(members, list) and all(_is_token(one) for one in members)):
            raise fields.wrong(config, name, "a list of tokens")


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))
