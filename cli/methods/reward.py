"""`treetune reward`: a reward model, which scores whole answers, learned from pairs."""

from dataclasses import dataclass
from typing import Annotated, Any

from treetune.cli.methods.method import Method
from treetune.cli.options.data import PairData
from treetune.cli.options.marks import OBJECTIVE
from treetune.cli.options.model import AdapterOptions, ModelOptions, VocabularyOptions
from treetune.cli.options.optim import REWARD_RATES, RewardOptim
from treetune.cli.options.ranges import NOT_NEGATIVE
from treetune.cli.options.run import RunOptions
from treetune.cli.options.table import group


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


def unused(config: Any) -> dict[str, str]:
    """A head of scores takes the place of the answers."""
    return dict.fromkeys(("sample_prompt", "sample_tokens"), "a reward model writes no answers")


def parts(*args: Any, **options: Any) -> Any:
    """The method put together for one model. Imports torch, which no option needs."""
    from treetune.cli import judging

    return judging.reward(*args, **options)


METHOD = Method(
    "reward", "train a reward model on pairs", Reward, REWARD_RATES, "ranked", parts, ("accuracy", "margin"), head=True, unused=unused
)
