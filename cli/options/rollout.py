"""Options of reinforcement learning: prompts, sampling, rewards, loss, correction, pipeline, engine. Importing this imports no torch.

Names are those of the documents (`num_generations`, `reward_funcs`, `replay_buffer_size`, ...).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from treetune.cli import samples
from treetune.cli.options.shared import Listed, OptimOptions


class Preset(NamedTuple):
    """What a name of `--loss` stands for; the options `advantage`, `importance_sampling_level` and `aggregate` override it."""

    term: str  # of losses.policy
    ratio: str = "token"
    aggregate: str = "token"
    advantage: str = "group_scaled"


PRESETS = {
    "dapo": Preset("ppo_clip"),
    "bnpo": Preset("ppo_clip"),
    "grpo": Preset("ppo_clip", aggregate="sequence"),
    "dr_grpo": Preset("ppo_clip", aggregate="constant", advantage="centered"),
    "gspo": Preset("ppo_clip", ratio="sequence", aggregate="sequence"),
    "luspo": Preset("ppo_clip", ratio="sequence", aggregate="sum"),
    "gdpo": Preset("ppo_clip", advantage="gdpo"),
    "rloo": Preset("ppo_clip", ratio="sequence_sum", aggregate="sequence", advantage="rloo"),
    "reinforce": Preset("reinforce", advantage="reinforce"),
    "cispo": Preset("cispo"),
    "sapo": Preset("sapo", aggregate="sequence"),
    "vespo": Preset("vespo"),
    "gmpo": Preset("gmpo", ratio="sequence", aggregate="sequence"),
}
LossName = Literal[
    "dapo", "bnpo", "grpo", "dr_grpo", "gspo", "luspo", "gdpo", "rloo", "reinforce", "cispo", "sapo", "vespo", "gmpo"
]  # fmt: skip


@dataclass(frozen=True)
class PromptRows:
    """Prompts. Every column but theirs goes to the rewards. A config file may have `datasets`, a list with options for each data set."""

    datasets: Listed = ()
    """Data sets with options of their own: path, split, limit, field_prompt, type, name."""
    data: tuple[str, ...] = (samples.path("gsm8k_train_sample.jsonl"),)
    """Files (.jsonl, .json, .parquet, .csv) or Hugging Face data set ids."""
    split: str = "train"
    """Split of a Hugging Face data set."""
    max_rows: int | None = None
    """Use only the first rows of each data set."""
    field_prompt: str = "auto"
    """Column of the prompt: text to continue, or messages; auto takes prompt, else messages, whose last answer becomes the column
    answer, else question, as a chat."""
    prompt_transform: str | None = None
    """module.function or file.py:function that makes rows with a prompt of others: transform(cfg) gives fn(example), as in docs/data.md."""
    default_system_message: str | None = None
    """System message of the conversations that have none."""
    max_prompt_len: int = 512
    """Longer prompts are dropped, in tokens."""
    chat_template: str | None = None
    """Instead of the tokenizer's own: a built-in name (chatml, llama3, qwen3, ...), tokenizer_default_fallback_NAME, or Jinja."""
    chat_template_kwargs: tuple[str, ...] = ()
    """NAME=VALUE for the chat template, such as enable_thinking=false; in a file also a mapping."""


@dataclass(frozen=True)
class PromptData(PromptRows):
    """Prompts. Every column but theirs goes to the rewards. A config file may have `datasets`, a list with options for each data set."""

    val_data: tuple[str, ...] = ()
    """Files or data sets of prompts to evaluate on, instead of a part of the training prompts."""
    val_set_size: float = 0.0
    """Part of the prompts (below 1) or number of prompts (1 and up) held out for evaluation; 0 for none."""


@dataclass(frozen=True)
class RolloutOptions:
    """Sampling."""

    num_generations: int = 8
    """Completions of each prompt."""
    max_completion_length: int = 256
    """Longest completion in tokens."""
    temperature: float = 1.0
    """Divides the logits, while sampling and while training alike."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Sample among this many likeliest tokens; 0 for all."""
    min_p: float = 0.0
    """Leave out tokens with less than this part of the likeliest one's probability."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a completion besides the model's own."""
    repetition_penalty: float = 1.0
    """Penalty on tokens that occurred (vLLM only); 1 is none."""
    vllm_guided_decoding_regex: str | None = None
    """Completions must match this regular expression (vLLM only)."""
    generation_kwargs: tuple[str, ...] = ()
    """NAME=VALUE, further sampling parameters (vLLM only), values as JSON: min_tokens=8; in a file also a mapping."""
    rollout_func: str | None = None
    """module.function or file.py:function that plays the completions (several turns, tools, environments), instead of plain sampling; see
    docs/online.md."""


