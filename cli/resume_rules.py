"""What a resumed run may change: one rule for every option of the training commands, and the comparison of two sets of options.

Importing this imports no torch. A test requires a rule for every option, with its reason.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from treetune.core import masking

REFUSED, LISTED, DOCUMENTS, ORDER, WEIGHTS, FUNCTION, START = "refused", "listed", "documents", "order", "weights", "function", "start"
# refused: another value is an error. listed: it takes effect and is printed. documents, order, weights, function: refused unless what
# the option stands for is the same by its fingerprint, and then listed. start: says how the run is started, and is not compared.


class Rule(NamedTuple):
    """What becomes of another value, and why."""

    verdict: str
    reason: str


def _rules(verdict: str, reason: str, *names: str) -> dict[str, Rule]:
    return dict.fromkeys(names, Rule(verdict, reason))


RULES: dict[str, Rule] = (
    _rules(START, "says how the run is started", "output_dir", "resume", "overwrite")
    # the model
    | _rules(WEIGHTS, "the trained weights belong to the model that they started from", "model", "revision", "from_config")
    | _rules(WEIGHTS, "the adapter was trained on from this one", "lora_model_dir")
    | _rules(WEIGHTS, "the losses so far are distances from this reference", "ref_model")
    | _rules(REFUSED, "the model computes other numbers in another dtype", "dtype")
    | _rules(REFUSED, "decides the ids of the rows and the shape of the model", "special_tokens", "tokens", "embedding_multiple")
    | _rules(REFUSED, "decides what trains", "adapter", "lora_target_modules", "lora_layers", "lora_modules_to_save")
    | _rules(REFUSED, "scales everything that the adapter has learned", "lora_r", "lora_alpha", "lora_rslora")
    # the rows
    | _rules(
        DOCUMENTS, "decides which documents are read, and which of their tokens are supervised",
        "data", "datasets", "test_datasets", "format", "split", "max_rows", "sequence_len", "overlong", "chat_template",
        "chat_template_kwargs", "dataset_exact_deduplication", "default_system_message", "roles_to_train", "train_on_eos",
        "train_on_inputs", "val_data", "val_set_size", "text_column", "streaming", "field_prompt", "prompt_transform", "max_prompt_len",
    )
    | _rules(
        ORDER, "decides which documents a step reads", "micro_batch_size", "gradient_accumulation_steps", "sample_packing", "shuffle",
        "streaming_multipack_buffer_size",
    )
    | _rules(REFUSED, "decides order, rollouts and dropout; another value would read rows twice or never", "seed")
    | _rules(LISTED, "only says where encoded rows are kept", "dataset_prepared_path")
    # what is trained towards
    | _rules(
        REFUSED, "decides what the loss is, which curves, early stopping and the best checkpoint compare",
        "loss", "label_smoothing", "z_loss_coef", "neftune_noise_alpha", "loss_weights", "rl_beta", "dpo_label_smoothing", "f_divergence",
        "f_alpha_divergence_coef", "discopop_tau", "ld_alpha", "dpo_use_weighting", "rpo_alpha", "kto_desirable_weight",
        "kto_undesirable_weight", "orpo_alpha", "orpo_nll_scope", "simpo_gamma", "simpo_alpha", "cpo_alpha", "center_rewards_coefficient",
        "advantage", "aggregate", "importance_sampling_level", "epsilon", "epsilon_high", "delta", "sapo_tau_pos", "sapo_tau_neg", "beta",
        "kl_estimator", "use_bias_correction_kl", "entropy_coef", "use_adaptive_entropy", "entropy_target", "entropy_coef_delta",
        "entropy_coef_max", "top_entropy_quantile", "mask_truncated_completions", "ce_coef", "rl_coef", "advantage_estimator",
    )
    | _rules(REFUSED, "decides what a reward is, which curves and the best checkpoint compare", "reward_weights")
    | _rules(FUNCTION, "decides what a reward is, which curves and the best checkpoint compare", "reward_funcs")
    | _rules(
        REFUSED, "decides what features are, and so what a reward is", "mode", "feature_layers", "embed_method", "feature_norm",
        "use_whitening", "whitening_space", "alignment_coef", "diversity_coef",
    )
    | _rules(REFUSED, "decides whether the checkpoint holds a reference that moves", "sync_ref_model")
    | _rules(LISTED, "sets how fast the reference follows from here on", "ref_model_sync_steps", "ref_model_mixup_alpha")
    | _rules(LISTED, "only says when the reference is computed", "precompute_ref_logps")
    # rollouts
    | _rules(REFUSED, "stored groups hold this many completions", "num_generations")
    | _rules(
        REFUSED, "decides what is sampled from, which log-probs and rewards so far are of", "temperature", "top_p", "top_k", "min_p",
        "stop_token_ids", "repetition_penalty", "vllm_guided_decoding_regex", "generation_kwargs",
    )
    | _rules(FUNCTION, "decides what is sampled from, which log-probs and rewards so far are of", "rollout_func")
    | _rules(LISTED, "bounds the completions of the steps to come", "max_completion_length", "adaptive_max_tokens", "gt_length_multiplier")
    | _rules(
        REFUSED, "decides where rollouts start and how long they are", "stride", "context_length", "generate_max_len",
        "n_samples_per_prompt", "min_completion_prefix",
    )
    | _rules(REFUSED, "decides how a stored generation is dealt to steps", "steps_per_generation", "num_iterations")
    | _rules(
        LISTED, "says how the generations to come are made", "async_prefetch", "prefetch_depth", "vllm_sync_interval",
        "streaming_partial_batch", "streaming_min_groups", "dynamic_sampling", "replay_buffer_size", "reroll_start_fraction",
        "reroll_max_groups", "skip_zero_advantage_batches",
    )
    | _rules(
        LISTED, "corrects the samples of the steps to come for who makes them, which may change",
        "vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "vllm_importance_sampling_cap",
        "vllm_importance_sampling_min", "off_policy_mask_threshold",
    )
    | _rules(
        LISTED, "says who samples, and where it is", "use_vllm", "vllm_mode", "vllm_server_host", "vllm_server_port",
        "vllm_server_timeout", "vllm_python", "vllm_max_model_len", "vllm_gpu_memory_utilization", "vllm_reload_in_place",
        "vllm_canary_tolerance",
    )
    | _rules(LISTED, "says how rewards are run, not what they are", "reward_num_workers", "reward_timeout")
    # steps
    | _rules(REFUSED, "the moments in the checkpoint are those of this optimizer", "optimizer")
    | _rules(LISTED, "sets how large the steps to come are", "learning_rate", "lr_scheduler", "cosine_min_lr_ratio", "warmup_steps",
             "warmup_ratio", "weight_decay", "weight_decay_rules", "lr_rules", "loraplus_lr_ratio", "adam_beta1", "adam_beta2",
             "adam_epsilon", "momentum", "max_grad_norm")
    | _rules(LISTED, "is noise on the steps to come", "lora_dropout")
    | _rules(LISTED, "sets how long the run is", "num_epochs", "max_steps")
    | _rules(LISTED, "trades time for memory, on the machine at hand", "gradient_checkpointing", "device", "sharding", "feature_device")
    | _rules(
        LISTED, "says what is shown, evaluated and kept, and when a run stops", "eval_steps", "save_steps", "save_total_limit",
        "logging_steps", "early_stopping_patience", "loss_watchdog_threshold", "loss_watchdog_patience", "sample_prompt", "sample_tokens",
        "log_completions", "num_completions_to_print",
    )
)  # fmt: skip

LENGTHS = {"max_steps", "num_epochs"}
# what a run that has no step left still looks at: where things are, and the last sample answer
LASTING = {name for name, rule in RULES.items() if rule.verdict in (DOCUMENTS, ORDER, WEIGHTS)} | {
    "sample_prompt", "sample_tokens", "device", "sharding", "feature_device", "dataset_prepared_path",
}  # fmt: skip
BY_RULE = {DOCUMENTS: ("train", "held out"), ORDER: ("order",), WEIGHTS: ("model",)}  # what an option of such a rule is judged by
BY_NAME = {
    "lora_model_dir": ("adapter",),
    "ref_model": ("reference",),
    "reward_funcs": ("reward_funcs",),
    "rollout_func": ("rollout_func",),
} | dict.fromkeys(("sequence_len", "streaming"), ("train", "held out", "order"))


class Change(NamedTuple):
    """An option whose value is another than in the checkpoint."""

    name: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.name} {shown(self.before)} -> {shown(self.after)}"


class Verdict(NamedTuple):
    """What stands in the way of resuming, and what may change; texts for people."""

    refused: list[str]
    listed: list[str]


def shown(value: Any) -> str:
    """A value in a line, at most 60 characters of it."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list) and value and all(isinstance(item, str | int | float) for item in value):
        text = " ".join(item if isinstance(item, str) else shown(item) for item in value)
    else:
        text = value if isinstance(value, str) and value else json.dumps(value, default=str)
    text = masking.mask_secrets(text if text.isprintable() else json.dumps(text))
    return text if len(text) <= 60 else text[:56] + " ..."


