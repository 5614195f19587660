"""Options of the rows that a command reads. Importing this imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import Fixed, Suppress

from treetune.core.config.marks import (
    FUNCTION_PATH,
    HELD_OUT_FILES,
    NAMED_VALUES,
    PREPARED_ROWS,
    ROW_FILES,
    ROW_SETS,
    ROWS_AND_ORDER,
    ROWS_READ,
    SHOWN,
    STEP_ROWS,
    TEMPLATE,
    Unused,
    Values,
    listed,
    unused_if,
    unused_unless,
)
from treetune.core.config.ranges import COUNT, ROWS, SMALL, TOKENS
from treetune.core.data import samples


def _nothing_held_out(values: Values) -> str:
    if "val_set_size" not in values:
        return ""  # all rows of the command are evaluated
    size = 0 if values.get("streaming") and values["val_set_size"] < 1 else values["val_set_size"]
    return "" if values["val_data"] or values.get("test_datasets") or size else "nothing is held out"


def _fraction_of_stream(values: Values) -> str:
    if not values.get("streaming") or not 0 < values["val_set_size"] < 1:
        return ""
    size = values["val_set_size"]
    return f"{size} is a part of the rows, but how many a stream has is not known: give a number of rows, or val_data"


HELD_OUT, FRACTION_OF_STREAM = Unused(_nothing_held_out), Unused(_fraction_of_stream)
ENDLESS = unused_if("streaming", reason="a stream is read for max_steps")
UNKEPT = unused_if("streaming", reason="the rows of a stream are not kept")
KEPT_ROWS = listed("only says where encoded rows are kept", lasting=True)
# A list of mappings: written in a config file, never as flags.
Listed = Annotated[tuple[dict[str, Any], ...], ROW_SETS, Suppress, Fixed]
SAMPLES = {
    "sft": samples.path("gsm8k_train_sample.jsonl"),
    "dpo": samples.path("gsm8k_preference_sample.jsonl"),
    "kto": samples.path("gsm8k_binary_sample.jsonl"),
    "reward": samples.path("gsm8k_preference_sample.jsonl"),
    "prm": samples.path("gsm8k_steps_sample.jsonl"),
}


@dataclass(frozen=True)
class AnyRows:
    """What rows of every kind take."""

    datasets: Annotated[Listed, ROWS_READ] = ()
    """Data sets with options of their own."""
    data: Annotated[tuple[str, ...], ROW_FILES, ROWS_READ, unused_if("datasets", reason="datasets is given")] = (SAMPLES["sft"],)
    """Files (.jsonl, .json, .parquet, .csv) or Hugging Face data set ids."""
    format: Annotated[str, FUNCTION_PATH, ROWS_READ] = "auto"
    """Row format: chat, alpaca, completion, input_output, pretokenised, jeopardy, ...; auto goes by the columns and prints it."""
    split: Annotated[str, ROWS_READ] = "train"
    """Split of a Hugging Face data set."""
    max_rows: Annotated[int | None, COUNT, ROWS_READ, ENDLESS] = None
    """Use only the first rows of each data set."""
    sequence_len: Annotated[int, TOKENS, ROWS_AND_ORDER] = 512
    """Longest document in tokens; with packing, a micro-batch holds up to micro_batch_size * sequence_len tokens."""
    overlong: Annotated[Literal["drop", "truncate", "error"], ROWS_READ] = "drop"
    """What to do with a row longer than sequence_len."""
    sample_packing: Annotated[bool, STEP_ROWS] = True
    """Fill each micro-batch with whole documents; off: micro_batch_size documents each."""
    chat_template: Annotated[str | None, TEMPLATE, ROWS_READ] = None
    """Instead of the tokenizer's own: a built-in name (chatml, llama3, qwen3, ...), tokenizer_default_fallback_NAME, or Jinja."""
    dataset_exact_deduplication: Annotated[bool, ROWS_READ, UNKEPT] = False
    """Leave out rows that repeat an earlier row, and held-out rows that are trained on; counted."""
    dataset_prepared_path: Annotated[str | None, PREPARED_ROWS, KEPT_ROWS, UNKEPT] = None
    """Folder to keep encoded rows in; a later run with the same data, tokenizer, template and options reads them from there."""


@dataclass(frozen=True)
class RowOptions(AnyRows):
    """Data. A config file may have `datasets`, a list of mappings with `path`, `type` and the options of that format, instead of `data`."""

    overlong: Annotated[Literal["drop", "truncate", "split", "error"], ROWS_READ] = "drop"
    """What to do with a row longer than sequence_len. Raw text is always split."""
    default_system_message: Annotated[str | None, ROWS_READ] = None
    """System message of the chats that have none."""
    roles_to_train: Annotated[tuple[str, ...], ROWS_READ] = ("assistant",)
    """Roles whose turns are supervised."""
    train_on_eos: Annotated[Literal["turn", "all", "last"], ROWS_READ] = "turn"
    """Which end-of-turn tokens are supervised: of trained turns, of all turns, or of the last turn only."""
    train_on_inputs: Annotated[bool, ROWS_READ] = False
    """Supervise every token, prompts included."""


