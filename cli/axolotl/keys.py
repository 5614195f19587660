"""The keys of axolotl's files that are not options of ours: another name, nothing to do here, or not there. Imports no torch.

A key that no table names is the option of the same name.
"""

from collections.abc import Mapping

RENAMED: Mapping[str, str] = {
    "base_model": "model", "revision_of_model": "revision", "torch_dtype": "dtype", "loss_type": "loss", "resume_from_checkpoint": "resume",
    "peft_layers_to_transform": "lora_layers", "peft_use_rslora": "lora_rslora", "peft_use_dora": "lora_dora",
    "peft_init_lora_weights": "lora_init", "jagged_restart_warmup_steps": "relora_warmup_steps",
    "jagged_restart_anneal_steps": "relora_anneal_steps", "shuffle_merged_datasets": "shuffle",
    "activation_checkpointing": "gradient_checkpointing", "conversation": "chat_template",
    "max_prompt_length": "max_prompt_len", "loraplus_lr_embedding": "embedding_lr", "model_revision": "revision",
    "dpo_beta": "rl_beta", "noisy_embedding_alpha": "neftune_noise_alpha", "exact_deduplication": "dataset_exact_deduplication",
    "dpo_loss_weights": "loss_weights", "precompute_ref_log_probs": "precompute_ref_logps",
    "pretrain_multipack_buffer_size": "streaming_multipack_buffer_size",
}  # fmt: skip

KERNELS = "how it is computed, which our own operators decide"
TRAINER = "how another trainer is set up"
PLACING = "where processes and weights are placed, which --sharding and torchrun decide"


