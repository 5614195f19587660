"""Values that numeric options may have: one table, option -> range, for flags and config files alike. Imports no torch.

Upper bounds are what the machine's types hold, or far beyond what anyone trains with: a number past them is a slip of the keyboard.
"""

import math
from typing import Any, NamedTuple

ROWS_MAX = 10**9  # rows, steps, epochs: counters that are added up and kept in JSON
TOKENS_MAX = 2**24  # tokens of one text, or of one forward pass
SEED_MAX = 2**62  # seeds are int64, and small numbers are added to them
FLOAT_MAX = 3e38  # what float32 holds
SECONDS_MAX = 1e7  # what timers of the standard library take


class Range(NamedTuple):
    """Numbers from `low` to `high`, both included unless an `above` or `below` excludes them; nan is in no range."""

    low: float
    high: float
    whole: bool = False
    above: bool = False
    below: bool = False
    zero: bool = False  # 0 is allowed besides
    words: str = ""

    def holds(self, value: float) -> bool:
        """Whether the range has the number."""
        if self.zero and value == 0:
            return True
        low = value > self.low if self.above else value >= self.low
        return low and (value < self.high if self.below else value <= self.high) and not (self.whole and value != int(value))

    def described(self) -> str:
        """What an error says is expected."""
        if self.words:
            return self.words
        if self.whole and self.low > 0:
            return f"at least {self.low} and at most {self.high}"
        zero, high = "0, or " * self.zero, f"{self.high:g}"
        if self.above:
            return f"{zero}a number above {self.low:g}, at most {high}"
        if self.below or self.high <= 1:
            return f"{zero}a number from {self.low:g} to {'below ' * self.below}{high}"
        return f"{zero}a number from {self.low:g} up, at most {self.high if self.whole else high}"


def _whole(low: int, high: int) -> Range:
    return Range(low, high, whole=True)


class _PartOrRows(Range):
    """A part below 1, or a number of rows."""

    def holds(self, value: float) -> bool:
        """Whether the range has the number."""
        return 0 <= value < 1 or 1 <= value <= ROWS_MAX and value == int(value)


COUNT, COUNT_OR_NONE = _whole(1, ROWS_MAX), _whole(0, ROWS_MAX)
TOKENS, SMALL = _whole(1, TOKENS_MAX), _whole(1, 65536)
POSITIVE, NOT_NEGATIVE = Range(0, FLOAT_MAX, above=True), Range(0, FLOAT_MAX)
ANY = Range(-FLOAT_MAX, FLOAT_MAX)
BELOW_ONE, BELOW_HALF = Range(0, 1, below=True), Range(0, 0.5, below=True)
SHARE, PART = Range(0, 1, above=True), Range(0, 1)
SECONDS = Range(0, SECONDS_MAX, above=True)
TEMPERATURE = Range(1e-6, 1e6, zero=True)
PORT = _whole(1, 65535)
ROWS = _PartOrRows(0, ROWS_MAX, words=f"a part below 1 or a whole number of rows up to {ROWS_MAX}")

