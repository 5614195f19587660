"""Entries of `datasets` in axolotl's files as ours. Imports no torch."""

import re
from typing import Any

from treetune.cli.axolotl.file import File, Unsupported, Values, write
from treetune.cli.axolotl.values import template
from treetune.core.data import yamlvalues
from treetune.core.data.yamltext import Written

RENAMED = {"shards_idx": "shard_index", "conversation": "chat_template", "train_on_eot": "train_on_eos"}
NEEDLESS = ("trust_remote_code", "preprocess_shards", "pretrain_multipack_attn", "num_proc", "preprocess_iterable")
MISSING = ("input_transform", "input_format", "logprobs_field", "temperature", "field_human", "field_model", "max_completion_length")
FOR_ENTRIES = ("dataset_shard_num", "dataset_shard_idx", "chat_template_kwargs")  # keys of a file that go into its entries
SPEAKING = ("type", "roles_to_train")  # fields whose null says something: rows that are tokens, and the last message alone
BUILDERS = ("json", "csv", "parquet", "arrow", "text")  # `path: json` reads data_files of that kind


# Formats of texts by axolotl's names; what else begins as one of these is not there, and what does not is a module of the user's.
TEXTS = frozenset(
    "chat_template sharegpt alpaca alpaca:chat alpaca_chat alpaca_chat.load_qa alpaca_chat.load_concise alpaca_chat.load_camel_ai "
    "alpaca_w_system.load_open_orca gpteacher gpteacher:chat oasst reflection reflection_ac jeopardy explainchoice concisechoice "
    "summarizetldr context_qa context_qa.load_v2 context_qa.load_404 creative_acr.load_answer creative_acr.load_critique "
    "creative_acr.load_revise metharme pygmalion user_defined input_output completion".split()
)
OTHERS = frozenset({"alpaca_instruct", "orcamini", "llama2_chat", "messages", "sharegpt_simple", "sharegpt_jokes"})
SAME = {"alpaca:instruct": "alpaca", "chat": "chat_template", "pretrain": "completion"}


def _first(name: str) -> str:
    return name if name == "bradley_terry.llama3" else re.split(r"[.:]", name)[0]


# Formats that bring their own wording, so that no template of chats writes them; and formats that say themselves what trains.
WORDED = frozenset({_first(name) for name in TEXTS - {"chat_template", "sharegpt"}} | {
    "chatml", "llama3", "zephyr", "stepwise_supervised", "bradley_terry.llama3", "null"})  # fmt: skip
WITHOUT = {"chat_template": WORDED, "default_system_message": WORDED, "train_on_inputs": frozenset({"completion", "null"})}
READERS = ("sft", "dpo", "kto", "orpo", "simpo", "cpo", "reward", "prm")  # commands whose rows have such formats


def idle(file: File) -> dict[str, str]:
    """{key that none of the file's rows would look at, though it says something: the reason}, as far as their formats are named."""
    items = [item for name in ("datasets", "test_datasets") if isinstance(listed := file.value(name), list) for item in listed]
    if file.command not in READERS or not items or not all(isinstance(item, dict) and "type" in item for item in items):
        return {}
    kinds = {"user_defined" if isinstance(item["type"], dict) else str(item["type"] or "null") for item in items}
    words = {_first(kind) for kind in kinds}
    given = [name for name in WITHOUT if file.value(name)]
    return {name: f"rows of {', '.join(sorted(kinds))} do not take it" for name in given if words <= WITHOUT[name]}


def entries(written: Written, file: File) -> Written:
    """The list of data sets, with our names for the fields of each. Errors: Unsupported for a text in its place."""
    items = written.value if isinstance(written.value, list) else [written]
    return Written([_entry(item, file) for item in items])


def _entry(item: Written, file: File) -> Written:
    if isinstance(item.value, str):
        return Written({"path": item})
    if not isinstance(item.value, dict):
        return item
    fields = _named({name: value for name, value in item.value.items() if value.value is not None or name in SPEAKING}, file)
    if "data_files" in fields and fields.get("path", Written(None)).value in BUILDERS:
        fields.setdefault("ds_type", fields["path"])
        del fields["path"]
    if str(fields.get("type", Written(None)).value).startswith("chat_template") and "chat_template_kwargs" not in fields:
        fields |= {"chat_template_kwargs": write(shared)} if (shared := _shared(file)) else {}
    shards, index = file.value("dataset_shard_num"), file.value("dataset_shard_idx")
    if shards is not None and "shards" not in fields:
        fields |= {"shards": write(shards), "shard_index": write(index or 0)}
    return Written(fields)


def _named(fields: dict[str, Written], file: File) -> dict[str, Written]:
    """The fields of an entry under our names, with our names of formats and templates. Errors: Unsupported for what is not there."""
    if missing := [name for name in fields if name in MISSING]:
        raise Unsupported(f"entries without {', '.join(missing)}")
    if "train_on_eos" in fields and "train_on_eot" in fields and fields["train_on_eos"].value != fields["train_on_eot"].value:
        raise Unsupported("train_on_eos and train_on_eot alike")
    out = {RENAMED.get(name, name): value for name, value in fields.items() if name not in NEEDLESS}
    _thoughts(out)
    if isinstance(kind := out.get("type", Written(None)).value, str):
        out["type"] = write(_kind(kind, file.command))
    if "chat_template" in out:
        out["chat_template"] = write(template(out["chat_template"].value))
    if "streaming" in out and not out["streaming"].value:
        del out["streaming"]
    return out


def _kind(name: str, command: str) -> str:
    """The name of a format. Errors: Unsupported for one of axolotl's for texts that is not there."""
    meant = SAME.get(name, name)
    unknown = meant not in TEXTS and (not re.search(r"[.:]", meant) or _first(meant) in {_first(text) for text in TEXTS} | OTHERS)
    if command == "sft" and unknown:
        raise Unsupported(f"type: alpaca, chat_template or a mapping of field_ options, as there is no {name}")
    return meant


def _shared(file: File) -> Any:
    """The variables of the template that the file gives for all data sets; where the command has an option of them, it is that."""
    return None if "chat_template_kwargs" in file.options else file.value("chat_template_kwargs")


def _thoughts(fields: dict[str, Written]) -> None:
    """field_thinking and template_thinking_key as the column that the template's own name stands for."""
    column, name = fields.pop("field_thinking", None), fields.pop("template_thinking_key", None)
    if column is not None or name is not None:
        target = "reasoning_content" if name is None else str(name.value)
        columns = fields.get("message_property_mappings", Written({})).value
        given = columns if isinstance(columns, dict) else {}
        fields["message_property_mappings"] = Written(given | {target: column or write("reasoning_content")})


def corpus(written: Written, file: File) -> Values:
    """`pretraining_dataset` as the rows of pretrain."""
    items: list[Any] = entries(written, file).value
    listed = [{name: value for name, value in item.value.items() if name != "type"} for item in items]
    if "datasets" in file.options:
        return {"datasets": write(listed), "streaming": write(True)}
    if len(listed) != 1 or set(listed[0]) - {"path", "split", "text_column"}:
        raise Unsupported("one data set with path, split and text_column")
    one = {name: yamlvalues.plain(value) for name, value in listed[0].items()}
    out: Values = {"data": write([one.pop("path")]), "streaming": write(True)}
    return out | {name: write(value) for name, value in one.items()}