@dataclass(frozen=True)
class RewardFunctions:
    """Rewards."""

    reward_funcs: tuple[str, ...] = ("gsm8k",)
    """Rewards: built in (gsm8k, math_equal, math_verify, format_tags, length, repetition, digits), an import path (rewards.accuracy),
    file.py:function, or a reward model's folder or Hugging Face id. Options follow a question mark: length?max=512,cache=128. A function
    takes completions and the columns that its parameters name, and gives a number for each completion, or None for no opinion."""
    reward_weights: tuple[float, ...] = ()
    """A weight for each reward; 1 each if not given. A completion gets the weighted sum of the rewards that have an opinion."""
    reward_num_workers: int = 1
    """Processes that reward functions run in; one that hangs or crashes costs its own completion, not the run."""
    reward_timeout: float = 30.0
    """Seconds for a call of a reward function, on a worker's share of the completions; after that they are tried one by one."""


@dataclass(frozen=True)
class PolicyLoss:
    """Loss. The start of a run prints what a name stands for."""

    loss: LossName = "dapo"
    """Method: what is clipped, what the loss is a mean over, and how rewards become advantages; docs/online.md has a table."""
    advantage: Literal["group_scaled", "centered", "batch_scaled", "gdpo", "rloo", "reinforce"] | None = None
    """How rewards become advantages, if not as the method says: less the mean of the prompt's completions and divided by their deviation
    (group_scaled), by that of the whole generation (batch_scaled), or by nothing (centered); each reward scaled on its own before they
    are added (gdpo); less the mean of the others (rloo); as they are (reinforce)."""
    aggregate: Literal["token", "sequence", "constant", "sum"] | None = None
    """What the loss is a mean over, if not as the method says: tokens of the step, sequences of their token means, sequences of a
    constant length (max_completion_length), or sequences of their token sums."""
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] | None = None
    """Ratios per token, or one per completion, of its mean log-ratio (sequence_token: that value with a gradient for each token), if not as
    the method says."""
    epsilon: float | None = None
    """How far a ratio may fall below 1 before it is clipped, and rise above it unless epsilon_high says otherwise; if not given 0.2, gspo
    and luspo 3e-4, gmpo 0.4 (in log space)."""
    epsilon_high: float | None = None
    """How far a ratio may rise above 1; if not given as epsilon, and if neither is, dapo 0.28, gspo and luspo 4e-4. For cispo the largest
    ratio itself, which must be given (5 is usual)."""
    delta: float | None = None
    """Upper bound of the ratio of completions with a negative advantage (two-sided clipping); above 1 + epsilon_high."""
    sapo_tau_pos: float = 1.0
    """sapo: temperature of the gate where the advantage is positive."""
    sapo_tau_neg: float = 1.05
    """sapo: temperature of the gate where it is not."""
    beta: float = 0.0
    """Weight of the divergence from the reference; 0 needs no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that divergence per token."""
    use_bias_correction_kl: bool = True
    """Multiply it by the ratio, which makes its gradient that of the reverse divergence."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    use_adaptive_entropy: bool = False
    """Raise and lower the weight of the bonus, starting at entropy_coef, to hold the entropy at its target."""
    entropy_target: float = 0.2
    """Target of the adaptive bonus (nats per token)."""
    entropy_coef_delta: float = 0.005
    """Change of its weight per step."""
    entropy_coef_max: float = 1.0
    """Its largest weight."""
    top_entropy_quantile: float = 1.0
    """Train only on this part of the tokens, those of the highest entropy; 1 for all."""
    mask_truncated_completions: bool = False
    """Do not train on completions that were cut off at max_completion_length."""


@dataclass(frozen=True)
class CorrectionOptions:
    """Correction of samples from another policy than the one that trains: an engine of other numerics, or older weights."""

    vllm_importance_sampling_correction: bool = True
    """Weigh tokens by the ratio of the trainer's to the sampler's probability; 1 where the sampler cannot tell its own."""
    vllm_importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "token_truncate"
    """Ratios of tokens or of whole completions (products over tokens, far from 1 for long ones), cut at the cap or left out beyond it."""
    vllm_importance_sampling_cap: float = 3.0
    """Largest ratio."""
    vllm_importance_sampling_min: float | None = None
    """Smallest ratio; if not given, any."""
    off_policy_mask_threshold: float | None = None
    """Leave out completions with a negative advantage that the policy has moved away from by more than this (nats per token)."""


@dataclass(frozen=True)
class PipelineOptions:
    """Pipeline. A generation is micro_batch_size * gradient_accumulation_steps * steps_per_generation prompts."""

    steps_per_generation: int = 1
    """Optimiser steps made of one generation, each of its own prompts; above 1, ratios leave 1 and bounds begin to act."""
    num_iterations: int = 1
    """Passes over each generation, each in an order of its own."""
    async_prefetch: bool = False
    """Sample the next generation while this one trains, from older weights (vLLM, or an adapter on its frozen base)."""
    prefetch_depth: int = 1
    """Generations to sample ahead."""
    vllm_sync_interval: int = 1
    """Optimiser steps between two syncs of the weights to the sampler."""
    streaming_partial_batch: bool = False
    """Score groups while the rest is still being sampled; advantages are always those of the whole generation."""
    streaming_min_groups: int = 1
    """Prompts that are sampled and scored at a time with streaming_partial_batch."""
    dynamic_sampling: bool = False
    """Leave out prompts whose completions all have the same reward and sample others instead, up to 3 times a generation."""
    replay_buffer_size: int = 0
    """Keep up to this many prompts whose completions differ in reward, and train on them in place of new ones that do not; 0 is off."""
    reroll_start_fraction: float = 1.0
    """From this part of the run on, sample prompts anew of which every completion got 0; 1 is off."""
    reroll_max_groups: int = 1
    """Prompts that are sampled anew in a generation, at most."""
    skip_zero_advantage_batches: bool = True
    """Spend no pass on micro-batches whose advantages are all 0, where no other term would train."""
    log_completions: bool = True
    """Write every generation's completions and rewards to samples.jsonl."""
    num_completions_to_print: int = 1
    """Completions to print at each generation."""


