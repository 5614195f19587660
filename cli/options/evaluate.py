"""Options of `treetune eval`. Importing this imports no torch.

Text under the class is the command's help, text under a field the option's.
"""

from dataclasses import dataclass
from typing import Annotated

from treetune.cli.options.answers import AnswerOptions, unanswered
from treetune.cli.options.data import RowOptions
from treetune.cli.options.model import AdapterPath, ModelOptions
from treetune.core.config.marks import NEW_FILE, Unused
from treetune.core.config.ranges import SMALL
from treetune.core.config.table import group
from treetune.core.data import samples


@dataclass(frozen=True)
class Eval:
    """Loss, perplexity and accuracy of a model, with or without an adapter, on a data set; also metrics and rewards of its answers."""

    model: ModelOptions = group(ModelOptions)
    adapter: AdapterPath = group(AdapterPath)
    data: RowOptions = group(RowOptions, data=(samples.path("gsm8k_test_sample.jsonl"),))
    answers: AnswerOptions = group(AnswerOptions)
    micro_batch_size: Annotated[int, SMALL] = 2
    """Documents (or, packed, sequence_len's worth of tokens) in one forward pass."""
    output: Annotated[str | None, NEW_FILE, Unused(unanswered)] = None
    """Write all answers to this JSONL file; must not exist."""
