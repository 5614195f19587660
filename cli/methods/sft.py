"""`treetune sft`: supervised fine-tuning."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Protocol

from treetune.cli.methods.method import Method
from treetune.cli.options.data import DataOptions
from treetune.cli.options.doors import door
from treetune.cli.options.model import AdapterOptions, ModelOptions, VocabularyOptions
from treetune.cli.options.optim import RATES, OptimOptions
from treetune.cli.options.run import RunOptions
from treetune.core.config.marks import OBJECTIVE, unused_unless
from treetune.core.config.ranges import BELOW_ONE, NOT_NEGATIVE
from treetune.core.config.table import group
from treetune.losses import presets

if TYPE_CHECKING:
    from treetune.cli.methods.parts import Parts, Setting
    from treetune.core.state import Logprob, Objective
    from treetune.models.policy import Policy


NAMES = tuple(name for name in presets.TOKEN_LOSSES if name != "smoothed")  # the option label_smoothing asks for that one
TOKEN_LOSS = door(NAMES, "token loss", "logp", "entropy", "lse", "mean_logit", "logsq", "top1", "topk_entropy")


@dataclass(frozen=True)
class LossOptions:
    """Loss."""

    loss: Annotated[str, TOKEN_LOSS, OBJECTIVE] = "nll"
    """Token loss: likelihood; dft weighs tokens by their probability, eaft by the entropy of the top 20; or a function of your own."""
    label_smoothing: Annotated[float, BELOW_ONE, OBJECTIVE, unused_unless("loss", "nll", reason="the loss is {loss}")] = 0.0
    """Share of the target probability spread evenly over the vocabulary (nll only)."""
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


class SupervisedConfig(Protocol):
    """The options of a command that trains on supervised tokens."""

    loss: LossOptions
    optim: OptimOptions


def parts(config: SupervisedConfig, policy: "Policy", setting: "Setting") -> "Parts":
    """The likelihood of supervised tokens, or the loss that the options name."""
    # Torch takes a second to import, and `treetune --help` and config errors need none of it.
    from treetune.cli.methods.parts import Parts, logprobs

    checkpointing, noise = config.optim.gradient_checkpointing, config.loss.neftune_noise_alpha
    train, evaluation = logprobs(policy, checkpointing=checkpointing, neftune=noise)
    return Parts(policy, objective(train, config.loss), objective(evaluation, LossOptions()))


def objective(logprob: "Logprob", options: LossOptions) -> "Objective":
    """The objective of supervised tokens that the options name."""
    from treetune.core import registry
    from treetune.losses import sft_objective

    name = "smoothed" if options.loss == "nll" and options.label_smoothing else options.loss
    row = registry.choose(presets.TOKEN_LOSSES, name)
    token_loss, outputs = sft_objective.token_loss(row, z_loss_coef=options.z_loss_coef, label_smoothing=options.label_smoothing)
    return sft_objective.objective(logprob, token_loss, want=tuple(dict.fromkeys(("top1", *outputs))))


METHOD = Method("sft", "fine-tune on chats, instructions or text", Sft, RATES, "text", parts, unit="supervised tokens", perplexity=True)
