"""A small random model of every causal-LM architecture in the installed transformers: sizes by names of fields, exceptions in a table.

A layer of every kind that the default config has is kept: per-layer lists are cut to the first layer of each combination of their values.
"""

import re
from typing import Any

import torch

VOCABULARY = 200
# The first pattern that matches the whole name of a whole-number field of the default config decides its size.
SIZES: tuple[tuple[str, Any], ...] = (
    (r"(?:decoder_|unpadded_)?vocab_size(?:_per_layer_input)?", VOCABULARY),
    (r"hidden_size|d_model|n_embd|emb_dim|embedding_dim|embedding_size|word_embed_proj_dim|lru_width|attention_hidden_size", 64),
    (r"(?:input_|output_)embedding_size", 64),
    (r"(?:attention|mamba|swa|linear|linear_key|linear_value)_head_dim|head_dim|v_head_dim|kv_channels|d_head|dim_head", 16),
    (r"qk_nope_head_dim", 16),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"kv_lora_rank|q_lora_rank|o_lora_rank|d_rel|gated_norm_rank|laurel_rank|hidden_size_per_layer_input|loop_gate_rank", 8),
    (r"(?:encoder_|decoder_|num_|n_|swa_num_|num_encoder_|num_decoder_)?(?:attention_)?heads?", 4),
    (r"(?:num_|swa_num_)?(?:key_value|kv)_heads|num_query_groups", 2),
    (r"linear_num_(?:key_)?heads", 2),
    (r"linear_num_value_heads", 4),
    (r".*intermediate_size(?:_mlp)?|.*ffn_dim|.*ffn_hidden_size|dff|dim_ff|d_inner|feed_forward_size", 48),
    (r"n_routed_experts|(?:moe_)?num_(?:local_)?experts", 4),
    (r"(?:moe_)?num_experts_per_tok(?:en)?|moe_topk|moe_k", 2),
    (r"n_shared_experts|(?:moe_)?num_shared_experts", 1),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"num_hidden_layers|n_layers?|(?:num_|encoder_|decoder_|num_encoder_|num_decoder_)layers|num_blocks", 3),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(?:source|target)_positions|context_length|model_max_length", 128),
    (r"(?:attention_)?(?:sliding_)?window(?:_size)?|local_attention|keep_window_size", 8),
    (r"index_head_dim", 16),
    (r"index_n_heads", 2),
    (r"index_topk", 8),
    (r"index_block_size", 8),
    (r"(?:ssm_)?state_size|mamba_d_state", 8),
    (r"(?:mamba_dt|time_step)_rank", 4),
    (r"(?:mamba_)?chunk_size", 16),
    (r"type_vocab_size", 2),
    (r"num_nextn_predict_layers", 0),
    (r"initializer_range|init_std", 0.15),
)
# A scale of 1 would hide one that is not applied.
NEUTRAL = (r".*multiplier|.*scaling(?:_factor)?|(?:full_attn|linear_attn|mlp)_(?:alpha|beta)_factor", 0.75)
BOTH_ROPES = {f"{kind}_attention": {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full", "sliding")}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
# Fields whose default tells nothing of their size: null, or of a shape of its own.
OVERRIDES: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 500, "encoder_hash_byte_group_size": [3, 4]},
    "blt_local_decoder": {"hidden_size_global": 64},
    "blt_local_encoder": {"hidden_size_global": 64},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": BOTH_ROPES},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 4},
    },
    "deepseek_v2": EXPERTS,
    "dory": {
        "num_hidden_layers": 6, "n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "dots1": EXPERTS | {"layer_types": ["full_attention"] * 2},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_output_size": 64},
    },
    "dots3_note_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8, "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16, "num_key_value_heads": 4, "head_dim": 24,
    },
    "falcon_h1": {
        "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16,
        "mlp_multipliers": [0.75, 1.5], "ssm_multipliers": [0.5, 0.75, 1.25, 1.5, 2.0],
    },
    "gemma3n_text": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0],
    },
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "hrm_text": {"num_hidden_layers": 1},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "llama4_text": {
        "num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0], "moe_layers": [1, 2], "attention_chunk_size": 8,
        "layer_types": ["chunked_attention", "full_attention"] * 2,
    },
    "longcat_flash": {"num_layers": 2, "num_hidden_layers": 4, "n_routed_experts": 4, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "minimax": {f"{part}_{factor}_factor": 0.75 for part in ("full_attn", "linear_attn", "mlp") for factor in ("alpha", "beta")},
    "ministral": {"head_dim": 16},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 8, "n_groups": 2},
    "phi4_multimodal": {
        "vision_config": {"num_hidden_layers": 1, "hidden_size": 16, "image_size": 56, "crop_size": 56, "patch_size": 14},
        "audio_config": {
            "num_blocks": 1, "hidden_size": 16, "nemo_conv_channels": 8, "ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16,
        },
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2,
        "ple_layer_ids": [1], "ple_embed_dim": 16, "ngram_vocab_size_base": 50, "heads_per_ngram": 2, "split_ngram_parts": 2,
        "hc_lowrank": 8, "eos_token_id": 2,
    },
    "reformer": {
        "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [32, 32], "num_buckets": 4, "hash_seed": 0,
        "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8,
    },
    "roc_bert": {"pronunciation_embed_dim": 16, "pronunciation_vocab_size": 50, "shape_embed_dim": 16, "shape_vocab_size": 50},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3],
        "attention_head_dim": 32, "mamba_headdim": 16, "attention_hidden_size": 128, "adapter_rank": 8,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip


