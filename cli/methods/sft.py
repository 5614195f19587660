"""`treetune sft`: supervised fine-tuning."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from treetune.cli.methods.method import Method, Parts, Setting
from treetune.cli.options.data import DataOptions
from treetune.cli.options.hub import HubOptions
from treetune.cli.options.model import AdapterOptions, ModelOptions, VocabularyOptions
from treetune.cli.options.optim import RATES, OptimOptions
from treetune.cli.options.run import RunOptions
from treetune.cli.options.token_loss import LossOptions
from treetune.cli.options.trackers import TrackerOptions
from treetune.core.config.table import group

if TYPE_CHECKING:
    from treetune.models.policy import Policy


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
    tracking: TrackerOptions = group(TrackerOptions)
    hub: HubOptions = group(HubOptions)


def parts(config: Sft, policy: "Policy", setting: Setting) -> Parts:
    """The likelihood of supervised tokens, or the loss that the options name."""
    from treetune.cli.methods.parts import supervised

    return supervised(policy, config.loss, remat=config.optim.remat)


METHOD = Method("sft", "fine-tune on chats, instructions or text", Sft, RATES, "text", parts, unit="supervised tokens", perplexity=True)