def _each(reason: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


# Keys that need nothing here, whatever their value, and why.
NOTHING: Mapping[str, str] = {
    **_each("the architecture is read from config.json, and code of a model is never run", "model_type trust_remote_code"),
    **_each("preprocess prints documents", "debug"),
    **_each("what ends a turn is read from the chat template", "eot_tokens"),
    **_each("only the text model trains, which is all that a file of it asks for", "freeze_mm_modules is_multimodal"),
    **_each("new rows are the mean of the old ones", "mean_resizing_embeddings"),
    **_each("treetune merge says how adapters are merged", "merge_lora merge_method"),
    **_each(
        "treetune chat says how a page is served",
        "gradio_title gradio_share gradio_server_name gradio_server_port gradio_max_new_tokens gradio_temperature",
    ),
    **_each(
        KERNELS,
        """
        flash_attention sdp_attention xformers_attention flex_attention eager_attention attn_implementation attn_needs_dtype_cast
        flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_qkv flash_attn_fuse_mlp flex_attn_compile_kwargs flash_optimum
        liger_rope liger_rms_norm liger_rms_norm_gated liger_layer_norm liger_swiglu liger_glu_activation liger_cross_entropy
        liger_fused_linear_cross_entropy liger_use_token_scaling use_liger_loss use_liger_kernel lora_mlp_kernel lora_qkv_kernel
        lora_o_kernel lora_embedding_kernel use_kernels attention sage_attention fused_attn_kernel gemma4_hybrid_attn_impl
        gemma4_fused_norm_rope deepcompile embeddings_skip_upcast dft_chunk_size use_scattermoe use_sonicmoe experts_implementation
        torch_compile_backend torch_compile_mode cut_cross_entropy chunked_cross_entropy chunked_cross_entropy_num_chunks
        use_onebitllms tiled_mlp tiled_mlp_num_shards tiled_mlp_use_original_mlp unsloth_cross_entropy_loss unsloth_lora_mlp
        unsloth_lora_qkv unsloth_lora_o unsloth_rms_norm unsloth_rope dpo_use_logits_to_keep dpo_padding_free torchao_kernels
        """,
    ),
    **_each(
        TRAINER,
        """
        gradient_checkpointing_kwargs use_reentrant strict remove_unused_columns skip_prepare_dataset vllm_lora_sync
        use_data_producer replay_recompute_logps pad_to_sequence_len pad_to_multiple_of eval_sample_packing group_by_length
        lora_fan_in_fan_out lora_on_cpu relora_cpu_offload batch_flattening dataset_keep_in_memory pretrain_multipack_attn
        pretrain_multipack_buffer_size pretraining_sample_concatenation sample_packing_bin_size sample_packing_eff_est
        sample_packing_group_size sample_packing_sequentially sample_packing_drop_attention_mask multipack_real_batches
        save_safetensors total_num_tokens total_supervised_tokens include_tokens_per_second include_tkps dataloader_pin_memory
        dataloader_num_workers dataloader_prefetch_factor dataloader_drop_last dataset_processes dataset_num_proc gc_steps
        auto_find_batch_size peft_autocast_adapter_dtype save_only_model logging_dir logging_strategy do_train do_eval is_preprocess
        bf16_full_eval serve_module worker_extension_cls prediction_loss_only is_llama_derived_model is_mistral_derived_model
        is_falcon_derived_model is_qwen_derived_model num_labels processor_type tokenizer_type tokenizer_use_fast tokenizer_legacy
        tokenizer_use_mistral_common base_model_ignore_patterns torchdistx_path timeout_preprocess hf_use_auth_token
        axolotl_config_path low_cpu_mem_usage cpu_ram_efficient_loading cls_model_config accelerator_config
        experimental_skip_move_to_device qlora_sharded_model_loading preprocess_iterable sample_packing_mp_start_method
        num_dataset_shards_to_save tokenizer_save_jinja_files eos_token_id bos_token_id pad_token_id
        """,
    ),
    **_each(
        PLACING,
        """
        ray_run_name local_rank world_size device device_map ddp ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters
        max_memory gpu_memory_limit heads_k_stride ring_attn_func
        fsdp_transformer_layer_cls_to_wrap fsdp_auto_wrap_policy fsdp_state_dict_type
        fsdp_final_state_dict_type
        """,
    ),
}

CLOUD = "start the command on that machine"
# Keys that are not there yet, and the nearest thing that is; false, null and empty values ask for nothing.
MISSING: Mapping[str, str] = {
    "push_dataset_to_hub": "treetune preprocess FILE, which uploads what a run would read, and takes the key",
    "push_to_hub": "hub_model_id, which names the repository",
    **_each(CLOUD, "cloud provider docker_tag volumes mount secrets gpu gpu_count branch env memory"),
    **_each("nproc and nnodes, as many devices as there are workers", "resources_per_worker"),
    **_each(
        "reward_funcs and rollout_func take functions of your own, which may ask a server",
        """
        nemo_gym_enabled nemo_gym_dir nemo_gym_auto_start nemo_gym_head_port nemo_gym_datasets nemo_gym_multi_turn
        nemo_gym_verify_timeout nemo_gym_run_timeout
        """,
    ),
    **_each("treetune lm-eval --model", "lm_eval_model"),
    **_each(
        "observer: FILE.py:FUNCTION, or use_tensorboard", "use_otel_metrics otel_metrics_host otel_metrics_port"
    ),
    **_each(
        "loss: FILE.py:FUNCTION, which may ask another model",
        """
        kd_ce_alpha kd_alpha kd_temperature kd_beta kd_normalize_topk kd_online_server_base_url kd_online_topk kd_online_server
        kd_online_server_model kd_online_timeout kd_online_max_new_tokens kd_temperature_min gkd_trainer gkd_teacher gkd_lmbda gkd_beta
        gkd_temperature gkd_max_new_tokens
        """,
    ),
    **_each("unfrozen_parameters", "lisa_n_layers lisa_step_interval lisa_layers_attribute spectrum_model_name"),
    **_each("optimizer: FILE.py:FUNCTION", "dion_lr dion_momentum dion_rank_fraction dion_rank_multiple_of grokfast_alpha grokfast_lamb"),
    **_each("adamw, whose betas and epsilon are adam_beta1, adam_beta2 and adam_epsilon", "adam_beta3 adam_epsilon2"),
    **_each("rows of sequence_len", "use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks eval_sequence_len"),
    **_each("sample_prompt", "generate_samples num_generation_samples generation_max_new_tokens generation_temperature"),
    **_each("lora_target_modules", "peft_layers_pattern peft_layer_replication"),
    **_each("lora_modules_to_save: embed_tokens", "peft_trainable_token_indices fix_untrained_tokens"),
    **_each(
        "sample_prompt, log_completions and metrics.jsonl, which say what SwanLab gets",
        """
        swanlab_log_completions swanlab_completion_log_interval swanlab_completion_max_buffer swanlab_log_model
        swanlab_web_host swanlab_api_host swanlab_lark_webhook_url swanlab_lark_secret
        """,
    ),
    **_each("qat, or quant with an adapter", "nvfp4_training nvfp4_merge_aware fp8_enable_fsdp_float8_all_gather"),
    **_each("text alone, which trains", "image_size image_resize_algorithm processor_kwargs"),
    **_each("treetune eval", "bench_dataset bench_split"),
    **_each("rl_beta and loss, which dpo has", "dpo_generate_during_eval dpo_norm_loss"),
    **_each("code of your own as loss, optimizer or observer: FILE.py:FUNCTION", "trainer_cls scaling_softmax scaling_softmax_factor"),
    "load_best_model_at_end": "best.json in the run folder, which names the best checkpoint", "save_first_step": "save_steps: 1",
    "min_sample_len": "rows that are chosen beforehand", "max_packed_sequence_len": "sequence_len with sample_packing",
    "shrink_embeddings": "the rows that the model has", "added_tokens_overrides": "tokens, which adds them",
    "shuffle_before_merging_datasets": "shuffle_merged_datasets: true", "llama4_linearized_experts": "the model's own files",
    "peft_ensure_weight_tying": "adapters of modules that are not tied", "relora_prune_method": "relora_prune_ratio alone",
    "rope_scaling": "rope_scaling in the model's config.json", "base_model_config": "the config.json beside the weights",
    "gptq": "the unquantised model with quant: nf4", "s2_attention": "longer documents fit with gradient_checkpointing",
    "normalize_weight_scales": "model: a folder whose weights you have scaled", "optim_target_modules": "optim_args",
    "vllm_enable_sleep_mode": "vllm_mode: managed", "do_bench_eval": "treetune eval",
    "llmcompressor": "qat, and treetune quantize", "spectrum_top_fraction": "unfrozen_parameters", "kd_trainer": "loss: FILE.py:FUNCTION",
    "diffusion": "loss: FILE.py:FUNCTION", "special_tokens_map": "special_tokens", "dynamic_checkpoint": "Ctrl-C saves a checkpoint",
    "fp8": "quant: fp8 with fp8_products, beside an adapter", "quantization": "treetune quantize MODEL OUTPUT --quant int4",
}  # fmt: skip

# Plugins that are kernels, or whose keys say it all; any other is missing.
PLUGINS = ("cut_cross_entropy", "liger", "kernels", "swanlab", "lm_eval", "expert_parallel", "DFTPlugin")
OPTIMIZERS: Mapping[str, str] = {"lion_pytorch": "lion", "optimi_adamw": "adamw", "adamw_torch_npu_fused": "adamw",
                                 "galore_adamw_layerwise": "galore_adamw", "galore_adamw_8bit_layerwise": "galore_adamw_8bit",
                                 "apollo_adamw_layerwise": "apollo_adamw", "ao_adamw_4bit": "adamw_4bit",
                                 "ao_adamw_8bit": "adamw_8bit", "ao_adamw_fp8": "adamw_fp8"}  # fmt: skip
# Keys that are kernels by their first letters, whatever comes behind.
KERNEL_STARTS = ("liger_", "torch_compile", "cut_cross_entropy", "flash_attn_", "unsloth_")
# What makes a file one of axolotl's; ours have none of these.
MARKS = frozenset(
    {"base_model", "rl", "trl", "ebft", "vllm", "bf16", "fp16", "pretraining_dataset", "reward_model", "process_reward_model", "deepspeed",
     "fsdp", "fsdp_config", "load_in_4bit", "load_in_8bit", "plugins", "lora_target_linear"}
    | (NOTHING.keys() - {"device", "dataset_processes"})
)  # fmt: skip


def is_needless(key: str) -> bool:
    """Whether a key needs nothing here, whatever its value."""
    return key in NOTHING or key.startswith(KERNEL_STARTS)
