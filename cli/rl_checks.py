"""What options of reinforcement learning may not say: contradictions, and options that a run would ignore. Imports no torch."""

import os
from typing import Any

from treetune.cli.configs import Ebft, Grpo
from treetune.cli.errors import BadInput
from treetune.cli.options.rollout import PRESETS, PolicyLoss, clip_bounds

CLIPPED = ("ppo_clip", "gmpo")
VLLM_ONLY = ("repetition_penalty", "vllm_guided_decoding_regex", "generation_kwargs")


def samples(config: Any) -> bool:
    """Whether a command learns from whole completions that it samples."""
    return isinstance(config, Grpo) or (isinstance(config, Ebft) and config.ebft.mode == "structured")


def off_policy(config: Any) -> bool:
    """Whether completions may come from another policy than the one that trains on them: an engine, older weights, stored groups."""
    pipe = config.pipeline
    return config.engine.use_vllm or pipe.async_prefetch or pipe.dynamic_sampling or pipe.replay_buffer_size > 0


def check(config: Any) -> None:
    """Raise BadInput for options that contradict each other."""
    if not samples(config):
        return
    loss, rollout, pipe = config.loss, config.rollout, config.pipeline
    _check_loss(loss)
    _check_reference(config)
    if rollout.num_generations < 2 and (loss.advantage or PRESETS[loss.loss].advantage) != "reinforce":
        raise BadInput("num_generations must be at least 2: an advantage compares completions of the same prompt; or --advantage reinforce")
    if rollout.temperature == 0:
        raise BadInput("temperature 0 writes the same completion every time: give a number above 0, 1 is usual")
    if (
        isinstance(config, Grpo)
        and config.rewards.reward_weights
        and len(config.rewards.reward_weights) != len(config.rewards.reward_funcs)
    ):
        raise BadInput(f"reward_weights needs a number for each of the {len(config.rewards.reward_funcs)} rewards")
    if pipe.async_prefetch and not config.engine.use_vllm and config.adapter.adapter == "none":
        raise BadInput("async_prefetch samples from a copy of what trains: use an adapter, or use_vllm; whole weights would be held twice")
    low, high = config.correction.vllm_importance_sampling_min, config.correction.vllm_importance_sampling_cap
    if low is not None and low >= high:
        raise BadInput(f"vllm_importance_sampling_min must be below vllm_importance_sampling_cap {high:g}, got {low:g}")
    if loss.loss == "vespo" and config.correction.vllm_importance_sampling_mode.startswith("sequence"):
        raise BadInput("vespo multiplies the tokens' ratios itself: give vllm_importance_sampling_mode token_truncate or token_mask")
    _check_engine(config)


def _check_engine(config: Grpo | Ebft) -> None:
    engine, ranks = config.engine, int(os.environ.get("WORLD_SIZE", 1))
    if config.run.sharding == "full" and (config.pipeline.async_prefetch or config.rollout.rollout_func):
        name = "async_prefetch" if config.pipeline.async_prefetch else "rollout_func"
        raise BadInput(f"{name} does not go with --sharding full: ranks would gather weights at different times")
    if not engine.use_vllm:
        return
    if not 1 <= engine.vllm_server_port <= 65535:
        raise BadInput(f"vllm_server_port must be 1 to 65535, got {engine.vllm_server_port}")
    if ranks > 1:
        raise BadInput("use_vllm works with one process: several ranks would sync to the server at once; leave out torchrun")
    if config.pipeline.async_prefetch and config.adapter.adapter == "none":
        raise BadInput("async_prefetch with whole weights on vLLM: the server restarts at each sync, so nothing can be sampled meanwhile")
    if engine.vllm_reload_in_place and engine.vllm_server_host not in ("127.0.0.1", "localhost", "::1"):
        raise BadInput("vllm_reload_in_place opens the server to whoever reaches it: it is for servers on 127.0.0.1 only")
    if config.adapter.adapter == "none" and engine.vllm_mode != "managed":
        raise BadInput("whole weights reach a vLLM server by restarting it: give vllm_mode managed, or train an adapter")
    whole = config.adapter.lora_modules_to_save or config.vocabulary.tokens or config.vocabulary.embedding_multiple
    if whole:
        names = "lora_modules_to_save, tokens and embedding_multiple"
        raise BadInput(f"vLLM takes adapters of low rank only: leave out {names}, or sample without use_vllm")


