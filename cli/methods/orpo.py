"""`treetune orpo`: fine-tuning on the chosen side of pairs with an odds-ratio term; no reference."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from treetune.cli.methods.method import Method, Parts, Setting
from treetune.cli.options.data import PairData
from treetune.cli.options.hub import HubOptions
from treetune.cli.options.model import AdapterOptions, ModelOptions, VocabularyOptions
from treetune.cli.options.optim import PREFERENCE_RATES, PreferenceOptim
from treetune.cli.options.run import RunOptions
from treetune.cli.options.trackers import TrackerOptions
from treetune.core.config.marks import OBJECTIVE
from treetune.core.config.ranges import NOT_NEGATIVE
from treetune.core.config.table import group

if TYPE_CHECKING:
    from treetune.models.policy import Policy


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
    tracking: TrackerOptions = group(TrackerOptions)
    hub: HubOptions = group(HubOptions)


def parts(config: Orpo, policy: "Policy", setting: Setting) -> Parts:
    """The likelihood of the chosen side, and the odds ratio of the two."""
    from treetune.cli.methods.parts import pairwise
    from treetune.losses import preference_objective
    from treetune.losses import reference_free as losses

    options = config.loss
    terms = preference_objective.Options(nll_coef=1.0, prompts=options.orpo_nll_scope == "full")
    rewards = preference_objective.mean_rewards(options.orpo_alpha)
    loss = partial(losses.orpo, beta=options.orpo_alpha)
    return pairwise(config.optim.remat, policy, loss, rewards, terms, losses.odds_metrics)


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
