"""`treetune dpo`: preference learning on pairs, held to a reference."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from treetune.cli.methods.method import Method, Parts, Setting
from treetune.cli.options import reference
from treetune.cli.options.data import PairData
from treetune.cli.options.doors import door
from treetune.cli.options.hub import HubOptions
from treetune.cli.options.model import AdapterOptions, ModelOptions, VocabularyOptions
from treetune.cli.options.optim import PREFERENCE_RATES, PreferenceOptim
from treetune.cli.options.reference import ReferenceOptions
from treetune.cli.options.run import RunOptions
from treetune.cli.options.trackers import TrackerOptions
from treetune.core import import_path
from treetune.core.config.marks import OBJECTIVE, Unused, Values, unused_unless
from treetune.core.config.ranges import ANY, BELOW_HALF, NOT_NEGATIVE, PART, POSITIVE
from treetune.core.config.table import group
from treetune.losses import presets

if TYPE_CHECKING:
    from treetune.losses.preference_objective import PairLoss
    from treetune.models.policy import Policy

ALIASES = {
    "sigmoid": "dpo", "exo_pair": "exo", "nca_pair": "nca", "sigmoid_norm": "dpo_norm", "js_divergence": "js", "alpha_divergence": "alpha",
}  # fmt: skip
LOSS_NAMES = (*presets.PAIR_LOSSES, "sft", "sigmoid", "exo_pair", "nca_pair", "sigmoid_norm")
LOSS = door(LOSS_NAMES, "pair loss", "pairs", "beta", "label_smoothing", "score", "tau")


def names(losses: Iterable[str]) -> list[str]:
    """Our names of losses, whatever tool their names come from."""
    return [ALIASES.get(name, name) for name in losses]


def _taken(losses: list[str], parameter: str) -> bool:
    """Whether one of the losses has a parameter."""
    rows = [presets.PAIR_LOSSES.get(name) for name in losses]
    own = [name for name in losses if import_path.is_path(name)]
    return any(row is not None and parameter in row.takes for row in rows) or any(import_path.takes(name, parameter) for name in own)


def _unsmoothed(values: Values) -> str:
    losses = names(values["loss"])
    if not _taken(losses, "label_smoothing"):
        return f"{', '.join(losses)} takes no label smoothing; cdpo, robust, exo and aot do"
    undefined = "exo" in losses and values["dpo_label_smoothing"] == 0
    return "exo is not defined without; give it a number above 0, or leave it at its own 0.001" if undefined else ""


def _unless_taken(parameter: str, reason: str) -> Unused:
    """An option that only losses with this parameter look at."""

    def unused(values: Values) -> str:
        losses = names(values["loss"])
        return "" if _taken(losses, parameter) else reason.format(", ".join(losses))

    return Unused(unused)


SCORED = _unless_taken("score", "{} is defined for reverse_kl only")
MIXED = _unless_taken("tau", "the loss is {}")
PAIRWISE = Unused(lambda values: "the loss is sft alone" if names(values["loss"]) == ["sft"] else "")


@dataclass(frozen=True)
class DpoLoss:
    """Loss."""

    loss: Annotated[tuple[Annotated[str, LOSS], ...], OBJECTIVE] = ("dpo",)
    """Loss of a pair: dpo, ipo, hinge, robust, ...; several are summed. sft is the chosen side's mean negative log-likelihood.
    Or a function of your own. aot and aot_unpaired rank the pairs of a micro-batch, so they alone depend on micro_batch_size."""
    loss_weights: Annotated[tuple[float, ...], POSITIVE._replace(words="numbers above 0"), OBJECTIVE] = ()
    """A weight for each loss; 1 each if not given."""
    rl_beta: Annotated[float, POSITIVE, OBJECTIVE, PAIRWISE] = 0.1
    """How strongly the policy is held to the reference."""
    dpo_label_smoothing: Annotated[float, BELOW_HALF, OBJECTIVE, Unused(_unsmoothed)] = 0.0
    """Share of labels taken to be wrong (cdpo, robust, exo, aot)."""
    f_divergence: Annotated[
        Literal["reverse_kl", "forward_kl", "js", "alpha", "js_divergence", "alpha_divergence"],
        OBJECTIVE,
        SCORED,
    ] = "reverse_kl"
    """Divergence from the reference that log-ratios stand for."""
    f_alpha_divergence_coef: Annotated[
        float, ANY, OBJECTIVE, unused_unless("f_divergence", "alpha", "alpha_divergence", reason="the divergence is {f_divergence}")
    ] = 0.5
    """Order of the alpha divergence."""
    discopop_tau: Annotated[float, POSITIVE, OBJECTIVE, MIXED] = 0.05
    """Temperature of discopop's mixture."""
    ld_alpha: Annotated[float | None, PART, OBJECTIVE, PAIRWISE] = None
    """LD-DPO: weight, from 0 to 1, of the tokens of the longer side beyond the shorter one's length."""
    dpo_use_weighting: Annotated[bool, OBJECTIVE, PAIRWISE] = False
    """WPO: weigh pairs by how likely the policy is to write them."""
    rpo_alpha: Annotated[float | None, POSITIVE, OBJECTIVE] = None
    """Add the chosen side's mean negative log-likelihood times this."""
    router_aux_loss_coef: Annotated[float, NOT_NEGATIVE, OBJECTIVE] = 0.0
    """Experts: weight of the load-balancing loss, within each side of a pair, averaged over layers and scored tokens; 0.001 is usual."""
    router_z_loss_coef: Annotated[float, NOT_NEGATIVE, OBJECTIVE] = 0.0
    """Experts: weight of the routers' squared log-normaliser, averaged likewise; 0.001 is usual."""


