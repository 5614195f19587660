"""The objective of reinforcement learning from its options: what `--loss` stands for, the reference, corrections, the entropy bonus."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treetune.cli import method, reference, setup
from treetune.cli.options import import_path
from treetune.cli.options.policy_loss import PolicyLoss, clip_bounds
from treetune.cli.options.reference import ReferenceOptions
from treetune.cli.rl_checks import off_policy
from treetune.core import registry, shard
from treetune.core.data import kinds, pack
from treetune.core.state import TrainState
from treetune.losses import advantage, correction, policy, policy_gradient, policy_gradient_with_sft, presets
from treetune.models import Model, logprobs_beside

MEANS = {
    "token": "mean over all tokens of a step", "sequence": "mean over completions of their token means",
    "constant": "mean over completions of their token sums, by max_completion_length", "sum": "mean over completions of their token sums",
}  # fmt: skip


def choices(options: PolicyLoss) -> presets.PolicyPreset:
    """What the loss stands for, with what the user chose instead."""
    chosen = {"advantage": options.advantage, "ratio": options.importance_sampling_level, "aggregate": options.aggregate}
    row = import_path.row(presets.POLICY_LOSSES, options.loss)
    return row._replace(**{name: value for name, value in chosen.items() if value is not None})


def describe(options: PolicyLoss) -> str:
    """The method in a line: nothing that a name stands for stays hidden."""
    made, (low, high) = choices(options), clip_bounds(options)
    clip = f" clipped to [1 - {low:g}, 1 + {high:g}]" if made.term == "ppo_clip" else ""
    kl = (
        f", {options.beta:g} x {options.kl_estimator} divergence{' times the ratio' * options.use_bias_correction_kl}"
        if options.beta
        else ""
    )
    return f"{options.loss}: {made.term} on {made.ratio} ratios{clip}, {MEANS[made.aggregate]}, advantage {made.advantage}{kl}"


def advantages(options: PolicyLoss, weights: list[float]) -> Callable[[Tensor], Tensor]:
    """Rewards [P, G, K] -> advantages [P, G]."""
    entry, w = import_path.row(presets.ADVANTAGES, choices(options).advantage), torch.tensor(weights, dtype=torch.float64)
    fn = registry.resolve(entry.function)
    if entry.per_reward:
        return lambda rewards: fn(rewards, w)
    return lambda rewards: fn(advantage.combined(rewards, w))


def batch_wide(options: PolicyLoss) -> bool:
    """Whether an advantage depends on other prompts of the generation."""
    return import_path.row(presets.ADVANTAGES, choices(options).advantage).across_prompts


def surrogate(options: PolicyLoss, length: int) -> policy_gradient.Surrogate:
    """The policy loss; length: tokens of a completion at most."""
    low, high = clip_bounds(options)
    knobs = {"delta": options.delta, "tau_pos": options.sapo_tau_pos, "tau_neg": options.sapo_tau_neg}
    return policy_gradient.surrogate(choices(options), length=length, epsilon=low, epsilon_high=high, **knobs)


def skippable(options: PolicyLoss) -> bool:
    """Whether a completion of advantage 0 trains nothing at all, and no threshold counts its tokens."""
    bonus = options.entropy_coef or options.use_adaptive_entropy
    return not options.beta and not bonus and options.top_entropy_quantile == 1


def _terms(config: Any) -> dict[str, Any]:
    """Options of losses.policy_gradient.objective besides its policy loss."""
    loss, how = config.loss, config.correction
    correct = None
    if how.vllm_importance_sampling_correction and off_policy(config):
        cuts = {"low": how.vllm_importance_sampling_min, "high": how.vllm_importance_sampling_cap}
        correct = registry.bind(presets.CORRECTIONS[how.vllm_importance_sampling_mode], **cuts)
    estimator = registry.bind(presets.DIVERGENCES[loss.kl_estimator]) if loss.beta else None
    return {
        "kl": policy_gradient.Divergence(estimator, loss.beta, loss.use_bias_correction_kl),
        "correction": correct,
        "opsm_threshold": how.off_policy_mask_threshold,
        "entropy_coef": 0.0 if loss.use_adaptive_entropy else loss.entropy_coef,
    }


def scored_apart(config: Any) -> bool:
    """Whether the trainer's log-probs must be taken when completions are new: later steps, other samplers and replays need them."""
    pipe = config.pipeline
    return off_policy(config) or pipe.steps_per_generation * pipe.num_iterations > 1


class Signal(NamedTuple):
    """parts: the method as any other. logprob: log-probs of the policy at the sampling temperature, without noise."""

    parts: method.Parts
    logprob: Callable


