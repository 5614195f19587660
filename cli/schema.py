"""Config files as JSON schemas, for editors: ours, from the options of a command, and axolotl's, from the table of its keys. No torch."""

from typing import Any

from treetune.cli.axolotl import keys, translate, values
from treetune.cli.methods import METHODS
from treetune.core.config import table, wording
from treetune.core.config.table import Option
from treetune.core.data import dataset_fields

DRAFT = "https://json-schema.org/draft/2020-12/schema"
KINDS = {bool: "boolean", int: "integer", float: "number", str: "string"}
SECTIONS = {"trl": "grpo", "ebft": "ebft"}
# What keys of axolotl's hold that are more than one option of ours, or need nothing.
HELD: dict[str, dict[str, Any]] = {
    "rl": {"enum": [*translate.METHODS, None], "description": "Method; null is supervised fine-tuning."},
    "reward_model": {"type": ["boolean", "null"], "description": "Train a reward model on pairs."},
    "process_reward_model": {"type": ["boolean", "null"], "description": "Train a reward model on steps."},
    "bf16": {"enum": [True, False, "auto", "full", None], "description": "Compute in bfloat16."},
    "fp16": {"enum": [True, False, "full", None], "description": "Compute in float16, with loss scaling."},
    "load_in_4bit": {"type": ["boolean", "null"], "description": "Quantise frozen linear layers to 4 bits."},
    "load_in_8bit": {"type": ["boolean", "null"], "description": "Quantise frozen linear layers to 8 bits."},
    "lora_target_linear": {"type": ["boolean", "null"], "description": "Adapt all linear layers."},
}


def of_method(name: str) -> dict[str, Any]:
    """The schema of a file of ours for a training command."""
    config = METHODS[name].config
    said = wording.texts(config)
    rows = {"method": {"const": name, "description": "Training command that `treetune train` starts."}}
    rows |= {key: _option(option, said.get(key, "")) for key, option in table.options(config).items()}
    return _whole(f"treetune {name}", rows)


def of_axolotl() -> dict[str, Any]:
    """The schema of a file of axolotl's as it is read here: every key that is supported, and those that need nothing."""
    rows: dict[str, Any] = {}
    for method in METHODS.values():
        said = wording.texts(method.config)
        for key, option in table.options(method.config).items():
            rows.setdefault(key, _nullable(_option(option, said.get(key, ""))))
    for key, name in keys.RENAMED.items():
        if name in rows:
            rows[key] = rows[name]
    rows |= {key: {"description": "Read here as options of ours."} for key in values.FUNCTIONS if key not in rows}
    rows |= {key: {"description": f"Needs nothing here: {why}."} for key, why in keys.NOTHING.items()}
    whole = rows | HELD
    for key, method in SECTIONS.items():
        own = table.options(METHODS[method].config)
        part = {name: row for name, row in rows.items() if keys.RENAMED.get(name, name) in own or name in values.FUNCTIONS}
        whole[key] = {"type": ["object", "null"], "properties": part, "description": f"Options of {method}; they may stand outside, too."}
    whole["vllm"] = {"type": ["object", "null"], "description": "Options of treetune serve."}
    whole["bnb_config_kwargs"] = {"type": ["object", "null"], "description": "Options of quantising, as bitsandbytes names them."}
    return _whole("axolotl, as treetune reads it", {key: part for key, part in whole.items() if key != "model"})


def _whole(title: str, rows: dict[str, Any]) -> dict[str, Any]:
    return {"$schema": DRAFT, "title": title, "type": "object", "properties": rows, "additionalProperties": False}


def _option(option: Option, text: str) -> dict[str, Any]:
    one: dict[str, Any] = {"type": KINDS.get(option.single, "object")}
    if option.choices and option.door is None:
        one["enum"] = list(option.choices)
    elif option.choices:
        one["examples"] = list(option.choices)
    if option.of_mappings:
        part = {"type": "object", "properties": {name: {"description": field.expected} for name, field in dataset_fields.ROWS.items()}}
        one = {"type": "array", "items": part}
    elif option.many:
        several = [one, {"type": "array", "items": one}]
        one = {"anyOf": [*several, {"type": "object"}] if option.pairs is not None and option.pairs.named else several}
    if option.switch is not None:
        one = {"anyOf": [one, {"type": "boolean"}]}
    if option.optional:
        one = _nullable(one)
    if option.range is not None and not option.many:
        one["description"] = f"{text} Must be {option.range.expected()}.".strip()
    elif text:
        one["description"] = text
    if option.default is not table.REQUIRED:
        one["default"] = option.default
    return one


def _nullable(one: dict[str, Any]) -> dict[str, Any]:
    if isinstance(one.get("type"), str):
        out = one | {"type": [one["type"], "null"]}
        return out | {"enum": [*one["enum"], None]} if "enum" in one else out
    return one | {"anyOf": [*one["anyOf"], {"type": "null"}]} if "anyOf" in one and {"type": "null"} not in one["anyOf"] else one
