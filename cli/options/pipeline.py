"""Options of how generations are made, by which sampler, and corrected for it. Importing this imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from treetune.cli.options.rollout import VLLM
from treetune.core.config.marks import CORRECTION, GENERATIONS, PROGRAM, SAMPLER, SHOWN, STORED, Unused, unused_if, unused_unless
from treetune.core.config.ranges import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, PART, PORT, POSITIVE, PROCESSES, SECONDS, SHARE, TOKENS

ON_POLICY = "the trainer samples from the weights that train, so there is nothing to correct"
OFF_POLICY_OPTIONS = ("use_vllm", "async_prefetch", "dynamic_sampling", "replay_buffer_size")


def off_policy(values: Mapping[str, Any]) -> bool:
    """Whether completions may come from another policy than the one that trains: an engine, older weights, stored groups."""
    return any(values[name] for name in OFF_POLICY_OPTIONS)


def moved(values: Mapping[str, Any]) -> bool:
    """Whether the policy that trains may be another than when completions were new: also in later steps of their generation."""
    return off_policy(values) or values["steps_per_generation"] * values["num_iterations"] > 1


OFF_POLICY = Unused(lambda values: "" if off_policy(values) else ON_POLICY)
MOVED = Unused(lambda values: "" if moved(values) else ON_POLICY)
CORRECTED = unused_unless("vllm_importance_sampling_correction", reason="vllm_importance_sampling_correction is off")
ADDRESSED = unused_if("vllm_server_urls", reason="vllm_server_urls says where the servers are")
MANAGED = unused_if("vllm_mode", "server", reason="the server runs already; these are options of treetune serve")


@dataclass(frozen=True)
class CorrectionOptions:
    """Correction of samples from another policy than the one that trains: an engine of other numerics, or older weights."""

    vllm_importance_sampling_correction: Annotated[bool, CORRECTION, OFF_POLICY] = True
    """Weigh tokens by the ratio of the trainer's to the sampler's probability; 1 where the sampler cannot tell its own."""
    vllm_importance_sampling_mode: Annotated[
        Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"], CORRECTION, OFF_POLICY, CORRECTED
    ] = "token_truncate"
    """Ratios of tokens or of whole completions (products over tokens, far from 1 for long ones), cut at the cap or left out beyond it."""
    vllm_importance_sampling_cap: Annotated[float, POSITIVE, CORRECTION, OFF_POLICY, CORRECTED] = 3.0
    """Largest ratio."""
    vllm_importance_sampling_min: Annotated[float | None, NOT_NEGATIVE, CORRECTION, OFF_POLICY, CORRECTED] = None
    """Smallest ratio; if not given, any."""
    off_policy_mask_threshold: Annotated[float | None, NOT_NEGATIVE, CORRECTION, MOVED] = None
    """Leave out completions with a negative advantage that the policy has moved away from by more than this (nats per token)."""


@dataclass(frozen=True)
class PipelineOptions:
    """Pipeline. A generation is micro_batch_size * gradient_accumulation_steps * steps_per_generation prompts on each rank."""

    steps_per_generation: Annotated[int, COUNT, STORED] = 1
    """Optimiser steps made of one generation, each of its own prompts; above 1, ratios leave 1 and bounds begin to act."""
    num_iterations: Annotated[int, COUNT, STORED] = 1
    """Passes over each generation, each in an order of its own."""
    async_prefetch: Annotated[bool, GENERATIONS] = False
    """Sample the next generation while this one trains, from older weights (vLLM, or an adapter on its frozen base)."""
    prefetch_depth: Annotated[int, PROCESSES, GENERATIONS, unused_unless("async_prefetch", reason="async_prefetch is off")] = 1
    """Generations to sample ahead."""
    vllm_sync_interval: Annotated[int, COUNT, GENERATIONS, VLLM] = 1
    """Optimiser steps between two syncs of the weights to the sampler."""
    streaming_partial_batch: Annotated[bool, GENERATIONS] = False
    """Score groups while the rest is still being sampled; advantages are always those of the whole generation."""
    streaming_min_groups: Annotated[
        int, COUNT, GENERATIONS, unused_unless("streaming_partial_batch", reason="streaming_partial_batch is off")
    ] = 1
    """Prompts that a rank samples and scores at a time with streaming_partial_batch."""
    dynamic_sampling: Annotated[bool, GENERATIONS] = False
    """Leave out prompts whose completions all have the same reward and sample others instead, up to 3 times a generation."""
    replay_buffer_size: Annotated[int, COUNT_OR_NONE, GENERATIONS] = 0
    """Keep up to this many prompts whose completions differ in reward, and train on them in place of new ones that do not; 0 is off."""
    reroll_start_fraction: Annotated[float, PART, GENERATIONS] = 1.0
    """Fraction of the run from which prompts are sampled anew whose completions all got reward 0; 1 is off."""
    reroll_max_groups: Annotated[int, COUNT, GENERATIONS, unused_if("reroll_start_fraction", 1, reason="reroll_start_fraction is 1")] = 1
    """Prompts that are sampled anew in a generation, at most."""
    skip_zero_advantage_batches: Annotated[bool, GENERATIONS] = True
    """Spend no pass on micro-batches whose advantages are all 0, where no other term would train."""
    log_completions: Annotated[bool, SHOWN] = True
    """Write every generation's completions and rewards to samples.jsonl."""
    num_completions_to_print: Annotated[int, COUNT_OR_NONE, SHOWN] = 1
    """Completions to print at each generation."""


