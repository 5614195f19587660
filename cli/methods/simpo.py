"""`treetune simpo`: preference learning on pairs by mean log-prob per token, with a margin; no reference."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

from treetune.cli.methods.method import Method, Parts, Setting
from treetune.cli.options.data import PairData
from treetune.cli.options.hub import HubOptions
from treetune.cli.options.model import AdapterOptions, ModelOptions, VocabularyOptions
from treetune.cli.options.optim import PREFERENCE_RATES, PreferenceOptim
from treetune.cli.options.run import RunOptions
from treetune.cli.options.trackers import TrackerOptions
from treetune.core.config.marks import OBJECTIVE
from treetune.core.config.ranges import NOT_NEGATIVE, POSITIVE
from treetune.core.config.table import group

if TYPE_CHECKING:
    from treetune.models.policy import Policy


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
    tracking: TrackerOptions = group(TrackerOptions)
    hub: HubOptions = group(HubOptions)


def parts(config: Simpo, policy: "Policy", setting: Setting) -> Parts:
    """Mean log-probs with a margin; AlphaPO where simpo_alpha is not 0."""
    from treetune.cli.methods.parts import pairwise
    from treetune.losses import preference_objective
    from treetune.losses import reference_free as losses

    options = config.loss
    loss = partial(losses.simpo, beta=options.rl_beta, gamma=options.simpo_gamma)
    if options.simpo_alpha:
        loss = partial(losses.alphapo, beta=options.rl_beta, gamma=options.simpo_gamma, alpha=options.simpo_alpha)
    terms = preference_objective.Options(nll_coef=options.cpo_alpha)
    return pairwise(config.optim.remat, policy, loss, preference_objective.mean_rewards(options.rl_beta), terms)


METHOD = Method(
    "simpo", "learn from pairs without a reference", Simpo, PREFERENCE_RATES, "pairs", parts, ("rewards/margins", "rewards/accuracies")
)
