"""Names that users write for others: what other tools call an option or a command, and slips of the keyboard. Imports no torch.

Suggestions come from the table first. Distance alone suggests only what differs in a letter or two: `pretraining_dataset` is not near
`learning_rate`.
"""

import difflib
import re
from collections.abc import Collection, Iterable

ROWS = "quant: int8 holds weights only, all of them in 8 bits; leave it out"
QUANTISED = "weights that other tools have quantised so are not read; take the unquantised model, and quant: nf4"
TRACKED = "each tracker has its own: use_wandb, use_tensorboard, use_mlflow, use_comet, use_trackio, use_swanlab; without them none is told"
ALWAYS = "it is always so here; leave it out"
LORA = "adapter: lora (the default) or none"
ANSWERS = "answers alone are trained, with any template; leave it out, or train all with train_on_inputs"
SHARES = "a file has the weight of each entry of datasets"
COMMANDS_OF = {
    "finetune": "sft", "fine-tune": "sft", "fine_tune": "sft", "instruct": "sft", "lora": "sft", "qlora": "sft",
    "full": "sft --adapter none",
    "evaluate": "eval", "evaluation": "eval", "test": "eval", "lm_eval": "lm-eval", "benchmark": "lm-eval", "harness": "lm-eval",
    "inference": "generate", "infer": "generate", "predict": "generate", "run": "generate, or sft to train", "sample": "generate",
    "complete": "generate", "export": "merge", "merge-lora": "merge", "merge_lora": "merge", "merge_and_unload": "merge",
    "merge-sharded-fsdp-weights": "merge", "download": "fetch", "pull": "fetch", "get": "fetch", "ppo": "grpo", "rl": "grpo",
    "rlhf": "grpo", "rloo": "grpo --loss rloo", "dapo": "grpo --loss dapo", "gspo": "grpo --loss gspo", "ipo": "dpo --loss ipo",
    "pt": "pretrain", "continued-pretrain": "pretrain", "cpt": "pretrain", "rm": "reward", "orm": "reward", "reward-model": "reward",
    "vllm": "serve", "vllm-serve": "serve", "vllm_serve": "serve", "api": "serve", "env": "info",
    "diagnose": "doctor", "debug": "doctor", "health": "doctor",
    "status": "runs", "list": "runs", "ls": "runs", "history": "runs",
    "verify": "check", "validate": "check", "certify": "check", "compare": "runs for runs, or check for a model",
    "show": "info, or preprocess for rows", "prepare": "preprocess", "tokenize": "preprocess", "data": "preprocess",
}  # fmt: skip
# What axolotl, TRL, LLaMA-Factory, Unsloth and PEFT call our options: a name of ours, or what to do instead.
OPTIONS = {
    "base_model": "model", "model_name": "model", "model_name_or_path": "model", "model_id": "model", "pretrained_model": "model",
    "model_path": "model", "checkpoint": "model", "base_model_config": "model", "revision_of_model": "revision",
    "model_revision": "revision", "torch_dtype": "dtype", "precision": "dtype",
    "bf16": "dtype: bfloat16", "bfloat16": "dtype: bfloat16", "fp32": "dtype: float32", "float32": "dtype: float32",
    "fp16": "dtype: float16", "float16": "dtype: float16",
    "lr": "learning_rate", "lr_scheduler_type": "lr_scheduler", "scheduler": "lr_scheduler", "optim": "optimizer",
    "optimizer_type": "optimizer", "epochs": "num_epochs", "epoch": "num_epochs", "num_train_epochs": "num_epochs",
    "n_epochs": "num_epochs", "steps": "max_steps", "num_steps": "max_steps", "max_train_steps": "max_steps", "total_steps": "max_steps",
    "iterations": "max_steps", "iters": "max_steps", "warmup": "warmup_steps", "batch_size": "micro_batch_size",
    "per_device_train_batch_size": "micro_batch_size", "train_batch_size": "micro_batch_size", "bs": "micro_batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps", "grad_accum": "gradient_accumulation_steps",
    "accumulation_steps": "gradient_accumulation_steps", "grad_accumulation_steps": "gradient_accumulation_steps",
    "activation_checkpointing": "gradient_checkpointing", "use_gradient_checkpointing": "gradient_checkpointing",
    "offload_activations": "activation_offloading", "activation_offload": "activation_offloading",
    "offload_layers": "layer_offloading", "offload_params": "layer_offloading", "cpu_offload": "layer_offloading",
    "fsdp_offload_params": "layer_offloading", "offload_param": "layer_offloading", "offload_optimizer": "optim_args: {paged: true}",
    "grad_clip": "max_grad_norm", "gradient_clipping": "max_grad_norm", "clip_grad_norm": "max_grad_norm", "max_norm": "max_grad_norm",
    "beta1": "adam_beta1", "beta2": "adam_beta2", "eps": "adam_epsilon", "wd": "weight_decay",
    "bf16_stochastic_round": "master_dtype: bfloat16", "pure_bf16": "master_dtype: bfloat16", "bf16_full": "master_dtype: bfloat16",
    "random_seed": "seed", "random_state": "seed",
    "max_seq_length": "sequence_len", "max_seq_len": "sequence_len", "seq_len": "sequence_len", "sequence_length": "sequence_len",
    "cutoff_len": "sequence_len", "max_length": "sequence_len", "context_len": "sequence_len", "block_size": "sequence_len",
    "model_max_length": "sequence_len", "seq_length": "sequence_len", "packing": "sample_packing", "pad_to_sequence_len": ALWAYS,
    "lora_rank": "lora_r", "rank": "lora_r", "r": "lora_r", "lora_target": "lora_target_modules", "target_modules": "lora_target_modules",
    "lora_target_linear": "lora_target_modules: all-linear, which is the default", "use_rslora": "lora_rslora",
    "peft_use_rslora": "lora_rslora", "modules_to_save": "lora_modules_to_save", "additional_target": "lora_modules_to_save",
    "peft_layers_to_transform": "lora_layers", "layers_to_transform": "lora_layers", "adapter_name_or_path": "lora_model_dir",
    "lora_path": "lora_model_dir", "adapter_path": "lora_model_dir", "finetuning_type": LORA,
    "use_peft": LORA, "use_lora": LORA, "peft": LORA,
    "fp8": "quant: fp8, with fp8_products: true for products in float8",
    "load_in_4bit": "quant: nf4", "load_in_8bit": "quant: int8", "qlora": "adapter: qlora", "quantization": "quant",
    "quantization_bit": "quant", "bnb_4bit_quant_type": "quant", "bnb_config_kwargs": "quant: nf4, with quant_double",
    "quantize": "quant", "bits": "quant", "load_in_fp8": "quant: fp8",
    "bnb_4bit_use_double_quant": "quant_double", "bnb_4bit_compute_dtype": "dtype", "bnb_4bit_quant_storage": "quant",
    "use_dora": "lora_dora", "peft_use_dora": "lora_dora", "peft_init_lora_weights": "lora_init", "init_lora_weights": "lora_init",
    "rank_pattern": "lora_rank_pattern", "alpha_pattern": "lora_alpha_pattern", "pissa_init": "lora_init: pissa",
    "corda_config": "lora_init: corda",
    "neftune_alpha": "neftune_noise_alpha", "label_smoothing_factor": "label_smoothing",
    "dataset": "data", "train_file": "data", "training_data": "data", "train_data": "data", "data_path": "data", "dataset_name": "data",
    "dataset_path": "data", "train_dataset": "data", "files": "data", "file": "data", "pretraining_dataset": "data",
    "eval_data": "val_data", "eval_dataset": "val_data", "validation_data": "val_data", "val_file": "val_data", "eval_file": "val_data",
    "test_data": "val_data", "val_size": "val_set_size", "eval_split": "val_set_size", "test_size": "val_set_size",
    "dataset_text_field": "text_column", "max_samples": "max_rows", "max_train_samples": "max_rows", "limit": "max_rows",
    "template": "chat_template", "chat_template_jinja": "chat_template", "conversation": "chat_template",
    "system": "default_system_message", "system_prompt": "default_system_message", "default_system": "default_system_message",
    "train_on_prompt": "train_on_inputs", "train_on_input": "train_on_inputs", "dataset_num_proc": "dataset_processes",
    "preprocessing_num_workers": "dataset_processes", "num_proc": "dataset_processes",
    "resize_token_embeddings_to_32x": "embedding_multiple: 32",
    "added_tokens": "tokens", "add_tokens": "tokens", "new_special_tokens": "tokens", "pad_token": "special_tokens: {pad_token: ...}",
    "output": "output_dir", "out": "output_dir", "out_dir": "output_dir", "save_dir": "output_dir", "output_path": "output_dir",
    "run_dir": "output_dir", "overwrite_output_dir": "overwrite", "resume_from_checkpoint": "resume",
    "auto_resume_from_checkpoints": "resume: auto", "eval_every": "eval_steps",
    "eval_strategy": "eval_steps, or evals_per_epoch: 0 for no", "evaluation_strategy": "eval_steps, or evals_per_epoch: 0 for no",
    "save_every": "save_steps", "save_strategy": "save_steps, or saves_per_epoch: 0 for no",
    "log_every": "logging_steps", "patience": "early_stopping_patience",
    "max_checkpoints": "save_total_limit", "keep_checkpoints": "save_total_limit", "eval_table_max_new_tokens": "eval_max_new_tokens",
    "fsdp": "sharding: full", "fsdp_config": "sharding: full", "deepspeed": "sharding: full", "zero": "sharding: full",
    "tensor_parallel_size": "shard: tensor=N", "tp": "shard: tensor=N",
    "context_parallel_size": "shard: context=N", "sequence_parallel_degree": "shard: context=N", "dp_shard_size": "shard: data=N",
    "dp_replicate_size": "shard: replicate=N", "hsdp": "shard: replicate=N", "mesh": "shard",
    "fsdp_version": "sharding: full", "ddp": "nproc, with sharding: none",
    "num_processes": "nproc", "nproc_per_node": "nproc", "num_gpus": "nproc", "num_machines": "nnodes", "rdzv_endpoint": "rendezvous",
    "max_restarts": "restarts",
    "rl_beta": "beta", "beta": "rl_beta", "loss_type": "loss", "pref_loss": "loss", "dpo_beta": "rl_beta", "pref_beta": "rl_beta",
    "dpo_label_smoothing_factor": "dpo_label_smoothing",
    "reference_model": "ref_model", "ref_model_name_or_path": "ref_model", "reward_model": "reward_funcs", "rewards": "reward_funcs",
    "reward_function": "reward_funcs", "reward_func": "reward_funcs", "num_completions": "num_generations", "group_size": "num_generations",
    "max_prompt_length": "max_prompt_len", "max_response_length": "max_completion_length", "kl_coef": "beta",
    "scale_rewards": "advantage: group_scaled or centered", "multi_objective_aggregation": "advantage: gdpo",
    "gpu_memory_utilization": "vllm_gpu_memory_utilization", "max_model_len": "vllm_max_model_len", "max_tokens": "max_new_tokens",
    "max_length_new": "max_new_tokens", "n": "num_samples", "num_return_sequences": "num_samples",
    "num_beams": "num_samples, as beams are not searched",
    "add_new_tokens": "tokens", "eos_token": "special_tokens: {eos_token: ...}", "buffer_size": "streaming_multipack_buffer_size",
    "truncation_mode": "overlong", "tokenized_path": "dataset_prepared_path", "neat_packing": "sample_packing", "dataset_dir": "data",
    "dataset_train_split": "split", "early_stopping_steps": "early_stopping_patience", "logging_strategy": "logging_steps",
    "predict_with_generate": "eval_table_size, or eval_causal_lm_metrics for scores",
    "compute_metrics": "eval_causal_lm_metrics, or eval_reward_funcs for functions", "use_dft_loss": "loss: dft",
    "use_muon": "optimizer: muon", "use_apollo": "optimizer: apollo_adamw", "use_galore": "optimizer: galore_adamw",
    "peft_config": LORA, "full_finetuning": "adapter: none", "loftq_config": "lora_init: loftq",
    "qat_scheme": "qat", "use_unsloth_gc": "gradient_checkpointing: offload",
    "disable_gradient_checkpointing": "gradient_checkpointing: none", "model_init_kwargs": "dtype", "ddp_timeout": "rank_timeout",
    "fast_inference": "use_vllm",
    "pref_ftx": "rpo_alpha", "kto_chosen_weight": "kto_desirable_weight", "kto_rejected_weight": "kto_undesirable_weight",
    "push_to_hub": "hub_model_id", "export_hub_model_id": "hub_model_id",
    "do_sample": "temperature, 0 of which takes the likeliest token",
}  # fmt: skip
ADVICE = {
    "rl": "it is the command here: treetune dpo, kto, grpo, ...", "stage": "it is the command here: treetune sft, dpo, reward, ...",
    "trl": "write its keys at the top level", "ebft": "write its keys at the top level",
    "vllm": "write its keys at the top level, with vllm_ before them",
    "gptq": QUANTISED, "llm_int8_has_fp16_weight": ROWS, "llm_int8_threshold": ROWS, "llm_int8_skip_modules": ROWS,
    "lora_on_cpu": "treetune merge computes on the CPU; leave it out",
    "report_to": TRACKED,
    "run_name": "output_dir names a run; wandb_name, mlflow_run_name and others name it in trackers",
    "push_to_hub_merged": "treetune merge RUN FOLDER, then treetune push RUN REPO --merged FOLDER",
    "save_pretrained_merged": "treetune merge RUN FOLDER", "merge_and_unload": "treetune merge RUN FOLDER",
    "save_pretrained_gguf": "treetune export RUN FOLDER --gguf q8_0",
    "assistant_only_loss": ANSWERS, "completion_only_loss": ANSWERS, "train_on_responses_only": ANSWERS,
    "mix_strategy": SHARES, "interleave_probs": SHARES, "interleave_datasets": SHARES,
    "padding_free": ALWAYS, "enable_liger_kernel": ALWAYS, "use_cache": ALWAYS, "lora_task_type": ALWAYS,
    "plot_loss": "report.html has the curves; leave it out", "dataloader_num_workers": "leave it out",
    "preprocessing_num_workers": "leave it out; treetune preprocess has dataset_processes",
    "trust_remote_code": "code of a model is never run; leave it out", "device_map": "torchrun places processes; leave it out",
    "flash_attention": ALWAYS, "flash_attn": ALWAYS, "sdp_attention": ALWAYS, "xformers_attention": ALWAYS, "flex_attention": ALWAYS,
    "attn_implementation": ALWAYS, "group_by_length": "documents are packed; leave it out", "remove_unused_columns": ALWAYS,
    "gradient_checkpointing_kwargs": ALWAYS, "strict": ALWAYS, "special_tokens_map": "special_tokens: {pad_token: ...}",
    "model_type": "it is read from the model's config.json", "tokenizer_type": "it is read from the model", "do_train": ALWAYS,
    "do_eval": ALWAYS,
    "liger": ALWAYS, "use_liger_kernel": ALWAYS, "torch_compile": "it is not supported yet; leave it out",
    "plugins": "there are none; leave it out",
    "verbose": "leave it out", "quiet": "leave it out", "workers": "leave it out", "num_workers": "leave it out",
}  # fmt: skip
# Values of options in other tools.
CHOICES = {
    "dora": "lora with lora_dora", "full": "none", "adam": "adamw", "sigmoid": "dpo",
    "adam_8bit": "adamw_8bit", "adam8bit": "adamw_8bit", "adamw8bit": "adamw_8bit", "prodigy": "it is not supported yet: use adamw",
    "bf16": "bfloat16", "fp32": "float32", "fp16": "float16", "gpu": "cuda",
    "constant_with_warmup": "constant", "cosine_warmup_with_min_lr": "cosine_with_min_lr", "onecycle": "one_cycle",
    "log_sweep": "it is not supported yet: use a function of your own",
    "reduce_lr_on_plateau": "it is not supported yet: use early_stopping_patience",
}  # fmt: skip
# Steps that may be parts of a run elsewhere.
PARTS = {"warmup_steps": "warmup_ratio", "eval_steps": "evals_per_epoch", "save_steps": "saves_per_epoch"}
LLAMA_CPP = "export f16, then llama.cpp's llama-quantize MODEL-f16.gguf MODEL.gguf "
CUTOFF = 0.8


