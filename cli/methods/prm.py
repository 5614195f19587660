"""`treetune prm`: a process reward model, good or bad for each step of an answer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from treetune.cli.methods.method import Method, Parts, Setting, unanswering
from treetune.cli.options.data import SAMPLES, PairData
from treetune.cli.options.hub import HubOptions
from treetune.cli.options.model import AdapterOptions, ModelOptions, VocabularyOptions
from treetune.cli.options.optim import REWARD_RATES, RewardOptim
from treetune.cli.options.run import RunOptions
from treetune.cli.options.trackers import TrackerOptions
from treetune.core.config.table import group

if TYPE_CHECKING:
    from treetune.models.policy import Policy


@dataclass(frozen=True)
class Prm:
    """A process reward model: good or bad for each step of an answer."""

    model: ModelOptions = group(ModelOptions)
    data: PairData = group(PairData, data=(SAMPLES["prm"],))
    vocabulary: VocabularyOptions = group(VocabularyOptions)
    adapter: AdapterOptions = group(AdapterOptions)
    optim: RewardOptim = group(RewardOptim)
    run: RunOptions = group(RunOptions)
    tracking: TrackerOptions = group(TrackerOptions)
    hub: HubOptions = group(HubOptions)


def parts(config: Prm, policy: "Policy", setting: Setting) -> Parts:
    """Good or bad, for each step."""
    from treetune.cli.methods.parts import scored
    from treetune.losses import reward_objective

    return scored(config, policy, setting, classes=2, read="classes", objective=reward_objective.steps)


METHOD = Method(
    "prm", "train a reward model of steps", Prm, REWARD_RATES, "steps", parts, ("accuracy",), "steps", head=True, unused=unanswering
)
