"""`treetune pretrain`: every token of raw text is supervised, from the weights of a model or from random ones."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from treetune.cli.methods.method import Method, Parts, Setting
from treetune.cli.options.model import ModelOptions, VocabularyOptions
from treetune.cli.options.optim import RATES, OptimOptions
from treetune.cli.options.run import RunOptions
from treetune.cli.options.token_loss import LossOptions
from treetune.cli.options.trackers import TrackerOptions
from treetune.core.config.marks import (
    HELD_OUT_FILES,
    MODEL_SHAPE,
    MODEL_WEIGHTS,
    ROW_FILES,
    ROWS_AND_ORDER,
    ROWS_READ,
    STEP_ROWS,
    Unused,
    Values,
    unused_if,
    unused_unless,
)
from treetune.core.config.ranges import COUNT, ROWS, TOKENS
from treetune.core.config.table import group
from treetune.core.data import samples

if TYPE_CHECKING:
    from treetune.models.policy import Policy


def _fraction_of_stream(values: Values) -> str:
    if not values["streaming"] or not 0 < values["val_set_size"] < 1:
        return ""
    size = values["val_set_size"]
    return f"{size} is a part of the rows, but how many a stream has is not known: give a number of rows, or val_data"


@dataclass(frozen=True)
class PretrainModel(ModelOptions):
    """Model."""

    from_config: Annotated[str | None, MODEL_SHAPE, MODEL_WEIGHTS] = None
    """A config.json (or a folder with one): start from random weights of that shape. The tokenizer comes from model."""


@dataclass(frozen=True)
class PretrainData:
    """Data."""

    data: Annotated[tuple[str, ...], ROW_FILES, ROWS_READ] = (samples.path("text.jsonl"),)
    """Files (.jsonl, .json, .parquet, .csv) or Hugging Face data set ids with a text column."""
    split: Annotated[str, ROWS_READ] = "train"
    """Split of a Hugging Face data set."""
    text_column: Annotated[str, ROWS_READ] = "text"
    """Column that holds the text."""
    val_data: Annotated[tuple[str, ...], HELD_OUT_FILES, ROWS_READ] = ()
    """Files or data sets to evaluate on, instead of a fraction of the training rows."""
    val_set_size: Annotated[float, ROWS, ROWS_READ, unused_if("val_data", reason="val_data is given"), Unused(_fraction_of_stream)] = 0.1
    """Fraction of the rows (below 1) or number of rows (1 and up) held out for evaluation; 0 for none. Of a stream only a number of rows,
    the first of each data set; without one nothing is held out."""
    max_rows: Annotated[int | None, COUNT, ROWS_READ, unused_if("streaming", reason="a stream is read for max_steps")] = None
    """Use only the first rows of each data set."""
    streaming: Annotated[bool, ROWS_AND_ORDER] = False
    """Read rows as they are needed, for corpora that do not fit in memory; needs max_steps."""
    streaming_multipack_buffer_size: Annotated[int, COUNT, STEP_ROWS, unused_unless("streaming", reason="there is no --streaming")] = 10_000
    """Streaming: rows that are held at a time, and shuffled and packed together."""
    sequence_len: Annotated[int, TOKENS, ROWS_AND_ORDER] = 512
    """Texts longer than this many tokens are split; a micro-batch holds micro_batch_size * sequence_len tokens."""
    sample_packing: Annotated[bool, STEP_ROWS] = True
    """Fill each micro-batch with whole documents; off: micro_batch_size documents each."""
    shuffle: Annotated[bool, STEP_ROWS] = True
    """Shuffle the rows anew every epoch."""


@dataclass(frozen=True)
class Pretrain:
    """Pretraining, or continued pretraining, on raw text: every token is supervised."""

    model: PretrainModel = group(PretrainModel)
    data: PretrainData = group(PretrainData)
    vocabulary: VocabularyOptions = group(VocabularyOptions)
    loss: LossOptions = group(LossOptions)
    optim: OptimOptions = group(OptimOptions)
    run: RunOptions = group(RunOptions)
    tracking: TrackerOptions = group(TrackerOptions)


def conflicts(config: Pretrain) -> None:
    """Raise ValueError for a stream without an end."""
    if config.data.streaming and config.optim.max_steps is None:
        raise ValueError("streaming needs max_steps: how many rows a stream has is not known before its end")


def parts(config: Pretrain, policy: "Policy", setting: Setting) -> Parts:
    """The likelihood of every token, or the loss that the options name."""
    from treetune.cli.methods.parts import supervised

    return supervised(policy, config.loss, remat=config.optim.remat)


METHOD = Method(
    "pretrain",
    "train on raw text, from a model or from random weights",
    Pretrain,
    RATES,
    "text",
    parts,
    unit="supervised tokens",
    perplexity=True,
    conflicts=conflicts,
)
