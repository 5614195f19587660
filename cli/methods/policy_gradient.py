"""The policy-gradient objective of a run from its options: what `--loss` stands for, reference, corrections, entropy bonus.

P prompts, G completions of each, K rewards, N scored tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from treetune.cli.methods import referenced
from treetune.cli.methods.parts import Parts, RolloutParts, Setting, in_sequence
from treetune.cli.options import pipeline
from treetune.cli.options.policy_loss import PolicyLoss, clip_bounds
from treetune.cli.options.protocols import OnlineConfig
from treetune.core import registry, shard
from treetune.core.config import table
from treetune.core.data import pack
from treetune.core.run.ranks import Ranks
from treetune.core.state import Logprob, LogprobBeside, Objective, TokenStats, TrainState
from treetune.losses import advantage, correction, policy_gradient, policy_gradient_with_sft, presets
from treetune.losses import policy as terms
from treetune.losses.presets import PolicyPreset
from treetune.models import logprobs_beside, policy
from treetune.models.policy import Policy
from treetune.models.reference import RefLogp

MEANS = {
    "token": "mean over all tokens of a step", "sequence": "mean over completions of their token means",
    "constant": "mean over completions of their token sums, by max_completion_length", "sum": "mean over completions of their token sums",
}  # fmt: skip


def preset(options: PolicyLoss) -> PolicyPreset:
    """What the loss stands for, with what the user chose instead."""
    chosen = {"advantage": options.advantage, "ratio": options.importance_sampling_level, "aggregate": options.aggregate}
    row = registry.choose(presets.POLICY_LOSSES, options.loss)
    return row._replace(**{name: value for name, value in chosen.items() if value is not None})


def describe(options: PolicyLoss) -> str:
    """The loss in a line, with all that its name stands for."""
    choice, (low, high) = preset(options), clip_bounds(options)
    clip = f" clipped to [1 - {low:g}, 1 + {high:g}]" if choice.term == "ppo_clip" else ""
    kl = ""
    if options.beta:
        kl = f", {options.beta:g} x {options.kl_estimator} divergence{' times the ratio' * options.use_bias_correction_kl}"
    return f"{options.loss}: {choice.term} on {choice.ratio} ratios{clip}, {MEANS[choice.aggregate]}, advantage {choice.advantage}{kl}"


def advantages(options: PolicyLoss, weights: list[float], ranks: Ranks) -> Callable[[np.ndarray], np.ndarray]:
    """Rewards [P, G, K] of this rank -> advantages [P, G]; an estimator over the whole generation sees the rewards of all ranks."""
    entry = registry.choose(presets.ADVANTAGES, preset(options).advantage)
    estimate = _estimator(entry, torch.tensor(weights, dtype=torch.float64))

    def compute(rewards: np.ndarray) -> np.ndarray:
        parts: list[Any] = [rewards]
        mine = 0
        if ranks.world > 1 and entry.across_prompts:
            parts, mine = [None] * ranks.world, ranks.rank
            torch.distributed.all_gather_object(parts, rewards)
        values = estimate(torch.from_numpy(np.concatenate(parts))).numpy()
        start = sum(len(part) for part in parts[:mine])
        return values[start : start + len(rewards)]

    return compute


def _estimator(entry: presets.AdvantageEntry, weights: Tensor) -> Callable[[Tensor], Tensor]:
    """Rewards [P, G, K] -> advantages [P, G]."""
    function = registry.resolve(entry.function)
    if entry.per_reward:
        return lambda rewards: function(rewards, weights)
    return lambda rewards: function(advantage.combined(rewards, weights))


def skippable(options: PolicyLoss) -> bool:
    """Whether a completion of advantage 0 trains nothing at all, and no threshold counts its tokens."""
    bonus = options.entropy_coef or options.use_adaptive_entropy
    return not options.beta and not bonus and options.top_entropy_quantile == 1


def _surrogate(options: PolicyLoss, length: int) -> policy_gradient.Surrogate:
    """The policy loss; length: tokens of a completion at most."""
    low, high = clip_bounds(options)
    knobs = {"delta": options.delta, "tau_pos": options.sapo_tau_pos, "tau_neg": options.sapo_tau_neg}
    return policy_gradient.surrogate(preset(options), length=length, epsilon=low, epsilon_high=high, **knobs)


def _objective_options(config: OnlineConfig) -> dict[str, Any]:
    """Options of losses.policy_gradient.objective besides its policy loss."""
    loss, options = config.loss, config.correction
    weight = None
    if options.vllm_importance_sampling_correction and off_policy(config):
        cuts = {"low": options.vllm_importance_sampling_min, "high": options.vllm_importance_sampling_cap}
        weight = registry.bind(presets.CORRECTIONS[options.vllm_importance_sampling_mode], **cuts)
    estimator = registry.bind(presets.DIVERGENCES[loss.kl_estimator]) if loss.beta else None
    return {
        "kl": policy_gradient.Divergence(estimator, loss.beta, loss.use_bias_correction_kl),
        "correction": weight,
        "opsm_threshold": options.off_policy_mask_threshold,
        "entropy_coef": 0.0 if loss.use_adaptive_entropy else loss.entropy_coef,
    }


def off_policy(config: OnlineConfig) -> bool:
    """Whether completions may come from another policy than the one that trains on them."""
    return pipeline.off_policy(table.flatten(config))


def scored_apart(config: OnlineConfig) -> bool:
    """Whether the trainer's log-probs must be taken when completions are new: later steps, other samplers and replays need them."""
    options = config.pipeline
    return off_policy(config) or options.steps_per_generation * options.num_iterations > 1


