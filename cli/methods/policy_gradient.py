"""The policy-gradient objective of a run from its options: what `--loss` stands for, reference, corrections, entropy bonus.

P prompts, G completions of each, K rewards, N scored tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
import torch

from treetune.cli.methods import parts
from treetune.cli.methods.method import Parts, RolloutParts, Setting
from treetune.cli.options import pipeline
from treetune.cli.options.pipeline import CorrectionOptions
from treetune.cli.options.policy_loss import PolicyLoss, RoutedPolicyLoss, clip_bounds
from treetune.core import registry, shard, step
from treetune.core.config import table
from treetune.core.data import pack
from treetune.core.state import Logprob, LogprobBeside, Objective
from treetune.losses import advantage, entropy, policy_gradient, policy_gradient_with_sft, presets
from treetune.losses.presets import PolicyPreset
from treetune.models import logprobs_beside, policy
from treetune.models.policy import Policy

MEANS = {
    "token": "mean over all tokens of a step", "sequence": "mean over completions of their token means",
    "constant": "mean over completions of their token sums, by max_completion_length", "sum": "mean over completions of their token sums",
}  # fmt: skip


def row(options: PolicyLoss) -> PolicyPreset:
    """What the loss stands for, with what the user chose instead."""
    chosen = {"advantage": options.advantage, "ratio": options.importance_sampling_level, "aggregate": options.aggregate}
    preset = registry.choose(presets.POLICY_LOSSES, options.loss)
    return preset._replace(**{name: value for name, value in chosen.items() if value is not None})


def describe(options: PolicyLoss) -> str:
    """The loss in a line, with all that its name stands for."""
    choice, (low, high) = row(options), clip_bounds(options)
    clip = f" clipped to [1 - {low:g}, 1 + {high:g}]" if choice.term == "ppo_clip" else ""
    kl = ""
    if options.beta:
        kl = f", {options.beta:g} x {options.kl_estimator} divergence{' times the ratio' * options.use_bias_correction_kl}"
    return f"{options.loss}: {choice.term} on {choice.ratio} ratios{clip}, {MEANS[choice.aggregate]}, advantage {choice.advantage}{kl}"


def advantages(options: PolicyLoss, weights: list[float]) -> Callable[[np.ndarray], np.ndarray]:
    """Rewards [P, G, K] of a generation -> advantages [P, G]."""
    estimate = advantage.estimator(registry.choose(presets.ADVANTAGES, row(options).advantage), weights)
    return lambda rewards: estimate(torch.from_numpy(rewards)).numpy()


def _objective_options(loss: PolicyLoss, options: CorrectionOptions, *, off_policy: bool) -> dict[str, Any]:
    """Options of losses.policy_gradient.objective besides its policy loss."""
    weight = None
    if options.vllm_importance_sampling_correction and off_policy:
        cuts = {"low": options.vllm_importance_sampling_min, "high": options.vllm_importance_sampling_cap}
        weight = registry.bind(presets.CORRECTIONS[options.vllm_importance_sampling_mode], **cuts)
    estimator = registry.bind(presets.DIVERGENCES[loss.kl_estimator]) if loss.beta else None
    return {
        "kl": policy_gradient.Divergence(estimator, loss.beta, loss.use_bias_correction_kl),
        "correction": weight,
        "opsm_threshold": options.off_policy_mask_threshold,
        "entropy_coef": 0.0 if loss.use_adaptive_entropy else loss.entropy_coef,
    }


def build(config: Any, start: Policy, setting: Setting, sampled: Callable[[Logprob], RolloutParts], *, ce_coef: float = 0.0) -> Parts:
    """The objective of the policy, its reference and its state; with ce_coef, documents hold true replies that train beside the others.

    sampled(logprob) -> how completions are sampled and scored; logprob is without noise, at the sampling temperature.
    """
    loss, temperature = config.loss, config.rollout.temperature
    reference = parts.load_reference(config, start, setting, temperature=temperature) if loss.beta else None
    held = start if reference is None else reference.policy
    quiet = policy.logprob(held, temperature=temperature)
    objective = _objective(config, held, partial(policy.logprob, held, remat=config.optim.remat, temperature=temperature), ce_coef)
    collate = policy_gradient_with_sft.aside_collate(pack.collate_trees) if ce_coef else pack.collate_trees
    built = Parts(held, objective, objective, (collate,), rollouts=sampled(quiet))
    if loss.use_adaptive_entropy:
        bonus = entropy.Bonus(loss.entropy_coef, loss.entropy_target, loss.entropy_coef_delta, loss.entropy_coef_max)
        extra, prepare = entropy.start(bonus, setting.device), entropy.bonus_preparer(bonus)
        built = built._replace(extra=extra, prepare=prepare, after_step=entropy.adapter(bonus))
    if loss.top_entropy_quantile < 1:
        all_rows = partial(shard.all_rows, device_mesh=setting.ranks.mesh)
        mask = entropy.mask_preparer(loss.top_entropy_quantile, quiet, all_rows)
        built = built._replace(prepare=step.prepare_in_sequence(built.prepare, mask))
    return built if reference is None else parts.hold(built, reference)


def _objective(config: Any, start: Policy, train: Callable[..., Logprob], ce_coef: float) -> Objective:
    options, (low, high) = config.loss, clip_bounds(config.loss)
    knobs = {"delta": options.delta, "tau_pos": options.sapo_tau_pos, "tau_neg": options.sapo_tau_neg}
    length = config.rollout.max_completion_length
    surrogate = policy_gradient.surrogate(row(options), length=length, epsilon=low, epsilon_high=high, **knobs)
    terms = _objective_options(options, config.correction, off_policy=pipeline.off_policy(table.flatten(config)))
    make = partial(policy_gradient.objective, loss=surrogate, **terms)
    if ce_coef:
        return policy_gradient_with_sft.objective(cast(LogprobBeside, train(run=logprobs_beside)), make, coef=ce_coef, name="ebft/ce_loss")
    return parts.routed(start, train, make, parts.router_coefs(options) if isinstance(options, RoutedPolicyLoss) else parts.NO_ROUTERS)
