"""`treetune sft`: supervised fine-tuning."""

from dataclasses import dataclass
from typing import Annotated, Any

from treetune.cli.methods.method import Method
from treetune.cli.options.data import DataOptions
from treetune.cli.options.import_path import door
from treetune.cli.options.marks import OBJECTIVE, unused_unless
from treetune.cli.options.model import AdapterOptions, ModelOptions, VocabularyOptions
from treetune.cli.options.optim import RATES, OptimOptions
from treetune.cli.options.ranges import BELOW_ONE, NOT_NEGATIVE
from treetune.cli.options.run import RunOptions
from treetune.cli.options.table import group

TOKEN_LOSS = door(("nll", "dft", "eaft"), "token loss", "logp", "entropy", "lse", "mean_logit", "logsq", "top1", "topk_entropy")


@dataclass(frozen=True)
class LossOptions:
    """Loss."""

    loss: Annotated[str, TOKEN_LOSS, OBJECTIVE] = "nll"
    """Token loss: likelihood; dft weighs tokens by their probability, eaft by the entropy of the top 20; or a function of your own."""
    label_smoothing: Annotated[float, BELOW_ONE, OBJECTIVE, unused_unless("loss", "nll", reason="the loss is {loss}")] = 0.0
    """Share of the target spread evenly over the vocabulary (nll only)."""
    z_loss_coef: Annotated[float, NOT_NEGATIVE, OBJECTIVE] = 0.0
    """Weight of the squared log-normaliser; 1e-4 is usual."""
    neftune_noise_alpha: Annotated[float, NOT_NEGATIVE, OBJECTIVE] = 0.0
    """Noise on the embeddings while training; 5 is usual, 0 is off."""


@dataclass(frozen=True)
class Sft:
    """Supervised fine-tuning on chats, instructions or text."""

    model: ModelOptions = group(ModelOptions)
    data: DataOptions = group(DataOptions)
    vocabulary: VocabularyOptions = group(VocabularyOptions)
    adapter: AdapterOptions = group(AdapterOptions)
    loss: LossOptions = group(LossOptions)
    optim: OptimOptions = group(OptimOptions)
    run: RunOptions = group(RunOptions)


def parts(*args: Any, **options: Any) -> Any:
    """The method put together for one model. Imports torch, which no option needs."""
    from treetune.cli import method

    return method.supervised(*args, **options)


METHOD = Method("sft", "fine-tune on chats, instructions or text", Sft, RATES, "text", parts, unit="supervised tokens", perplexity=True)