def nearest(word: str, candidates: Collection[str]) -> str:
    """ " (did you mean X?)" for a known word that differs in a letter or two, or in their order, or nothing when none does."""
    swapped = [known for known in candidates if sorted(known) == sorted(word)]
    match = swapped or difflib.get_close_matches(word, list(candidates), n=1, cutoff=CUTOFF)
    return f" (did you mean {match[0]}?)" if match else ""


def of_command(word: str, commands: Collection[str]) -> str:
    """The suggestion for an unknown command."""
    meant = COMMANDS_OF.get(word.lower())
    return f" (did you mean {meant}?)" if meant else nearest(word.lower(), commands)


def of_choice(word: str, choices: Collection[str]) -> str:
    """The suggestion for a word that is none of an option's choices."""
    if word.lower() in CHOICES:
        meant = CHOICES[word.lower()]
        return f" (did you mean {meant}?)" if meant in choices else f" ({meant})" if " " in meant else ""
    if "q8_0" in choices and re.fullmatch(r"i?q[1-8]_\w+|tq[12]_0", word.lower()):
        return f" ({LLAMA_CPP}{word.upper()})"
    return nearest(word, choices)


def of_option(word: str, names: Collection[str], flags: bool = False) -> str:
    """The suggestion for an unknown option of a command that has the options `names`, as flags or as keys of a file."""
    bare = word.lower().replace("-", "_")
    meant = OPTIONS.get(bare, "")
    head = meant.partition(":")[0].partition(",")[0]
    if meant and head.partition(" ")[0] in names:
        return f" (did you mean {_flagged(meant, names) if flags else meant}?)"
    if bare in ADVICE:
        return f" ({_flagged(ADVICE[bare], names) if flags else ADVICE[bare]})"
    if bare in names:
        return f" (did you mean {_flagged(bare, (bare,)) if flags else bare}?)"
    match = difflib.get_close_matches(bare, list(names), n=1, cutoff=CUTOFF)
    return "" if not match else f" (did you mean {_flagged(match[0], match) if flags else match[0]}?)"


def _flagged(meant: str, names: Collection[str]) -> str:
    """What is meant as flags: the name that it begins with, and names behind it that can be nothing else."""

    def flag(found: re.Match) -> str:
        name, colon = found.groups()
        known = name in names and ("_" in name or colon or found.start() == 0)
        return f"--{name.replace('_', '-')}{colon[1:]}" if known else found.group()

    return re.sub(r"\b([a-z]\w*)(: |)", flag, meant)


def of_part(name: str, text: str, flags: bool = False) -> str:
    """The suggestion for a number of steps below 1, which is a part of the run in TRL."""
    meant = PARTS.get(name) if re.fullmatch(r"0?\.\d+", text) and float(text) > 0 else None
    return f" (did you mean {_flagged(meant, (meant,)) if flags else meant}?)" if meant else ""


def all_of(words: Iterable[str], names: Collection[str]) -> str:
    """Unknown keys in one line, each with its suggestion."""
    listed = [f"{word!r}{of_option(word, names)}" for word in words]
    return f"unknown key{'s' * (len(listed) > 1)} {', '.join(listed)}"
