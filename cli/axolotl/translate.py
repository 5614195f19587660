"""A file of axolotl's as options of a command of ours. Imports no torch."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from treetune.cli import methods
from treetune.cli.axolotl import keys, meanings, rows
from treetune.cli.axolotl.file import File, Unsupported, Values, is_off, lenient, truth, write
from treetune.cli.axolotl.flags import CHOOSE
from treetune.cli.axolotl.values import FUNCTIONS
from treetune.core.config import reading, suggestions, table
from treetune.core.config.table import Option
from treetune.core.data import yamlvalues
from treetune.core.data.yamltext import Written

METHODS = {"dpo": "dpo", "ipo": "dpo", "kto": "kto", "orpo": "orpo", "simpo": "simpo", "grpo": "grpo", "gdpo": "grpo", "ebft": "ebft"}
LOSSES = {"ipo": {"loss": "ipo"}, "gdpo": {"advantage": "gdpo"}}
# Options of vllm: with another name where a run starts the server itself.
MANAGED = {"gpu_memory_utilization": "vllm_gpu_memory_utilization", "max_model_len": "vllm_max_model_len", "port": "vllm_server_port"}
# Keys of files of LLaMA-Factory, and arguments of transformers' trainers.
OTHERS = frozenset({"model_name_or_path", "finetuning_type", "per_device_train_batch_size", "num_train_epochs"})


class Translation(NamedTuple):
    """Options of the command, typed.

    notes: what the file means where that differs from our defaults. read: keys that are options of other names, and these.
    needless: keys that need nothing here. left: sections for others.
    """

    values: dict[str, Any]
    notes: tuple[str, ...]
    read: tuple[str, ...]
    needless: tuple[str, ...]
    left: tuple[str, ...]


def is_foreign(written: Mapping[str, Written]) -> bool:
    """Whether a file has axolotl's keys: one of those that ours never have, and no `model`."""
    return "model" not in written and any(key in keys.MARKS or key.startswith(keys.KERNEL_STARTS) for key in written)


def method_of(written: Mapping[str, Written], path: str) -> str:
    """The training command that a file of axolotl's is for. Errors: ValueError for an `rl` that is none."""
    kind = written["rl"].value if "rl" in written else None
    if kind not in (None, False, ""):
        if not isinstance(kind, str) or kind not in METHODS:
            raise ValueError(f"{path}: rl must be one of {', '.join(METHODS)}, got {yamlvalues.shown(written['rl'])}")
        return METHODS[kind]
    for key, method in (("process_reward_model", "prm"), ("reward_model", "reward"), ("pretraining_dataset", "pretrain"),
                        ("ebft", "ebft"), ("trl", "grpo")):  # fmt: skip
        if key in written and written[key].value:
            return method
    return "ebft" if any(kind.startswith("ebft_") for kind in _types(written)) else "sft"


def _types(written: Mapping[str, Written]) -> list[str]:
    """The formats of the data sets that a file names."""
    listed = written["datasets"].value if "datasets" in written else []
    entries = [item.value for item in listed if isinstance(item.value, dict)] if isinstance(listed, list) else []
    return [str(entry["type"].value) for entry in entries if "type" in entry]


def translate(written: Mapping[str, Written], command: str, options: Mapping[str, Option], path: str) -> Translation:
    """The options of a training command that a file of axolotl's means.

    Errors: ValueError, one line, with every key that is not supported and the nearest thing that is, and every value that is wrong.
    """
    flat, left = _flat(written, command, options, path)
    file = File(command, options, {key: _lenient(key, value, options) for key, value in flat.items()})
    each, missing, wrong = _meant(file)
    idle = {name: why for name, why in rows.idle(file).items() if name in options}
    values = {name: value for meant in each.values() for name, value in meant.items() if name not in idle}
    # What is wrong with a key may be wrong with what is made of it, so the rest is not asked.
    absent, notes = meanings.values_of(iter(()) if missing or wrong else meanings.absent(file))
    counted, counts = meanings.values_of(iter(()) if missing or wrong else meanings.counted(file))
    chosen = {name: write(value) for name, value in LOSSES.get(str(file.value("rl")), {}).items() if name not in values}
    origins = {name: key for key, meant in each.items() for name in meant}
    typed = _typed(absent | values | chosen | counted, origins, options, path, wrong)
    if missing or wrong:
        raise ValueError(f"{path}: {_refusal(missing, wrong)}")
    lines = (*_chosen(file, written), *notes, *counts, *(f"left out, as nothing would look at it: {name} ({idle[name]})" for name in idle))
    read = [text for key, meant in each.items() if (text := _read(key, meant))]
    return Translation(typed, lines, tuple(read), tuple(key for key, meant in each.items() if not meant), tuple(left))


