"""`treetune orpo`: fine-tuning on the chosen side of pairs with an odds-ratio term; no reference."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from treetune.cli.methods.method import Method
from treetune.cli.options.data import PairData
from treetune.cli.options.marks import OBJECTIVE
from treetune.cli.options.model import AdapterOptions, ModelOptions, VocabularyOptions
from treetune.cli.options.optim import PREFERENCE_RATES, PreferenceOptim
from treetune.cli.options.ranges import NOT_NEGATIVE
from treetune.cli.options.run import RunOptions
from treetune.cli.options.table import group


@dataclass(frozen=True)
class OrpoLoss:
    """Loss."""

    orpo_alpha: Annotated[float, NOT_NEGATIVE, OBJECTIVE] = 0.1
    """Weight of the odds-ratio term beside the negative log-likelihood."""
    orpo_nll_scope: Annotated[Literal["full", "completion"], OBJECTIVE] = "full"
    """Tokens of the likelihood term: prompt and chosen completion, as in the paper, or the completion alone."""


@dataclass(frozen=True)
class Orpo:
    """Fine-tuning on the chosen side of pairs with an odds-ratio term against the rejected one; no reference."""

    model: ModelOptions = group(ModelOptions)
    data: PairData = group(PairData)
    vocabulary: VocabularyOptions = group(VocabularyOptions)
    adapter: AdapterOptions = group(AdapterOptions)
    loss: OrpoLoss = group(OrpoLoss)
    optim: PreferenceOptim = group(PreferenceOptim)
    run: RunOptions = group(RunOptions)


def parts(*args: Any, **options: Any) -> Any:
    """The method put together for one model. Imports torch, which no option needs."""
    from treetune.cli import preferring

    return preferring.orpo(*args, **options)


METHOD = Method(
    "orpo",
    "fine-tune and learn from pairs at once",
    Orpo,
    PREFERENCE_RATES,
    "pairs",
    parts,
    ("nll_loss", "rewards/accuracies"),
    "tokens and pairs",
)
