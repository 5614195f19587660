"""Structured mode of `treetune ebft`: the run of `treetune grpo`, whose rewards are features that sampled replies share with true ones."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from treetune.cli.methods import policy_gradient
from treetune.cli.methods.method import Parts, RolloutParts, Setting
from treetune.cli.options import online
from treetune.cli.options.ebft import Ebft
from treetune.core.data import ebft_rows, pack
from treetune.core.data.prompts import Prompt
from treetune.core.rollout import feature_rewards, turns
from treetune.core.rollout.rewards import Rewards
from treetune.core.run import evaluation
from treetune.core.state import Logprob, TrainState
from treetune.losses import ebft_rewards, sft_objective
from treetune.losses.ebft_rewards import Comparison
from treetune.models import feature_network
from treetune.models import policy as policies
from treetune.models.batches import batcher
from treetune.models.dense import Config
from treetune.models.feature_network import FeatureNetwork
from treetune.models.policy import Policy


def parts(config: Ebft, policy: Policy, network: FeatureNetwork, comparison: Comparison, setting: Setting) -> Parts:
    """A frozen network that scores, lengths after the truth, turns that go on, the truth's likelihood."""
    options, rollout, prompts = config.ebft, config.rollout, setting.data.train + setting.data.val
    _check_fits(config, prompts, policy.cfg)
    multiplier = options.gt_length_multiplier if options.adaptive_max_tokens else None
    later_tokens = rollout.max_completion_length if any(prompt.columns["between"] for prompt in prompts) else None

    def rollouts(logprob: Logprob) -> RolloutParts:
        return RolloutParts(
            logprob,
            partial(_rewards, config, network, comparison, setting),
            partial(turns.with_truth, multiplier=multiplier, later_tokens=later_tokens),
            ebft_rows.true_reply if options.ce_coef else None,
            rollout.num_generations,
            partial(_held_out_truth, config, setting),
        )

    return policy_gradient.build(config, network.policy, setting, rollouts, ce_coef=options.ce_coef)


def _check_fits(config: Ebft, prompts: list[Prompt], cfg: Config) -> None:
    """Errors: ValueError when a conversation fits neither the model nor the server that it is sampled on, or ids are not the model's."""
    served = online.managed_length(config)
    limits = [(cfg.shared_positions, "the model")] + ([] if served is None else [(served, "the server (vllm_max_model_len)")])
    limit, limit_of = min(limits)
    ebft_rows.check_fits(
        prompts,
        max_completion_length=config.rollout.max_completion_length,
        limit=limit,
        limit_of=limit_of,
        vocab_size=cfg.vocab_size,
        stop_ids=config.rollout.stop_token_ids,
        custom_rollout=config.rollout.rollout_func is not None,
    )


def _rewards(config: Ebft, network: FeatureNetwork, comparison: Comparison, setting: Setting, policy: Policy) -> Rewards:
    """What scores completions by the frozen network."""
    options, network = config.ebft, network._replace(policy=policies.bare(network.policy))
    scorer = feature_rewards.FeatureScorer(
        feature_network.of_prompts(network, policy.frozen),
        batcher(policy.cfg, setting.device, (pack.collate_trees,)),
        lambda phi, y: ebft_rewards.stacked(ebft_rewards.compare(phi, y, comparison)),
        {*setting.stop_ids, *config.rollout.stop_token_ids},
        config.optim.micro_batch_size,
        setting.device,
        partial(feature_network.most, network, policy.frozen),
        partial(feature_network.idle, network, policy.frozen),
    )
    layers = ", ".join(f"{depth:g}" for depth in options.feature_layers)
    whitened = f", whitened over {options.whitening_space}" if options.use_whitening else ""
    described = f"{options.embed_method} of layers {layers}{whitened}"
    return feature_rewards.build(scorer, options.alignment_coef, options.diversity_coef, described=described)


def _held_out_truth(config: Ebft, setting: Setting, policy: Policy) -> Callable[[TrainState], dict[str, Tensor]]:
    """state -> the cross-entropy of the true replies to held-out prompts, which feature matching must not raise."""
    objective = sft_objective.named(policies.logprob(policy))
    collate = batcher(policy.cfg, setting.device, (pack.collate,))
    documents, rows = [ebft_rows.document(prompt) for prompt in setting.data.val], config.optim.micro_batch_size
    evaluate = evaluation.of_documents(objective, documents, collate, {"rows": rows}, ranks=setting.ranks)
    assert evaluate is not None
    return lambda state: {"ebft/ce_loss": evaluate(state)["loss"]}
