"""The rows that options name, as plain settings for core.data."""

from typing import Any

from treetune.cli.options.data import held_out, streams
from treetune.core import option_pairs
from treetune.core.data.corpus import FOR_ROWS
from treetune.core.data.dataset import RowSettings


def documents(options: Any) -> RowSettings:
    """The settings of rows that become documents."""
    streaming = streams(options)
    return RowSettings(
        data=options.data,
        datasets=getattr(options, "datasets", ()),
        val_data=getattr(options, "val_data", ()),
        test_datasets=getattr(options, "test_datasets", ()),
        val_set_size=held_out(options) if streaming else getattr(options, "val_set_size", 0),
        split=options.split,
        max_rows=options.max_rows,
        format=getattr(options, "format", "auto"),
        sequence_len=options.sequence_len,
        overlong=getattr(options, "overlong", None),
        drop_duplicates=getattr(options, "dataset_exact_deduplication", False),
        prepared_folder=getattr(options, "dataset_prepared_path", None),
        encoding={name: _value(options, name) for name in FOR_ROWS if hasattr(options, name)},
        text_column=getattr(options, "text_column", None),
        stream_buffer=options.streaming_multipack_buffer_size if streaming else None,
    )


def prompts(options: Any) -> RowSettings:
    """The settings of prompts of reinforcement learning."""
    encoding = {"system": options.default_system_message or "", "max_prompt_len": options.max_prompt_len}
    return RowSettings(
        data=options.data,
        datasets=options.datasets,
        val_data=getattr(options, "val_data", ()),
        val_set_size=held_out(options) if hasattr(options, "val_set_size") else 0,
        split=options.split,
        max_rows=options.max_rows,
        format=options.prompt_transform or "auto",
        prompt_column=options.field_prompt,
        encoding=encoding | {name: _value(options, name) for name in ("chat_template", "chat_template_kwargs")},
        transform_config=options,
    )


def truths(options: Any) -> RowSettings:
    """The settings of prompts with a true reply."""
    return RowSettings(
        data=options.data,
        datasets=options.datasets,
        val_data=options.val_data,
        test_datasets=options.test_datasets,
        val_set_size=held_out(options),
        split=options.split,
        max_rows=options.max_rows,
        format=options.format,
        sequence_len=options.sequence_len,
        drop_duplicates=options.dataset_exact_deduplication,
        encoding={name: _value(options, name) for name in ("chat_template", "chat_template_kwargs")},
        transform_config=options,
    )


def _value(options: Any, name: str) -> Any:
    value = getattr(options, name)
    return option_pairs.named_values(value, "chat-template-kwargs") if name == "chat_template_kwargs" else value