RANGES: dict[str, Range] = dict.fromkeys(
    ("max_rows", "num_epochs", "max_steps", "eval_steps", "save_steps", "save_total_limit", "logging_steps", "early_stopping_patience",
     "loss_watchdog_patience", "num_prompts", "steps_per_generation", "num_iterations", "vllm_sync_interval", "streaming_min_groups",
     "reroll_max_groups", "ref_model_sync_steps", "gradient_accumulation_steps", "streaming_multipack_buffer_size"), COUNT,
) | dict.fromkeys(
    ("warmup_steps", "show", "debug", "html_rows", "replay_buffer_size", "num_completions_to_print", "top_k"), COUNT_OR_NONE
) | dict.fromkeys(
    ("sequence_len", "sample_tokens", "max_new_tokens", "max_completion_length", "max_prompt_len", "stride", "context_length",
     "generate_max_len", "vllm_max_model_len", "max_model_len"), TOKENS,
) | dict.fromkeys(
    ("lora_r", "micro_batch_size", "num_generations", "n_samples_per_prompt", "num_samples", "embedding_multiple"), SMALL
) | dict.fromkeys(
    ("dataset_processes", "reward_num_workers", "prefetch_depth", "tensor_parallel_size", "data_parallel_size"), _whole(1, 1024)
) | dict.fromkeys(
    ("lora_alpha", "loraplus_lr_ratio", "learning_rate", "adam_epsilon", "loss_watchdog_threshold", "max_logit_diff",
     "vllm_importance_sampling_cap", "repetition_penalty", "sapo_tau_pos", "sapo_tau_neg", "epsilon_high", "delta",
     "vllm_canary_tolerance", "rl_beta", "kto_desirable_weight", "kto_undesirable_weight", "discopop_tau", "rpo_alpha"),
    POSITIVE,
) | dict.fromkeys(
    ("z_loss_coef", "neftune_noise_alpha", "weight_decay", "max_grad_norm", "beta", "entropy_coef", "entropy_target",
     "entropy_coef_delta", "entropy_coef_max", "vllm_importance_sampling_min", "off_policy_mask_threshold",
     "center_rewards_coefficient", "orpo_alpha", "simpo_gamma", "simpo_alpha", "cpo_alpha", "alignment_coef", "diversity_coef",
     "ce_coef", "rl_coef"), NOT_NEGATIVE,
) | dict.fromkeys(("lora_dropout", "label_smoothing", "min_p", "epsilon", "adam_beta1", "adam_beta2", "momentum"), BELOW_ONE
) | dict.fromkeys(
    ("warmup_ratio", "cosine_min_lr_ratio", "ref_model_mixup_alpha", "ld_alpha", "reroll_start_fraction", "top_entropy_quantile"), PART,
) | dict.fromkeys(("top_p", "vllm_gpu_memory_utilization", "gpu_memory_utilization"), SHARE) | dict.fromkeys(
    ("reward_timeout", "vllm_server_timeout", "start_timeout"), SECONDS
) | dict.fromkeys(("port", "vllm_server_port"), PORT) | {
    "seed": _whole(0, SEED_MAX), "temperature": TEMPERATURE, "dpo_label_smoothing": BELOW_HALF, "val_set_size": ROWS,
    "gt_length_multiplier": Range(0.1, 1e6), "min_completion_prefix": _whole(0, TOKENS_MAX), "max_lora_rank": _whole(0, 65536),
    "lora_layers": _whole(0, 65535), "stop_token_ids": _whole(0, 2**31 - 1), "f_alpha_divergence_coef": ANY,
    "reward_weights": ANY._replace(words="finite numbers, at most 3e+38"), "loss_weights": POSITIVE._replace(words="numbers above 0"),
    "feature_layers": PART._replace(words="depths from 0 to 1, such as 0.25 0.5 0.75"),
}  # fmt: skip


def outside(name: str, value: Any) -> str:
    """What an error says of a value out of its option's range, such as "must be ..., got 7"; empty where it is inside, or not a number."""
    if name not in RANGES or value is None:
        return ""
    for one in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(one, bool) and isinstance(one, int | float) and not RANGES[name].holds(one):
            return f"must be {RANGES[name].described()}, got {shown(one)}"
    return ""


def expected(name: str) -> str:
    """What an option must be, in words, where its type may be wrong too."""
    words = RANGES[name].described()
    if not RANGES[name].whole:
        return words
    return words.replace("a number", "a whole number") if "a number" in words else f"a whole number of {words}"


def shown(value: float) -> str:
    """A number as an error shows it, however long it is."""
    if isinstance(value, float) or abs(value) < 10**40:
        return str(value)
    return f"a number of about {int(math.log10(abs(value))) + 1} digits"
