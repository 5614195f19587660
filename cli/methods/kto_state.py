"""What KTO and BCO add to a step: a baseline over the whole step, or the running mean of the rewards of the steps before.

B completions, N scored tokens.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treetune.cli.methods.parts import AfterStep, Collate, Prepare, Setting
from treetune.core import shard
from treetune.core.data import pack, trees
from treetune.core.state import Batch, Logprob, TrainState
from treetune.losses import kto, limits, reduce
from treetune.models import reference
from treetune.models.reference import RefLogp


class KtoState(NamedTuple):
    """The streams of a micro-batch, the state beside the weights, and what a step does with them."""

    collates: tuple[Collate, ...]
    extra: dict[str, Any]
    prepare: Prepare
    after_step: AfterStep | None


def build(scalar: str | None, ref_logp: RefLogp, logprob: Logprob, setting: Setting) -> KtoState:
    """The state of a loss that takes `scalar`: "baseline" (KTO), "delta" (BCO), or none."""
    own, foreign = (partial(_collate_branch, branch=branch) for branch in (1, 2))
    if scalar == "baseline":
        # The baseline needs completions of other prompts; only their log-ratio is read, so they are in a stream of their own.
        return KtoState((own, foreign), {}, partial(_with_baseline, ref_logp, logprob, setting.ranks.mesh), None)
    if scalar is None:
        return KtoState((own,), {}, reference.preparer(ref_logp), None)
    zero = torch.zeros((), dtype=torch.float64, device=setting.device)
    extra = {"bco": {"mean": zero, "count": zero.long()}}
    return KtoState((own,), extra, partial(_with_mean, ref_logp), _update_mean)


def _collate_branch(documents: list[Any], *, branch: int, **options: Any) -> dict[str, Tensor]:
    """The stream of documents with one of their two completions only."""
    return pack.collate_trees([trees.single_branch(document, branch) for document in documents], **options)


def _with_baseline(ref_logp: RefLogp, logprob: Logprob, mesh: Any, state: TrainState, micro_batches: list[Any]) -> list[Any]:
    batches = [(reference.with_logp(ref_logp, state, batch, plan), plan) for (batch, plan), _ in micro_batches]
    ratios = [_log_ratios(ref_logp, logprob, state, *foreign) for _, foreign in micro_batches]
    baseline = _baseline(torch.cat(ratios), mesh)
    return [(batch | {"baseline": baseline}, plan) for batch, plan in batches]


def _log_ratios(ref_logp: RefLogp, logprob: Logprob, state: TrainState, batch: Batch, plan: Any) -> Tensor:
    """log p - log p_ref of completions of other prompts, summed over each: [B]."""
    quiet = {key: value for key, value in reference.with_logp(ref_logp, state, batch, plan).items() if key != "seed"}
    logp = logprob(state.params, state.frozen, quiet, plan).logp
    return reduce.per_sequence(limits.minus(logp, quiet["ref_logp"]), quiet["seq"], quiet["seq_lens"])


def _baseline(ratios: Tensor, mesh: Any) -> Tensor:
    """max(0, mean of the log-ratios of all micro-batches and ranks)."""
    total, count = shard.all_sum([ratios.double().sum(), ratios.new_tensor(len(ratios), dtype=torch.float64)], mesh)
    return kto.baseline((total / count.clamp(min=1)).reshape(1), total.new_zeros(1)).float()


def _with_mean(ref_logp: RefLogp, state: TrainState, micro_batches: list[Any]) -> list[Any]:
    """The running mean is of the steps before, so that no split of a step into micro-batches changes it."""
    mean = {"delta": state.extra["bco"]["mean"]}
    return [(reference.with_logp(ref_logp, state, batch, plan) | mean, plan) for batch, plan in micro_batches]


def _update_mean(state: TrainState, metrics: dict[str, Tensor], step: int) -> TrainState:
    """The running mean with the rewards of the step that ends."""
    running = kto.merge(kto.Running(**state.extra["bco"]), metrics["rewards/mean"], metrics["rows"])
    return state._replace(extra=state.extra | {"bco": running._asdict()})
