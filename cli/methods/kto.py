"""`treetune kto`: preference learning on completions that are each marked good or bad, held to a reference."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from treetune.cli.methods.method import Method
from treetune.cli.options import reference
from treetune.cli.options.data import SAMPLES, PairData
from treetune.cli.options.marks import OBJECTIVE, unused_if
from treetune.cli.options.model import AdapterOptions, ModelOptions, VocabularyOptions
from treetune.cli.options.optim import PREFERENCE_RATES, PreferenceOptim
from treetune.cli.options.ranges import POSITIVE
from treetune.cli.options.reference import ReferenceOptions
from treetune.cli.options.run import RunOptions
from treetune.cli.options.table import group


@dataclass(frozen=True)
class KtoLoss:
    """Loss."""

    loss: Annotated[Literal["kto", "apo_zero_unpaired", "bco"], OBJECTIVE] = "kto"
    """Loss of a judged completion: kto; apo_zero_unpaired, which has no baseline; bco, whose baseline is the mean reward so far."""
    rl_beta: Annotated[float, POSITIVE, OBJECTIVE] = 0.1
    """How strongly the policy is held to the reference."""
    kto_desirable_weight: Annotated[float, POSITIVE, OBJECTIVE, unused_if("loss", "bco", reason="bco has no weights by class")] = 1.0
    """Weight of good completions; this times their number over the same for bad ones is best between 1 and 4/3."""
    kto_undesirable_weight: Annotated[float, POSITIVE, OBJECTIVE, unused_if("loss", "bco", reason="bco has no weights by class")] = 1.0
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
    """Only the baseline of kto itself needs completions of other prompts."""
    return {} if config.loss.loss == "kto" else {"data": "judged"}


def parts(*args: Any, **options: Any) -> Any:
    """The method put together for one model. Imports torch, which no option needs."""
    from treetune.cli import preferring

    return preferring.judged(*args, **options)


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