def changes(
    before: Mapping[str, Any], after: Mapping[str, Any], *, defaults: Mapping[str, Any], ignored: Mapping[str, str]
) -> list[Change]:
    """Options with other values, but for those that say how a run is started and those that this run does not look at.

    defaults: values of options that the checkpoint does not know, because they are newer than it.
    """
    pairs = [Change(name, before.get(name, defaults.get(name)), value) for name, value in after.items()]
    return [one for one in pairs if one.before != one.after and RULES[one.name].verdict != START and one.name not in ignored]


def judged_by(name: str) -> tuple[str, ...]:
    """The fingerprints that decide about an option; none where its value does."""
    return BY_NAME.get(name) or BY_RULE.get(RULES[name].verdict, ())


def judge(found: list[Change], after: Mapping[str, Any], *, same: Callable[[str], bool | None]) -> Verdict:
    """The verdict on changed options. same(what) -> whether documents ("train", "held out"), their "order" or weights ("model", ...) are
    those of the checkpoint; None where nobody knows yet, and then nothing is said about the option.
    """
    refused, listed = [], []
    for one in found:
        reason = _reason(one, after, same)
        if reason:
            refused.append(f"{one.name} {shown(one.after)} instead of {shown(one.before)} ({reason})")
        elif reason is not None:
            listed.append(str(one))
    return Verdict(refused, listed)


def _reason(one: Change, after: Mapping[str, Any], same: Callable[[str], bool | None]) -> str | None:
    """Why a change is refused; nothing where it is not; None where that cannot be said yet."""
    rule = RULES[one.name]
    if own := _without_effect(one, after):
        return own
    if rule.verdict in (REFUSED, LISTED):
        return rule.reason if rule.verdict == REFUSED else ""
    kept = [same(what) for what in judged_by(one.name)]
    if False in kept:
        return rule.reason
    return None if None in kept else ""


def _without_effect(one: Change, after: Mapping[str, Any]) -> str:
    """Why this value would change nothing, or cannot go on from the checkpoint's."""
    if one.name == "num_epochs" and after.get("max_steps") is not None:
        return "it would have no effect: max_steps is given"
    if one.name == "momentum" and (not one.before or not one.after):
        return "the checkpoint holds moments with momentum only"
    return ""
