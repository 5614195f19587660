"""The rows that options name, as plain settings for core.data."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from treetune.core import option_pairs
from treetune.core.config import table
from treetune.core.data.corpus import FOR_ROWS
from treetune.core.data.dataset import RowSettings

TEMPLATE = ("chat_template", "chat_template_kwargs")
# Settings of documents whose options have longer names.
NAMES = {"drop_duplicates": "dataset_exact_deduplication", "prepared_folder": "dataset_prepared_path"}


def names(entry: Any) -> list[str]:
    """What a data set is called by: its path, or the files that it names instead, one, several or by split; of a list those of each."""
    if isinstance(entry, dict):
        return names(next((entry[key] for key in ("path", "data_files") if key in entry), list(entry.values())))
    return [name for one in entry for name in names(one)] if isinstance(entry, list | tuple) else [str(entry)]


def documents(options: Any) -> RowSettings:
    """The settings of rows that become documents."""
    others = {name: getattr(options, option) for name, option in NAMES.items() if hasattr(options, option)}
    if getattr(options, "streaming", False):
        others["stream_buffer"] = options.streaming_multipack_buffer_size
    return table.record(RowSettings, options, encoding=_encoding(options, FOR_ROWS), **others)


def prompts(options: Any) -> RowSettings:
    """The settings of prompts of reinforcement learning."""
    encoding = {"system": options.default_system_message or "", "max_prompt_len": options.max_prompt_len}
    return table.record(
        RowSettings,
        options,
        format=options.prompt_transform or "auto",
        prompt_column=options.field_prompt,
        encoding=encoding | _encoding(options, TEMPLATE),
        transform_config=options,
    )


def truths(options: Any) -> RowSettings:
    """The settings of prompts with a true reply."""
    return dataclasses.replace(documents(options), transform_config=options)


def _encoding(options: Any, names: Sequence[str]) -> dict[str, Any]:
    values = {name: getattr(options, name) for name in names if hasattr(options, name)}
    if (pairs := values.get("chat_template_kwargs")) is not None:
        values["chat_template_kwargs"] = option_pairs.named_values(pairs, "chat-template-kwargs")
    return values
