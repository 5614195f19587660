"""Entries of `datasets` in axolotl's files as ours. Imports no torch."""

from typing import Any

from treetune.cli.axolotl.file import File, Unsupported, Values, write
from treetune.core.data import yamlvalues
from treetune.core.data.yamltext import Written

RENAMED = {"shards_idx": "shard_index", "conversation": "chat_template", "train_on_eot": "train_on_eos"}
NEEDLESS = ("trust_remote_code", "preprocess_shards", "pretrain_multipack_attn", "num_proc", "preprocess_iterable")
MISSING = ("input_transform", "input_format", "logprobs_field", "temperature", "field_human", "field_model", "max_completion_length")
FOR_ENTRIES = ("dataset_shard_num", "dataset_shard_idx", "chat_template_kwargs")  # keys of a file that go into its entries
BUILDERS = ("json", "csv", "parquet", "arrow", "text")  # `path: json` reads data_files of that kind


def entries(written: Written, file: File) -> Written:
    """The list of data sets, with our names for the fields of each. Errors: Unsupported for a text in its place."""
    items = written.value if isinstance(written.value, list) else [written]
    return Written([_entry(item, file) for item in items])


def _entry(item: Written, file: File) -> Written:
    if isinstance(item.value, str):
        return Written({"path": item})
    if not isinstance(item.value, dict):
        return item
    # null says nothing, but for the type: rows that are tokens have none
    fields = {name: value for name, value in item.value.items() if value.value is not None or name == "type"}
    if missing := [name for name in fields if name in MISSING]:
        raise Unsupported(f"entries without {', '.join(missing)}")
    if "train_on_eos" in fields and "train_on_eot" in fields and fields["train_on_eos"].value != fields["train_on_eot"].value:
        raise Unsupported("train_on_eos and train_on_eot alike")
    fields = {RENAMED.get(name, name): value for name, value in fields.items() if name not in NEEDLESS}
    _thoughts(fields)
    if "data_files" in fields and fields.get("path", Written(None)).value in BUILDERS:
        fields.setdefault("ds_type", fields["path"])
        del fields["path"]
    if str(fields.get("type", Written(None)).value).startswith("chat_template") and "chat_template_kwargs" not in fields:
        fields |= {"chat_template_kwargs": write(shared)} if (shared := _shared(file)) else {}
    if "streaming" in fields and not fields["streaming"].value:
        del fields["streaming"]
    shards, index = file.value("dataset_shard_num"), file.value("dataset_shard_idx")
    if shards is not None and "shards" not in fields:
        fields |= {"shards": write(shards), "shard_index": write(index or 0)}
    return Written(fields)


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
