"""`treetune kto`: preference learning on completions that are each marked good or bad, held to a reference."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from treetune.cli.methods.method import Method, Parts, Setting
from treetune.cli.options import reference
from treetune.cli.options.data import SAMPLES, PairData
from treetune.cli.options.doors import door
from treetune.cli.options.hub import HubOptions
from treetune.cli.options.model import AdapterOptions, ModelOptions, VocabularyOptions
from treetune.cli.options.optim import PREFERENCE_RATES, PreferenceOptim
from treetune.cli.options.reference import ReferenceOptions
from treetune.cli.options.run import RunOptions
from treetune.cli.options.trackers import TrackerOptions
from treetune.core import import_path
from treetune.core.config.doors import unused_unless_taken
from treetune.core.config.marks import OBJECTIVE, Unused
from treetune.core.config.ranges import POSITIVE
from treetune.core.config.table import group
from treetune.losses import presets

if TYPE_CHECKING:
    from treetune.models.policy import Policy

WEIGHTS = ("beta", "desirable_weight", "undesirable_weight")
COMPLETION_LOSS = door(presets.KTO_LOSSES, "completion loss", "logp", "ref_logp", "desirable", "baseline", "delta", *WEIGHTS)


def _weight(parameter: str) -> Unused:
    return unused_unless_taken("loss", presets.KTO_LOSSES, parameter, reason="{loss} has no weights by class")


@dataclass(frozen=True)
class KtoLoss:
    """Loss."""

    loss: Annotated[str, COMPLETION_LOSS, OBJECTIVE] = "kto"
    """Loss of a judged completion: kto; apo_zero_unpaired, which has no baseline; bco, whose baseline is the mean reward so far.
    Or a function of your own."""
    rl_beta: Annotated[float, POSITIVE, OBJECTIVE] = 0.1
    """How strongly the policy is held to the reference."""
    kto_desirable_weight: Annotated[float, POSITIVE, OBJECTIVE, _weight("desirable_weight")] = 1.0
    """Weight of good completions; this times their number over the same for bad ones is best between 1 and 4/3."""
    kto_undesirable_weight: Annotated[float, POSITIVE, OBJECTIVE, _weight("undesirable_weight")] = 1.0
    """Weight of bad completions."""


@dataclass(frozen=True)
class Kto:
    """Preference learning on completions that are each marked good or bad, held to a reference."""

    model: ModelOptions = group(ModelOptions)
    data: PairData = group(PairData, data=(SAMPLES["kto"],))
    vocabulary: VocabularyOptions = group(VocabularyOptions)
    adapter: AdapterOptions = group(AdapterOptions)
    loss: KtoLoss = group(KtoLoss)
    reference: ReferenceOptions = group(ReferenceOptions)
    optim: PreferenceOptim = group(PreferenceOptim)
    run: RunOptions = group(RunOptions)
    tracking: TrackerOptions = group(TrackerOptions)
    hub: HubOptions = group(HubOptions)


def conflicts(config: Kto) -> None:
    """Raise ValueError for a reference that cannot follow."""
    reference.conflicts(config.reference, adapter=config.adapter.adapter, sharding=config.run.sharding)


def variant(config: Kto) -> dict[str, Any]:
    """Only a loss with a baseline needs completions of other prompts."""
    loss = config.loss.loss
    row = presets.KTO_LOSSES.get(loss)
    baseline = row.scalar == "baseline" if row else import_path.takes(loss, "baseline")
    return {} if baseline else {"data": "judged"}


def parts(config: Kto, policy: "Policy", setting: Setting) -> Parts:
    """KTO, its variant without a baseline, and BCO."""
    from treetune.cli.methods.parts import EVERY, hold, load_reference
    from treetune.core import registry, shard
    from treetune.core.data import pack
    from treetune.losses import kto_objective
    from treetune.models import policy as policies
    from treetune.models import reference as references

    options, precompute = config.loss, config.reference.precompute_ref_logps
    held = load_reference(config, policy, setting, precompute=precompute)
    train, evaluation = policies.logprob(held.policy, remat=config.optim.remat), policies.logprob(held.policy)
    weights = {"desirable_weight": options.kto_desirable_weight, "undesirable_weight": options.kto_undesirable_weight}
    row = registry.choose(presets.KTO_LOSSES, options.loss)
    loss = kto_objective.completion_loss(row, beta=options.rl_beta, **weights)
    make = partial(kto_objective.objective, loss=loss, beta=options.rl_beta)
    own, foreign = (partial(pack.collate_branch, branch=branch) for branch in (1, 2))
    built = Parts(held.policy, make(train), make(evaluation, want=EVERY), (own,))
    if row.scalar == "baseline":
        # The baseline needs completions of other prompts; only their log-ratio is read, so they are in a stream of their own.
        referenced, total = partial(references.with_logp, held.logp), partial(shard.all_sum, device_mesh=setting.ranks.mesh)
        prepare = kto_objective.baseline_preparer(evaluation, referenced, total)
        built = built._replace(collates=(own, foreign), prepare=prepare)
    if row.scalar == "delta":
        extra, prepare = kto_objective.zero_mean(setting.device), kto_objective.prepare_mean
        built = built._replace(extra=extra, prepare=prepare, after_step=kto_objective.update_mean)
    return hold(built, held, precompute=precompute)


METHOD = Method(
    "kto",
    "learn from completions marked good or bad",
    Kto,
    PREFERENCE_RATES,
    "unpaired",
    parts,
    ("rewards/margins", "rewards/accuracies"),
    "completions",
    conflicts=conflicts,
    variant=variant,
)