def _check_reference(config: Grpo | Ebft) -> None:
    options = config.reference
    if options.sync_ref_model and config.adapter.adapter == "lora" and options.ref_model_mixup_alpha != 1:
        raise BadInput(
            "sync_ref_model with an adapter needs ref_model_mixup_alpha 1: a mean of two adapters is not the adapter of the mean; "
            "or train whole weights with --adapter none"
        )
    if options.sync_ref_model and config.run.sharding == "full":
        raise BadInput("sync_ref_model does not go with --sharding full: the moving reference is kept whole on every rank")


def _check_loss(loss: PolicyLoss) -> None:
    if loss.loss == "cispo" and loss.epsilon_high is None:
        raise BadInput("cispo needs epsilon_high, the largest ratio itself: 5 is usual")
    if loss.loss == "cispo" and loss.epsilon_high < 1:
        raise BadInput(f"epsilon_high is the largest ratio itself for cispo, at least 1 (5 is usual), got {loss.epsilon_high}")
    if loss.loss in ("gmpo", "vespo") and loss.importance_sampling_level:
        raise BadInput(f"{loss.loss} has ratios of its own: leave out importance_sampling_level")
    high = clip_bounds(loss)[1]
    if loss.delta is not None and loss.delta <= 1 + high:
        raise BadInput(f"delta must be above 1 + epsilon_high = {1 + high:g}, got {loss.delta:g}")


def ignored(config: Any) -> dict[str, str]:
    """{option: why this run would not look at it}."""
    if not samples(config):
        return {}
    return _ignored_loss(config.loss) | _ignored_sampling(config) | _ignored_pipeline(config) | _ignored_reference(config)


def _ignored_loss(loss: PolicyLoss) -> dict[str, str]:
    term, out = PRESETS[loss.loss].term, {}
    if term not in CLIPPED:
        out |= {name: f"{loss.loss} does not clip at it" for name in ("epsilon", "delta")}
    if term not in (*CLIPPED, "cispo"):
        out["epsilon_high"] = f"{loss.loss} does not clip at it"
    if term != "ppo_clip":
        out["delta"] = f"{loss.loss} does not clip at it"
    if term == "reinforce":
        out["importance_sampling_level"] = "reinforce has no ratios"
    if term != "sapo":
        out |= {name: f"the loss is {loss.loss}" for name in ("sapo_tau_pos", "sapo_tau_neg")}
    if not loss.beta:
        out |= {name: "beta is 0" for name in ("kl_estimator", "use_bias_correction_kl")}
    if not loss.use_adaptive_entropy:
        out |= {name: "use_adaptive_entropy is off" for name in ("entropy_target", "entropy_coef_delta", "entropy_coef_max")}
    return out


def _ignored_sampling(config: Grpo | Ebft) -> dict[str, str]:
    engine, out = config.engine, {}
    if not engine.use_vllm:
        names = [name for name in vars(engine) if name != "use_vllm"]
        out |= {name: "use_vllm is off" for name in (*names, *VLLM_ONLY, "vllm_sync_interval")}
    elif engine.vllm_mode == "server":
        managed = ("vllm_reload_in_place", "vllm_python", "vllm_max_model_len", "vllm_gpu_memory_utilization")
        out |= {name: "the server runs already; these are options of treetune serve" for name in managed}
    elif config.adapter.adapter == "lora":
        out["vllm_reload_in_place"] = "an adapter is loaded by name, without a restart"
    if not off_policy(config):
        same = "the trainer samples from the weights that train, so there is nothing to correct"
        later = config.pipeline.steps_per_generation * config.pipeline.num_iterations > 1  # the policy moves within a generation
        out |= {name: same for name in vars(config.correction) if name != "off_policy_mask_threshold" or not later}
    elif not config.correction.vllm_importance_sampling_correction:
        names = ("mode", "cap", "min")
        out |= {f"vllm_importance_sampling_{name}": "vllm_importance_sampling_correction is off" for name in names}
    return out


def _ignored_pipeline(config: Grpo | Ebft) -> dict[str, str]:
    pipe, out = config.pipeline, {}
    if not pipe.async_prefetch:
        out["prefetch_depth"] = "async_prefetch is off"
    if not pipe.streaming_partial_batch:
        out["streaming_min_groups"] = "streaming_partial_batch is off"
    if pipe.reroll_start_fraction >= 1:
        out["reroll_max_groups"] = "reroll_start_fraction is 1"
    return out


def _ignored_reference(config: Grpo | Ebft) -> dict[str, str]:
    if not config.loss.beta:
        return {name: "beta is 0, so there is no reference" for name in vars(config.reference)}
    if not config.reference.sync_ref_model:
        return {name: "sync_ref_model is off" for name in ("ref_model_sync_steps", "ref_model_mixup_alpha")}
    return {"ref_model": "sync_ref_model makes the reference follow the policy"}
