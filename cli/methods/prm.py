"""`treetune prm`: a process reward model, good or bad for each step of an answer."""

from dataclasses import dataclass
from typing import Any

from treetune.cli.methods import reward
from treetune.cli.methods.method import Method
from treetune.cli.options.data import SAMPLES, PairData
from treetune.cli.options.model import AdapterOptions, ModelOptions, VocabularyOptions
from treetune.cli.options.optim import REWARD_RATES, RewardOptim
from treetune.cli.options.run import RunOptions
from treetune.cli.options.table import group


@dataclass(frozen=True)
class Prm:
    """A process reward model: good or bad for each step of an answer."""

    model: ModelOptions = group(ModelOptions)
    data: PairData = group(PairData, data=(SAMPLES["prm"],))
    vocabulary: VocabularyOptions = group(VocabularyOptions)
    adapter: AdapterOptions = group(AdapterOptions)
    optim: RewardOptim = group(RewardOptim)
    run: RunOptions = group(RunOptions)


def parts(*args: Any, **options: Any) -> Any:
    """The method put together for one model. Imports torch, which no option needs."""
    from treetune.cli import judging

    return judging.prm(*args, **options)


METHOD = Method(
    "prm", "train a reward model of steps", Prm, REWARD_RATES, "steps", parts, ("accuracy",), "steps", head=True, unused=reward.unused
)
