"""`treetune kto`: preference learning on completions that are each marked good or bad, held to a reference."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from treetune.cli.methods.method import Method
from treetune.cli.options import reference
from treetune.cli.options.data import SAMPLES, PairData
from treetune.cli.options.doors import door
from treetune.cli.options.model import AdapterOptions, ModelOptions, VocabularyOptions
from treetune.cli.options.optim import PREFERENCE_RATES, PreferenceOptim
from treetune.cli.options.reference import ReferenceOptions
from treetune.cli.options.run import RunOptions
from treetune.core import import_path
from treetune.core.config.doors import unused_unless_taken
from treetune.core.config.marks import OBJECTIVE, Unused
from treetune.core.config.ranges import POSITIVE
from treetune.core.config.table import group
from treetune.losses import presets

if TYPE_CHECKING:
    from treetune.cli.methods.parts import Parts, Setting
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


def conflicts(config: Kto) -> None:
    """Raise BadInput for a reference that cannot follow."""
    reference.conflicts(config.reference, adapter=config.adapter.adapter, sharding=config.run.sharding)


def variant(config: Kto) -> dict[str, Any]:
    """Only a loss with a baseline needs completions of other prompts."""
    loss = config.loss.loss
    row = presets.KTO_LOSSES.get(loss)
    baseline = row.scalar == "baseline" if row else import_path.takes(loss, "baseline")
    return {} if baseline else {"data": "judged"}


def parts(config: Kto, policy: "Policy", setting: "Setting") -> "Parts":
    """KTO, its variant without a baseline, and BCO."""
    # Torch takes a second to import, and `treetune --help` and config errors need none of it.
    from treetune.cli.methods import kto_state, referenced
    from treetune.cli.methods.parts import EVERY, Parts, in_sequence, logprobs
    from treetune.core import registry
    from treetune.losses import kto_objective

    options = config.loss
    reference = referenced.build(config, policy, setting, precompute=config.reference.precompute_ref_logps)
    train, evaluation = logprobs(reference.policy, checkpointing=config.optim.gradient_checkpointing)
    weights = {"desirable_weight": options.kto_desirable_weight, "undesirable_weight": options.kto_undesirable_weight}
    row = registry.choose(presets.KTO_LOSSES, options.loss)
    loss = kto_objective.completion_loss(row, beta=options.rl_beta, **weights)
    make = partial(kto_objective.objective, loss=loss, beta=options.rl_beta)
    state = kto_state.build(row.scalar, reference.logp, evaluation, setting)
    return Parts(
        reference.policy,
        make(train),
        make(evaluation, want=EVERY),
        state.collates,
        reference.extra | state.extra,
        state.prepare,
        in_sequence([function for function in (reference.after_step, state.after_step) if function is not None]),
        reference.precompute,
    )


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