@dataclass(frozen=True)
class EngineOptions:
    """Sampler. Without use_vllm the trainer samples from its own weights."""

    use_vllm: Annotated[bool, SAMPLER] = False
    """Sample with a vLLM server."""
    vllm_mode: Annotated[Literal["server", "managed"], SAMPLER, VLLM] = "server"
    """server: one that runs already (treetune serve); managed: start one and stop it with the run."""
    vllm_server_host: Annotated[str, SAMPLER, VLLM, ADDRESSED] = "127.0.0.1"
    """Host of the server."""
    vllm_server_port: Annotated[int, PORT, SAMPLER, VLLM, ADDRESSED] = 8000
    """Port of the server."""
    vllm_server_urls: Annotated[tuple[str, ...], SAMPLER, VLLM, unused_if("vllm_mode", "managed", reason="the run starts its servers")] = ()
    """Addresses of several servers (http://node-1:8000 http://node-2:8000), which the ranks with prompts of their own ask in turn."""
    vllm_num_servers: Annotated[int, PROCESSES, SAMPLER, VLLM, MANAGED] = 1
    """Servers to start (managed): each by the first rank that asks it, on that rank's device, at the ports from vllm_server_port on."""
    vllm_server_timeout: Annotated[float, SECONDS, SAMPLER, VLLM] = 240.0
    """Seconds to wait for an answer; a request that fails is tried again for 90 s."""
    vllm_python: Annotated[str | None, PROGRAM, SAMPLER, VLLM, MANAGED] = None
    """Python of the environment that has vLLM (managed)."""
    vllm_max_model_len: Annotated[int | None, TOKENS, SAMPLER, VLLM, MANAGED] = None
    """Longest prompt with completion that the server takes (managed)."""
    vllm_gpu_memory_utilization: Annotated[float, SHARE, SAMPLER, VLLM, MANAGED] = 0.9
    """Fraction of the device memory that the server may use (managed)."""
    vllm_reload_in_place: Annotated[
        bool, SAMPLER, VLLM, MANAGED, unused_if("adapter", "lora", reason="an adapter is loaded by name, without a restart")
    ] = False
    """Whole weights reach a managed server through its development endpoints, without a restart; on this machine only. vLLM keeps the old
    head of a tied model, which the check after a sync then refuses."""
    vllm_canary_tolerance: Annotated[float | None, POSITIVE, SAMPLER, VLLM] = None
    """Largest mean difference (nats) between log-probs of trainer and server on 32 fixed tokens after a sync; if not given by dtype, 0.001
    in float32 and 0.2 in bfloat16. More stops the run."""