def _meant(file: File) -> tuple[dict[str, Values], dict[str, str], list[str]]:
    """{key: its options}, {key that is not supported: the nearest thing that is}, and what is wrong with the form of others."""
    each: dict[str, Values] = {}
    missing: dict[str, str] = {}
    wrong: list[str] = []
    for key, value in file.keys.items():
        if value.value is None or key in CHOOSE and key != "pretraining_dataset":
            continue
        try:
            each[key] = _option(key, value, file)
        except Unsupported as nearest:
            missing[key] = str(nearest)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            wrong.append(f"{key} is of another form than axolotl's, got {yamlvalues.shown(value)}")
    return each, missing, wrong


def _read(key: str, meant: Values) -> str:
    """What a key is here, where it is not the option of its name alone: "bf16 is dtype bfloat16"; empty where it is."""
    named = [f"{name} {yamlvalues.shortened(str(yamlvalues.plain(value)))}" for name, value in meant.items()]
    silent = not meant or set(meant) == {key} or key in ("base_model", "datasets", "pretraining_dataset")
    return "" if silent else f"{key} is {', '.join(named)}"


def _lenient(key: str, value: Written, options: Mapping[str, Option]) -> Written:
    name = keys.RENAMED.get(key, key)
    if value.value == "" and key != "sample_prompt" or key == "adapter" and value.value in (False, "none"):
        return Written(None)
    return lenient(value, options[name]) if name in options else truth(value)


