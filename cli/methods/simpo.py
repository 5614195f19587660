"""`treetune simpo`: preference learning on pairs by mean log-prob per token, with a margin; no reference."""

from dataclasses import dataclass
from typing import Annotated, Any

from treetune.cli.methods.method import Method
from treetune.cli.options.data import PairData
from treetune.cli.options.marks import OBJECTIVE
from treetune.cli.options.model import AdapterOptions, ModelOptions, VocabularyOptions
from treetune.cli.options.optim import PREFERENCE_RATES, PreferenceOptim
from treetune.cli.options.ranges import NOT_NEGATIVE, POSITIVE
from treetune.cli.options.run import RunOptions
from treetune.cli.options.table import group


@dataclass(frozen=True)
class SimpoLoss:
    """Loss."""

    rl_beta: Annotated[float, POSITIVE, OBJECTIVE] = 2.0
    """Scale of the mean log-prob per token; the paper uses 2 to 10."""
    simpo_gamma: Annotated[float, NOT_NEGATIVE, OBJECTIVE] = 0.5
    """Margin that chosen must have over rejected, in units of the scaled reward."""
    simpo_alpha: Annotated[float, NOT_NEGATIVE, OBJECTIVE] = 0.0
    """AlphaPO: bends the reward, (1 - p^-alpha) / alpha in place of log p; 0 is SimPO."""
    cpo_alpha: Annotated[float, NOT_NEGATIVE, OBJECTIVE] = 0.0
    """Add the chosen side's mean negative log-likelihood times this."""


@dataclass(frozen=True)
class Simpo:
    """Preference learning on pairs by mean log-prob per token, with a margin; no reference."""

    model: ModelOptions = group(ModelOptions)
    data: PairData = group(PairData)
    vocabulary: VocabularyOptions = group(VocabularyOptions)
    adapter: AdapterOptions = group(AdapterOptions)
    loss: SimpoLoss = group(SimpoLoss)
    optim: PreferenceOptim = group(PreferenceOptim)
    run: RunOptions = group(RunOptions)


def parts(*args: Any, **options: Any) -> Any:
    """The method put together for one model. Imports torch, which no option needs."""
    from treetune.cli import preferring

    return preferring.simpo(*args, **options)


METHOD = Method(
    "simpo", "learn from pairs without a reference", Simpo, PREFERENCE_RATES, "pairs", parts, ("rewards/margins", "rewards/accuracies")
)