def build(config: Any, start: Policy, setting: Setting, rollouts: Callable[[Logprob], RolloutParts], *, ce_coef: float = 0.0) -> Parts:
    """The objective of the policy, its reference and its state; with ce_coef, documents hold true replies that train beside the others.

    rollouts(logprob) -> how completions are sampled and scored; logprob is without noise, at the sampling temperature.
    """
    loss, temperature = config.loss, config.rollout.temperature
    reference = referenced.build(config, start, setting, temperature=temperature) if loss.beta else None
    held = start if reference is None else reference.policy
    remat = "full" if config.optim.gradient_checkpointing else None
    quiet = policy.logprob(held, temperature=temperature)
    objective = _objective(config, partial(policy.logprob, held, remat=remat, temperature=temperature), ce_coef)
    extra: dict[str, Any] = {} if reference is None else reference.extra
    after_step = [] if reference is None or reference.after_step is None else [reference.after_step]
    if loss.use_adaptive_entropy:
        coef = torch.tensor([loss.entropy_coef, torch.inf], dtype=torch.float64, device=setting.device)  # the first step applies none
        extra, after_step = extra | {"entropy": {"coef": coef[0], "last": coef[1]}}, [*after_step, partial(_adapt, loss)]
    return Parts(
        held,
        objective,
        objective,
        (_collate_with_truth if ce_coef else pack.collate_trees,),
        extra,
        partial(_prepare, loss, None if reference is None else reference.logp, quiet, setting.ranks.mesh),
        in_sequence(after_step),
        rollouts=rollouts(quiet),
    )


def _objective(config: OnlineConfig, train: Callable[..., Logprob], ce_coef: float) -> Objective:
    surrogate = _surrogate(config.loss, config.rollout.max_completion_length)
    make = partial(policy_gradient.objective, loss=surrogate, **_objective_options(config))
    if ce_coef:
        return policy_gradient_with_sft.objective(cast(LogprobBeside, train(run=logprobs_beside)), make, coef=ce_coef, name="ebft/ce_loss")
    return make(train())


def _collate_with_truth(documents: list[Any], **options: Any) -> dict[str, Tensor]:
    """The stream of documents of which some have true completions."""
    return policy_gradient_with_sft.aside(pack.collate_trees(documents, **options))


def _prepare(
    loss: PolicyLoss, ref_logp: RefLogp | None, logprob: Logprob, mesh: Any, state: TrainState, micro_batches: list[Any]
) -> list[Any]:
    """What is global to a step or constant in it: the reference, the tokens of high entropy, the weight of the bonus."""
    extra = {}
    if loss.use_adaptive_entropy:
        extra["entropy_coef"] = terms.applied(terms.Adaptive(**state.extra["entropy"]), target=loss.entropy_target).float()
    prepared = []
    for batch, plan in micro_batches:
        batch = batch | extra
        prepared.append((batch | ({} if ref_logp is None else {"ref_logp": ref_logp(state, batch, plan)}), plan))
    if loss.top_entropy_quantile == 1:
        return prepared
    return _keep_high_entropy(loss.top_entropy_quantile, logprob, mesh, state, prepared)


def _keep_high_entropy(quantile: float, logprob: Logprob, mesh: Any, state: TrainState, micro_batches: list[Any]) -> list[Any]:
    """Micro-batches that know which of their tokens are among those of the highest entropy of the whole step, on all ranks."""
    quiet = [{key: value for key, value in batch.items() if key != "seed"} for batch, _ in micro_batches]
    pairs = zip(quiet, micro_batches, strict=True)
    entropies = [_entropy(logprob(state.params, state.frozen, batch, plan, want=("entropy",))) for batch, (_, plan) in pairs]
    least = correction.entropy_threshold(shard.all_rows(torch.cat(entropies), mesh), quantile=quantile)
    masks = [correction.entropy_mask(entropy, least) for entropy in entropies]
    return [(batch | {"entropy_keep": mask}, plan) for mask, (batch, plan) in zip(masks, micro_batches, strict=True)]


def _entropy(stats: TokenStats) -> Tensor:
    assert stats.entropy is not None
    return stats.entropy


def _adapt(options: PolicyLoss, state: TrainState, metrics: dict[str, Tensor], step: int) -> TrainState:
    """The weight of the entropy bonus after a step of this mean entropy."""
    adaptive = terms.update(
        terms.Adaptive(**state.extra["entropy"]), metrics["entropy"],
        target=options.entropy_target, delta=options.entropy_coef_delta, low=0.0, high=options.entropy_coef_max,
    )  # fmt: skip
    return state._replace(extra=state.extra | {"entropy": adaptive._asdict()})