@dataclass(frozen=True)
class Dpo:
    """Preference learning on pairs, held to a reference: DPO and its family (--loss ipo, hinge, robust, ...)."""

    model: ModelOptions = group(ModelOptions)
    data: PairData = group(PairData)
    vocabulary: VocabularyOptions = group(VocabularyOptions)
    adapter: AdapterOptions = group(AdapterOptions)
    loss: DpoLoss = group(DpoLoss)
    reference: ReferenceOptions = group(ReferenceOptions)
    optim: PreferenceOptim = group(PreferenceOptim)
    run: RunOptions = group(RunOptions)
    tracking: TrackerOptions = group(TrackerOptions)
    hub: HubOptions = group(HubOptions)


def conflicts(config: Dpo) -> None:
    """Raise ValueError for losses that cannot be summed, and for a reference that cannot follow."""
    options, losses = config.loss, names(config.loss.loss)
    if not losses or len(set(losses)) < len(losses):
        raise ValueError(f"--loss {' '.join(options.loss)}: give one or more losses, each once")
    if options.dpo_use_weighting and (aot := [name for name in losses if name.startswith("aot")]):
        raise ValueError(f"dpo_use_weighting does not go with {aot[0]}, whose terms are not of single pairs")
    if options.loss_weights and len(options.loss_weights) != len(losses):
        raise ValueError(f"loss_weights has {len(options.loss_weights)} numbers for {len(losses)} losses; give one for each")
    if wrong := [weight for weight in options.loss_weights if not 0 < weight < float("inf")]:
        raise ValueError(f"loss_weights must be numbers above 0, got {wrong[0]}; leave out a loss that is not wanted")
    reference.conflicts(config.reference, adapter=config.adapter.adapter, sharding=config.run.sharding)


def parts(config: Dpo, policy: "Policy", setting: Setting) -> Parts:
    """Pairs held to a reference."""
    from treetune.cli.methods.parts import hold, load_reference, pairwise, router_coefs
    from treetune.losses import preference_objective

    options, precompute = config.loss, config.reference.precompute_ref_logps
    held = load_reference(config, policy, setting, precompute=precompute)
    weights = dict(zip(names(options.loss), options.loss_weights or (1.0,) * len(options.loss), strict=True))
    nll_coef = weights.pop("sft", 0.0) + (options.rpo_alpha or 0.0)
    terms = preference_objective.Options(nll_coef=nll_coef, ld_alpha=options.ld_alpha, weighting=options.dpo_use_weighting)
    rewards = preference_objective.implicit_rewards(options.rl_beta)
    loss, routers = pair_loss(options, weights), router_coefs(options)
    return hold(pairwise(config.optim.remat, held.policy, loss, rewards, terms, routers=routers), held, precompute=precompute)


def pair_loss(options: DpoLoss, weights: dict[str, float]) -> "PairLoss | None":
    """The loss of a pair: the sum of those in `weights`; None for none."""
    from treetune.core import registry
    from treetune.losses import preference_objective

    smoothing = {"label_smoothing": options.dpo_label_smoothing} if options.dpo_label_smoothing else {}  # 0: the loss's own
    divergence = ALIASES.get(options.f_divergence, options.f_divergence)
    score = registry.bind(presets.PAIR_SCORES[divergence], alpha=options.f_alpha_divergence_coef)
    return preference_objective.weighted_loss(weights, beta=options.rl_beta, score=score, tau=options.discopop_tau, **smoothing)


METHOD = Method(
    "dpo",
    "learn from pairs: DPO, IPO and the rest of the family",
    Dpo,
    PREFERENCE_RATES,
    "pairs",
    parts,
    ("rewards/margins", "rewards/accuracies"),
    conflicts=conflicts,
)