@dataclass(frozen=True)
class HeldOut:
    """What is held out of the rows, and their order."""

    test_datasets: Annotated[Listed, ROWS_READ] = ()
    """Data sets to evaluate on, with options of their own."""
    val_data: Annotated[tuple[str, ...], HELD_OUT_FILES, ROWS_READ] = ()
    """Files or data sets to evaluate on, instead of a fraction of the training rows."""
    val_set_size: Annotated[
        float,
        ROWS,
        ROWS_READ,
        unused_if("val_data", reason="val_data is given"),
        unused_if("test_datasets", reason="test_datasets is given"),
        FRACTION_OF_STREAM,
    ] = 0.1
    """Fraction of the rows (below 1) or number of rows (1 and up) held out for evaluation; 0 for none."""
    eval_batch_size: Annotated[int | None, SMALL, SHOWN, HELD_OUT] = None
    """As micro_batch_size, in evaluations, whose numbers do not depend on it; micro_batch_size if not given."""
    shuffle: Annotated[bool, STEP_ROWS] = True
    """Shuffle the rows anew every epoch."""


@dataclass(frozen=True)
class Stream:
    """Rows that are read as they are needed."""

    streaming: Annotated[bool, ROWS_AND_ORDER] = False
    """Read rows as they are needed, for data that does not fit in memory; needs max_steps, and a number of rows as val_set_size."""
    streaming_multipack_buffer_size: Annotated[int, COUNT, STEP_ROWS, unused_unless("streaming", reason="there is no --streaming")] = 10_000
    """Streaming: rows that are held at a time, and shuffled and packed together."""


@dataclass(frozen=True)
class DataOptions(Stream, HeldOut, RowOptions):
    """Data. A config file may have `datasets` (and `test_datasets` to evaluate on), lists of mappings with `path`, `type` and options."""


@dataclass(frozen=True)
class PairData(HeldOut, AnyRows):
    """Data. A config file may have `datasets` (and `test_datasets` to evaluate on), lists of mappings with `path`, `type` and options."""

    data: Annotated[tuple[str, ...], ROW_FILES, ROWS_READ, unused_if("datasets", reason="datasets is given")] = (SAMPLES["dpo"],)
    format: Annotated[str, FUNCTION_PATH, ROWS_READ] = "auto"
    """Row format: passthrough, chat_template.default, chatml.intel, llama3.ultra, ...; auto goes by the columns and prints it."""
    sequence_len: Annotated[int, TOKENS, ROWS_AND_ORDER] = 512
    """Longest prompt with one completion, in tokens; with packing, a micro-batch holds up to micro_batch_size * sequence_len tokens."""


@dataclass(frozen=True)
class PromptRows:
    """Prompts. Every column but theirs goes to the rewards. A config file may have `datasets`, a list with options for each data set."""

    datasets: Annotated[Listed, ROWS_READ] = ()
    """Data sets with options of their own: path, split, limit, field_prompt, type, name."""
    data: Annotated[tuple[str, ...], ROW_FILES, ROWS_READ, unused_if("datasets", reason="datasets is given")] = (SAMPLES["sft"],)
    """Files (.jsonl, .json, .parquet, .csv) or Hugging Face data set ids."""
    split: Annotated[str, ROWS_READ] = "train"
    """Split of a Hugging Face data set."""
    max_rows: Annotated[int | None, COUNT, ROWS_READ] = None
    """Use only the first rows of each data set."""
    field_prompt: Annotated[str, ROWS_READ] = "auto"
    """Column of the prompt: text to continue, or messages; auto takes prompt, else messages, whose last answer becomes the column
    answer, else question, as a chat."""
    prompt_transform: Annotated[str | None, FUNCTION_PATH, ROWS_READ] = None
    """module.function or file.py:function that makes rows with a prompt of others: transform(cfg) gives fn(example), as in docs/data.md."""
    default_system_message: Annotated[str | None, ROWS_READ] = None
    """System message of the conversations that have none."""
    max_prompt_len: Annotated[int, TOKENS, ROWS_READ] = 512
    """Longer prompts are dropped, in tokens."""
    chat_template: Annotated[str | None, TEMPLATE, ROWS_READ] = None
    """Instead of the tokenizer's own: a built-in name (chatml, llama3, qwen3, ...), tokenizer_default_fallback_NAME, or Jinja."""
    chat_template_kwargs: Annotated[tuple[str, ...], NAMED_VALUES, ROWS_READ] = ()
    """NAME=VALUE for the chat template, such as enable_thinking=false; in a file also a mapping."""


@dataclass(frozen=True)
class PromptData(PromptRows):
    """Prompts. Every column but theirs goes to the rewards. A config file may have `datasets`, a list with options for each data set."""

    val_data: Annotated[tuple[str, ...], HELD_OUT_FILES, ROWS_READ] = ()
    """Files or data sets of prompts to evaluate on, instead of a fraction of the training prompts."""
    val_set_size: Annotated[float, ROWS, ROWS_READ, unused_if("val_data", reason="val_data is given")] = 0.0
    """Fraction of the prompts (below 1) or number of prompts (1 and up) held out for evaluation; 0 for none."""


def conflicts(data: Any, max_steps: int | None) -> None:
    """Raise ValueError for a stream without an end."""
    if getattr(data, "streaming", False) and max_steps is None:
        raise ValueError("streaming needs max_steps: how many rows a stream has is not known before its end")