def _typed(values: Values, origins: Mapping[str, str], options: Mapping[str, Option], path: str, wrong: list[str]) -> dict[str, Any]:
    """The values as the options have them; those that are wrong are told, each with the key of the file that it comes from."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        try:
            out |= reading.from_written({name: value}, options, path)
        except ValueError as error:
            key, text = origins.get(name, name), str(error).removeprefix(f"{path}: ")
            wrong.append(text if key in text else f"{text}; the file says so by {key}")
    return out


def _chosen(file: File, written: Mapping[str, Written]) -> list[str]:
    key = next((key for key in CHOOSE if key in written and written[key].value), None)
    section = next((name for name in ("ebft", "trl") if name in written), None)
    if key == "rl":
        return [f"rl: {file.value('rl')} is treetune {file.command}"]
    if key is not None:
        return [f"{key} is treetune {file.command}"]
    if section is not None and file.command in meanings.SAMPLED:
        return [f"no rl, but a section {section}: treetune {file.command}"]
    return ["no rl, but rows of EBFT: treetune ebft"] if file.command == "ebft" else []


def _flat(written: Mapping[str, Written], command: str, options: Mapping[str, Option], path: str) -> tuple[Values, list[str]]:
    """The keys with those of sections among them, and the names of sections that are for another command."""
    flat: Values = {}
    left: list[str] = []
    # A section of EBFT is of its strided mode where the other one, too, has a key.
    strided = "ebft" in written and isinstance(written["ebft"].value, dict) and _is_strided(written["ebft"].value)
    for key, value in sorted(_batched(written).items(), key=lambda item: item[0] == ("ebft" if strided else "trl")):
        if key not in ("trl", "ebft", "vllm", "bnb_config_kwargs"):
            flat[key] = value
        elif value.value is None:
            continue
        elif not isinstance(value.value, dict):
            raise ValueError(f"{path}: {key} must be a mapping, got {yamlvalues.shown(value)}")
        elif key == "vllm":
            flat |= _engine(value.value, written, command, options)
            left += [] if command == "serve" else ["vllm (for treetune serve)"]
        elif key == "ebft" and command != "ebft" or key == "trl" and command not in meanings.SAMPLED and command in METHODS.values():
            left.append(key)
        else:
            flat |= {name: item for name, item in value.value.items()}
    return flat, left


def _batched(written: Mapping[str, Written]) -> dict[str, Written]:
    """The keys with batch_size, the rows of a step on one device, as gradient_accumulation_steps."""
    out, whole = dict(written), written.get("batch_size")
    rows = yamlvalues.integer(written["micro_batch_size"]) if "micro_batch_size" in written else 1
    size = None if whole is None else yamlvalues.integer(whole)
    if size and rows and out.get("gradient_accumulation_steps", Written(None)).value is None:
        out["gradient_accumulation_steps"] = write(max(1, size // rows))
        del out["batch_size"]
    return out


def _is_strided(section: Mapping[str, Written]) -> bool:
    return "mode" in section and section["mode"].value == "strided"


def _engine(section: Mapping[str, Written], written: Mapping[str, Written], command: str, options: Mapping[str, Option]) -> Values:
    trl = written["trl"].value if "trl" in written and isinstance(written["trl"].value, dict) else {}
    managed = "vllm_mode" in trl and trl["vllm_mode"].value in ("colocate", "managed")
    if not managed or command not in meanings.SAMPLED:
        return {}
    return {MANAGED[name]: value for name, value in section.items() if name in MANAGED and MANAGED[name] not in trl}


def _option(key: str, value: Written, file: File) -> Values:
    """The options that a key means; none where it needs nothing. Errors: Unsupported, with what there is instead."""
    if key == "pretraining_dataset":
        return rows.corpus(value, file)
    if key in rows.FOR_ENTRIES and key not in file.options:
        return {}
    if key in FUNCTIONS:
        meant = FUNCTIONS[key](yamlvalues.plain(value), file)
        return meant if meant.keys() <= file.options.keys() else _without(key, value, file)
    name = keys.RENAMED.get(key, key)
    if name in file.options and is_off(value, file.options[name]):
        return {}
    if name in file.options:
        return {name: rows.entries(value, file) if file.options[name].of_mappings else value}
    return _without(key, value, file)


def _without(key: str, value: Written, file: File) -> Values:
    """What a key is that is no option: nothing, where it needs nothing. Errors: Unsupported, with what there is instead."""
    if keys.is_needless(key) or key in FOR_OTHERS.get(file.command, ()) or _says_nothing(value) and _is_known(key):
        return {}
    if file.command == "pretrain" and (key == "adapter" or key.startswith("lora_")):
        raise Unsupported("datasets with type: completion, as pretrain trains all weights")
    if key in keys.MISSING:
        raise Unsupported(keys.MISSING[key])
    meant = suggestions.of_option(key, file.options)
    raise Unsupported(
        meant.strip().removeprefix("(did you mean ").removeprefix("(").removesuffix(")").removesuffix("?")
        or f"no option of treetune {file.command} is near"
    )


# Options that a method of ours does without, because it always does so or has no such rows.
FOR_OTHERS: Mapping[str, tuple[str, ...]] = {
    "grpo": ("sample_packing", "sequence_len", "dataset_prepared_path", "shuffle", "train_on_inputs", "excess_length_strategy"),
    "ebft": ("train_on_inputs",),
    **dict.fromkeys(("dpo", "kto", "orpo", "simpo", "cpo", "reward", "prm"), ("train_on_inputs",)),
    "pretrain": ("train_on_inputs", "dataset_prepared_path", "chat_template", "sample_packing", "excess_length_strategy"),
}


def _says_nothing(value: Written) -> bool:
    """Whether a value leaves off what its key would turn on."""
    return value.value in (None, False, "") or value.value == [] or value.value == {}


def _is_known(key: str) -> bool:
    """Whether a key is one of axolotl's that are not there, or an option of another method of ours."""
    return key in keys.MISSING or key in FUNCTIONS or any(key in table.options(method.config) for method in methods.METHODS.values())


def _refusal(missing: Mapping[str, str], wrong: list[str]) -> str:
    listed = "; ".join(f"{key} (nearest: {nearest})" for key, nearest in missing.items())
    several, other = len(missing) > 1, not OTHERS.isdisjoint(missing)
    whose, where = ("another tool's", "; treetune agent-docs from_others has its names and ours") if other else ("axolotl's", "")
    text = (
        f"{len(missing)} key{'s' * several} of {whose} that {'are' if several else 'is'} not supported: {listed}{where}" if missing else ""
    )
    return "; and ".join([*([text] if text else []), *wrong])
