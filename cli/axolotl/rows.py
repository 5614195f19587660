"""Entries of `datasets` in axolotl's files as ours. Imports no torch."""

from typing import Any

from treetune.cli.axolotl.values import File, Unsupported, Values, write
from treetune.core.data import yamlvalues
from treetune.core.data.yamltext import Written

RENAMED = {"shards_idx": "shard_index", "conversation": "chat_template"}
NEEDLESS = ("trust_remote_code", "preprocess_shards", "pretrain_multipack_attn", "num_proc")


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
    fields = {RENAMED.get(name, name): value for name, value in fields.items() if name not in NEEDLESS}
    if "streaming" in fields and not fields["streaming"].value:
        del fields["streaming"]
    shards, index = file.value("dataset_shard_num"), file.value("dataset_shard_idx")
    if shards is not None and "shards" not in fields:
        fields |= {"shards": write(shards), "shard_index": write(index or 0)}
    return Written(fields)


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