@dataclass(frozen=True)
class EngineOptions:
    """Sampler. Without use_vllm the trainer samples from its own weights."""

    use_vllm: bool = False
    """Sample with a vLLM server."""
    vllm_mode: Literal["server", "managed"] = "server"
    """server: one that runs already (treetune serve); managed: start one and stop it with the run."""
    vllm_server_host: str = "127.0.0.1"
    """Host of the server."""
    vllm_server_port: int = 8000
    """Port of the server."""
    vllm_server_timeout: float = 240.0
    """Seconds to wait for an answer."""
    vllm_python: str | None = None
    """Python of the environment that has vLLM (managed)."""
    vllm_max_model_len: int | None = None
    """Longest prompt with completion that the server takes (managed)."""
    vllm_gpu_memory_utilization: float = 0.9
    """Part of the device memory that the server may use (managed)."""
    vllm_reload_in_place: bool = False
    """Whole weights reach a managed server through its development endpoints, without a restart; on this machine only. vLLM keeps the old
    head of a tied model, which the check after a sync then refuses."""
    vllm_canary_tolerance: float | None = None
    """Largest mean difference (nats) between log-probs of trainer and server on 32 fixed tokens after a sync; if not given by dtype, 0.001
    in float32 and 0.2 in bfloat16. More stops the run."""


@dataclass(frozen=True)
class RlReference:
    """Reference, used where beta is not 0: the model as the run starts, with the adapter it starts from."""

    ref_model: str | None = None
    """Another model as the reference: folder, .gguf file, known name or Hugging Face id, with the same vocabulary."""
    sync_ref_model: bool = False
    """Let the reference follow the policy."""
    ref_model_sync_steps: int = 512
    """Steps between two syncs."""
    ref_model_mixup_alpha: float = 0.6
    """Part of the policy in the new reference; 1 copies it. An adapter can only be copied."""


@dataclass(frozen=True)
class RlOptim(OptimOptions):
    """Optimisation."""

    learning_rate: float | None = None
    """Peak learning rate; if not given, 2e-5 with an adapter and 1e-6 without."""
    lr_scheduler: Literal["cosine", "linear", "constant"] = "constant"
    """Shape of the learning rate after the warm-up."""
    micro_batch_size: int = 2
    """Prompts, each with its completions, in one forward pass on one device."""


EPSILON = {"gspo": (3e-4, 4e-4), "luspo": (3e-4, 4e-4), "gmpo": (0.4, 0.4), "dapo": (0.2, 0.28)}  # low and high, where not 0.2


def clip_bounds(options: PolicyLoss) -> tuple[float, float]:
    """How far a ratio may fall below and rise above 1."""
    low, high = EPSILON.get(options.loss, (0.2, 0.2))
    if options.epsilon is not None:
        low = high = options.epsilon
    return low, options.epsilon_high if options.epsilon_high is not None else high