# What has no language model that can be built here: why.
ABSENT = {
    "gemma3n": "its vision tower is a model of the package timm, which is not installed; gemma3n_text is its language model",
    "gemma4_assistant": "a draft model, which reads the keys and values of the model that it drafts for",
    "gemma4_unified_assistant": "a draft model, which reads the keys and values of the model that it drafts for",
    "musicgen": "AutoModelForCausalLM does not build it from its config: it continues codes of sound that a text encoder conditions",
    "musicgen_melody": "AutoModelForCausalLM does not build it from its config: it continues codes of sound that a text encoder conditions",
}


def model_types() -> list[str]:
    """The values of `model_type` that AutoModelForCausalLM of the installed transformers knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny(model_type: str) -> Any:
    """The small config of an architecture."""
    from transformers import CONFIG_MAPPING

    own = OVERRIDES.get(model_type, {})
    kind = CONFIG_MAPPING[model_type]
    return kind(**small_sizes(kind, own))


def small_sizes(kind: type, own: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the small config: the sizes by name, one layer of each kind, then the architecture's own exceptions."""
    defaults = kind().to_dict()
    numbers = {name: value for name, value in defaults.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    sizes = {name: small for name, value in numbers.items() if (small := _small(name)) is not None and value}
    nested = {name: _part(part, defaults[name], own.get(name, {})) for name, part in parts(kind, defaults).items()}
    sizes |= {
        name: NEUTRAL[1] for name, value in numbers.items() if isinstance(value, float) and value == 1 and re.fullmatch(NEUTRAL[0], name)
    }
    sizes |= {"is_decoder": True} if "is_decoder" in defaults else {}
    return sizes | _special_ids(defaults) | _latent(defaults) | _layers(defaults) | nested | _outer(own, nested)


def parts(kind: type, defaults: dict[str, Any]) -> dict[str, type]:
    """The config classes of the parts of an architecture, by the name of the field."""
    from transformers import CONFIG_MAPPING

    return {
        name: part if hasattr(part, "sub_configs") else CONFIG_MAPPING[defaults[name]["model_type"]]
        for name, part in getattr(kind, "sub_configs", {}).items()
        if defaults.get(name)
    }


def _part(kind: type, default: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    model_type = default.get("model_type", "")
    return small_sizes(kind, OVERRIDES.get(model_type, {}) | own) | ({"model_type": model_type} if model_type else {})


def _outer(own: dict[str, Any], nested: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in own.items() if name not in nested}


def _special_ids(defaults: dict[str, Any]) -> dict[str, Any]:
    """Every special id that has a default inside the small vocabulary."""
    names = [name for name, value in defaults.items() if name.endswith(("_token_id", "_token_index")) and value is not None]
    return {name: [i] if isinstance(defaults[name], list) else i for i, name in enumerate(names)}


def _latent(defaults: dict[str, Any]) -> dict[str, Any]:
    """Of latent attention: as many key and value heads as query heads, and a head of the rotated part alone where the default is one."""
    if "kv_lora_rank" not in defaults:
        return {}
    rotated = defaults.get("head_dim") == defaults.get("qk_rope_head_dim")
    return {"num_key_value_heads": 4} | ({"head_dim": 8} if rotated else {}) | ({"qk_head_dim": 24} if "qk_head_dim" in defaults else {})


def _small(name: str) -> Any:
    return next((value for pattern, value in SIZES if re.fullmatch(pattern, name)), None)


def _layers(defaults: dict[str, Any]) -> dict[str, Any]:
    """Per-layer lists with the first layer of each combination of their values, at least two layers."""
    count = defaults.get("num_hidden_layers") or 0
    lists = {name: value for name, value in defaults.items() if isinstance(value, list) and len(value) == count > 2}
    if not lists:
        return {}
    rows = list(zip(*lists.values(), strict=True))
    rows = list(dict.fromkeys(rows)) if len(set(rows)) > 1 else rows[:2]
    return {name: [row[i] for row in rows] for i, name in enumerate(lists)} | {"num_hidden_layers": len(rows)}


def build(model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, config: Any = None) -> Any:
    """A random model of the architecture in evaluation mode, with eager attention; no leaf starts neutral, which would hide one unused.

    config: another one than the small config of the architecture.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or tiny(model_type), attn_implementation="eager").eval()
    with torch.no_grad():
        for leaf in model.parameters():
            if leaf.numel() > 1 and bool((leaf == leaf.flatten()[0]).all()):
                leaf.add_(0.1 * torch.randn(leaf.shape))
    return model.to(dtype)


def save(model_type: str, folder: Any) -> None:
    """Write the folder of a small model, under the config of its `model_type` where AutoModelForCausalLM takes a part of it."""
    model = build(model_type)
    model.save_pretrained(folder)
    if model.config.model_type not in model_types():
        tiny(model_type).save_pretrained(folder)