def build(
    config: Any, model: Model, used: setup.Trees, *, on: torch.device, mesh: Any = None, say: Callable = print, ce_coef: float = 0.0
) -> Signal:
    """The policy's objective, its reference and its state; with ce_coef, documents hold true replies that train beside the others."""
    loss, heat = config.loss, config.rollout.temperature
    remat = "full" if config.optim.gradient_checkpointing else None
    found = _reference(config, model, used, on, say)
    quiet = setup.logprob(model, found.trees.lora, temperature=heat)
    train = partial(setup.logprob, model, found.trees.lora, remat=remat, temperature=heat)
    make = partial(policy_gradient.objective, loss=surrogate(loss, config.rollout.max_completion_length), **_terms(config))
    objective = (
        policy_gradient_with_sft.objective(train(run=logprobs_beside), make, coef=ce_coef, name="ebft/ce_loss")
        if ce_coef
        else make(train())
    )
    extra, between = found.extra, []
    if config.reference.sync_ref_model:
        between.append(reference.syncer(config.reference))
    if loss.use_adaptive_entropy:
        start = torch.tensor([loss.entropy_coef, torch.inf], dtype=torch.float64, device=on)  # the first step applies none
        extra, between = extra | {"entropy": {"coef": start[0], "last": start[1]}}, [*between, partial(_adapt, loss)]
    parts = method.Parts(
        found.trees,
        objective,
        objective,
        (_with_truth if ce_coef else pack.collate_trees,),
        extra,
        partial(_prepare, loss, found.logp, quiet, mesh),
        partial(method.in_turn, between) if between else None,
    )
    return Signal(parts, quiet)


def _with_truth(docs: list, **options: Any) -> dict:
    """The stream of documents of which some have true completions."""
    return policy_gradient_with_sft.aside(pack.collate_trees(docs, **options))


def _reference(config: Any, model: Model, used: setup.Trees, on: torch.device, say: Callable) -> reference.Reference:
    """Without beta nothing is held to a reference."""
    if not config.loss.beta:
        return reference.Reference(lambda *_: None, used, {})
    own = config.reference
    options = ReferenceOptions(own.ref_model, False, own.sync_ref_model, own.ref_model_sync_steps, own.ref_model_mixup_alpha)
    return reference.build(options, model, used, config, on=on, say=say, temperature=config.rollout.temperature)


def _prepare(loss: PolicyLoss, ref_logp: reference.Logp, logprob: Callable, mesh: Any, state: TrainState, micro_batches: list) -> list:
    """What is global to a step or constant in it: the reference, the tokens of high entropy, the bonus's weight."""
    extra = {}
    if loss.use_adaptive_entropy:
        extra["entropy_coef"] = policy.applied(policy.Adaptive(**state.extra["entropy"]), target=loss.entropy_target).float()
    out = []
    for batch, plan in micro_batches:
        batch = batch | extra
        out.append((batch | ({"ref_logp": ref_logp(state, batch, plan)} if loss.beta else {}), plan))
    return _entropic(loss.top_entropy_quantile, logprob, mesh, state, out) if loss.top_entropy_quantile < 1 else out


def _entropic(quantile: float, logprob: Callable, mesh: Any, state: TrainState, micro_batches: list) -> list:
    """Micro-batches that know which of their tokens are among those of the highest entropy of the whole step, on all ranks."""
    quiet = [{key: value for key, value in batch.items() if key != "seed"} for batch, _ in micro_batches]
    pairs = zip(quiet, micro_batches, strict=True)
    found = [logprob(state.params, state.frozen, batch, plan, want=("entropy",)).entropy for batch, (_, plan) in pairs]
    least = correction.entropy_threshold(shard.all_rows(torch.cat(found), mesh), quantile=quantile)
    kept = [correction.entropy_mask(entropy, least) for entropy in found]
    return [(batch | {"entropy_keep": keep}, plan) for keep, (batch, plan) in zip(kept, micro_batches, strict=True)]


def _adapt(options: PolicyLoss, state: TrainState, metrics: dict, step: int) -> TrainState:
    """The bonus's weight after a step of this mean entropy."""
    moved = policy.update(
        policy.Adaptive(**state.extra["entropy"]), metrics["entropy"],
        target=options.entropy_target, delta=options.entropy_coef_delta, low=0.0, high=options.entropy_coef_max,
    )  # fmt: skip
    return state._replace(extra=state.extra | {"entropy": moved._asdict()})


METHOD = method.Method(kinds.KINDS["text"], build, (2e-5, 1e-6), ("reward", "kl", "completions/mean_length"), "completions")
