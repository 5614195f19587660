"""`treetune cpo`: preference learning on pairs by summed log-probs beside the likelihood of the chosen side; no reference."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from treetune.cli.methods.method import Method, Parts, Setting
from treetune.cli.options.data import PairData
from treetune.cli.options.doors import door
from treetune.cli.options.hub import HubOptions
from treetune.cli.options.model import AdapterOptions, ModelOptions, VocabularyOptions
from treetune.cli.options.optim import PREFERENCE_RATES, PreferenceOptim
from treetune.cli.options.run import RunOptions
from treetune.cli.options.trackers import TrackerOptions
from treetune.core import import_path
from treetune.core.config.marks import OBJECTIVE, Unused, Values
from treetune.core.config.ranges import BELOW_HALF, NOT_NEGATIVE, POSITIVE
from treetune.core.config.table import group
from treetune.losses import presets

if TYPE_CHECKING:
    from treetune.models.policy import Policy

LOSS = door((*presets.CPO_LOSSES, "sigmoid"), "pair loss", "pairs", "beta", "label_smoothing")


def _unsmoothed(values: Values) -> str:
    loss = values["loss"]
    taken = import_path.takes(loss, "label_smoothing") if import_path.is_path(loss) else loss in ("cpo", "sigmoid")
    return "" if taken else f"the loss is {loss}"


@dataclass(frozen=True)
class CpoLoss:
    """Loss."""

    loss: Annotated[str, LOSS, OBJECTIVE] = "cpo"
    """Loss of a pair, without a reference; or a function of your own."""
    rl_beta: Annotated[float, POSITIVE, OBJECTIVE] = 0.1
    """Scale of the summed log-probs."""
    cpo_alpha: Annotated[float, NOT_NEGATIVE, OBJECTIVE] = 1.0
    """Weight of the chosen side's mean negative log-likelihood."""
    dpo_label_smoothing: Annotated[float, BELOW_HALF, OBJECTIVE, Unused(_unsmoothed)] = 0.0
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
    tracking: TrackerOptions = group(TrackerOptions)
    hub: HubOptions = group(HubOptions)


def parts(config: Cpo, policy: "Policy", setting: Setting) -> Parts:
    """Summed log-probs, and the likelihood of the chosen side."""
    from treetune.cli.methods.parts import pairwise
    from treetune.core import registry
    from treetune.losses import preference_objective

    options = config.loss
    smoothing = {"label_smoothing": options.dpo_label_smoothing} if options.dpo_label_smoothing else {}
    name = "cpo" if options.loss == "sigmoid" else options.loss
    loss = registry.bind(registry.choose(presets.CPO_LOSSES, name), beta=options.rl_beta, **smoothing)
    rewards = preference_objective.mean_rewards if options.loss == "ipo" else preference_objective.implicit_rewards
    terms = preference_objective.Options(nll_coef=options.cpo_alpha)
    return pairwise(config.optim.remat, policy, loss, rewards(options.rl_beta), terms)


METHOD = Method(
    "cpo", "learn from pairs by their likelihoods", Cpo, PREFERENCE_RATES, "pairs", parts, ("rewards/margins", "rewards/accuracies")
)
