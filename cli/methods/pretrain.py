"""`treetune pretrain`: every token of raw text is supervised, from the weights of a model or from random ones."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from treetune.cli.methods.method import Method, Parts, Setting
from treetune.cli.options.data import ENDLESS, FRACTION_OF_STREAM, HELD_OUT, Listed, Stream
from treetune.cli.options.hub import HubOptions
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
    SHOWN,
    STEP_ROWS,
    unused_if,
)
from treetune.core.config.ranges import COUNT, ROWS, SMALL, TOKENS
from treetune.core.config.table import group
from treetune.core.data import samples

if TYPE_CHECKING:
    from treetune.models.policy import Policy


@dataclass(frozen=True)
class PretrainModel(ModelOptions):
    """Model."""

    from_config: Annotated[str | None, MODEL_SHAPE, MODEL_WEIGHTS] = None
    """A config.json (or a folder with one): start from random weights of that shape. The tokenizer comes from model."""


@dataclass(frozen=True)
class PretrainData(Stream):
    """Data. A config file may have `datasets`, a list of mappings with `path`, `text_column` and options, instead of `data`."""

    datasets: Annotated[Listed, ROWS_READ] = ()
    """Data sets with options of their own."""
    data: Annotated[tuple[str, ...], ROW_FILES, ROWS_READ] = (samples.path("text.jsonl"),)
    """Files (.jsonl, .json, .parquet, .csv) or Hugging Face data set ids with a text column."""
    split: Annotated[str, ROWS_READ] = "train"
    """Split of a Hugging Face data set."""
    text_column: Annotated[str, ROWS_READ] = "text"
    """Column that holds the text, where an entry of `datasets` does not name its own."""
    val_data: Annotated[tuple[str, ...], HELD_OUT_FILES, ROWS_READ] = ()
    """Files or data sets to evaluate on, instead of a fraction of the training rows."""
    val_set_size: Annotated[float, ROWS, ROWS_READ, unused_if("val_data", reason="val_data is given"), FRACTION_OF_STREAM] = 0.1
    """Fraction of the rows (below 1) or number of rows (1 and up) held out for evaluation; 0 for none. Of a stream only a number of rows,
    the first of each data set; without one nothing is held out."""
    eval_batch_size: Annotated[int | None, SMALL, SHOWN, HELD_OUT] = None
    """As micro_batch_size, in evaluations, whose numbers do not depend on it; micro_batch_size if not given."""
    max_rows: Annotated[int | None, COUNT, ROWS_READ, ENDLESS] = None
    """Use only the first rows of each data set."""
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
    hub: HubOptions = group(HubOptions)


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
)
