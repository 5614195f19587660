"""`treetune cpo`: preference learning on pairs by summed log-probs beside the likelihood of the chosen side; no reference."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from treetune.cli.methods.method import Method
from treetune.cli.options.data import PairData
from treetune.cli.options.marks import OBJECTIVE, unused_if
from treetune.cli.options.model import AdapterOptions, ModelOptions, VocabularyOptions
from treetune.cli.options.optim import PREFERENCE_RATES, PreferenceOptim
from treetune.cli.options.ranges import BELOW_HALF, NOT_NEGATIVE, POSITIVE
from treetune.cli.options.run import RunOptions
from treetune.cli.options.table import group


@dataclass(frozen=True)
class CpoLoss:
    """Loss."""

    loss: Annotated[Literal["cpo", "hinge", "ipo", "sigmoid"], OBJECTIVE] = "cpo"
    """Loss of a pair, without a reference."""
    rl_beta: Annotated[float, POSITIVE, OBJECTIVE] = 0.1
    """Scale of the summed log-probs."""
    cpo_alpha: Annotated[float, NOT_NEGATIVE, OBJECTIVE] = 1.0
    """Weight of the chosen side's mean negative log-likelihood."""
    dpo_label_smoothing: Annotated[float, BELOW_HALF, OBJECTIVE, unused_if("loss", "hinge", "ipo", reason="the loss is {loss}")] = 0.0
    """Share of labels taken to be wrong (cpo only)."""


@dataclass(frozen=True)
class Cpo:
    """Preference learning on pairs by summed log-probs beside the chosen side's likelihood; no reference."""

    model: ModelOptions = group(ModelOptions)
    data: PairData = group(PairData)
    vocabulary: VocabularyOptions = group(VocabularyOptions)
    adapter: AdapterOptions = group(AdapterOptions)
    loss: CpoLoss = group(CpoLoss)
    optim: PreferenceOptim = group(PreferenceOptim)
    run: RunOptions = group(RunOptions)


def parts(*args: Any, **options: Any) -> Any:
    """The method put together for one model. Imports torch, which no option needs."""
    from treetune.cli import preferring

    return preferring.cpo(*args, **options)


METHOD = Method(
    "cpo", "learn from pairs by their likelihoods", Cpo, PREFERENCE_RATES, "pairs", parts, ("rewards/margins", "rewards/accuracies")
)
