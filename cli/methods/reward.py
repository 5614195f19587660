"""`treetune reward`: a reward model, which scores whole answers, learned from pairs."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

from treetune.cli.methods.method import Method, Parts, Setting, unanswering
from treetune.cli.options.data import PairData
from treetune.cli.options.hub import HubOptions
from treetune.cli.options.model import AdapterOptions, ModelOptions, VocabularyOptions
from treetune.cli.options.optim import REWARD_RATES, RewardOptim
from treetune.cli.options.run import RunOptions
from treetune.cli.options.trackers import TrackerOptions
from treetune.core.config.marks import OBJECTIVE
from treetune.core.config.ranges import NOT_NEGATIVE
from treetune.core.config.table import group

if TYPE_CHECKING:
    from treetune.models.policy import Policy


@dataclass(frozen=True)
class RewardLoss:
    """Loss."""

    center_rewards_coefficient: Annotated[float, NOT_NEGATIVE, OBJECTIVE] = 0.0
    """Weight of the squared sum of a pair's scores, which keeps scores around 0; 0.01 is usual."""


@dataclass(frozen=True)
class Reward:
    """A reward model: a score for whole answers, learned from pairs."""

    model: ModelOptions = group(ModelOptions)
    data: PairData = group(PairData)
    vocabulary: VocabularyOptions = group(VocabularyOptions)
    adapter: AdapterOptions = group(AdapterOptions)
    loss: RewardLoss = group(RewardLoss)
    optim: RewardOptim = group(RewardOptim)
    run: RunOptions = group(RunOptions)
    tracking: TrackerOptions = group(TrackerOptions)
    hub: HubOptions = group(HubOptions)


def parts(config: Reward, policy: "Policy", setting: Setting) -> Parts:
    """One score for a whole answer."""
    from treetune.cli.methods.parts import scored
    from treetune.losses import reward_objective

    ranked = partial(reward_objective.ranked, centre=config.loss.center_rewards_coefficient)
    return scored(config, policy, setting, classes=1, read="last", objective=ranked)


METHOD = Method(
    "reward", "train a reward model on pairs", Reward, REWARD_RATES, "ranked", parts, ("accuracy", "margin"), head=True, unused=unanswering
)
