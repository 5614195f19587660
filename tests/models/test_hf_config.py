"""config.json field by field: what is computed equals transformers, what is not known is refused by name, wrong types are one line."""

import json

import pytest
import torch

from treetune.models import dense, hf

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG3 = {"rope_theta": 1e3, "short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 4.0, 6.0]}
YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 32, "attention_factor": 1.1}
LONG = {"rope_type": "longrope", "rope_theta": 1e3, "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 4.0, 6.0, 8.0]}


@pytest.fixture
def edited(oracle, tmp_path):
    """edited(kind, fields) -> a folder with the weights of a tiny model and these fields in its config.json; ... removes a field."""

    def make(kind: str, changes: dict):
        source = oracle(kind)[1]
        config = json.loads((source / "config.json").read_text()) | changes
        (tmp_path / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
        if not (tmp_path / hf.SINGLE).exists():
            (tmp_path / hf.SINGLE).symlink_to(source / hf.SINGLE)
        return tmp_path

    return make


def expected_logits(path, ids):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids[None]).logits[0]


ACCEPTED = [
    ("llama", {"rope_theta": 500.0, "rope_parameters": ...}),
    ("llama", {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}, "rope_theta": 7.0}),
    ("llama", {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}),
    ("llama", {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}, "rope_parameters": ..., "rope_theta": 1000}),
    ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 1000.0}}),
    ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 1e3, "original_max_position_embeddings": 64}, "max_position_embeddings": 128}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}}),
    ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}, "original_max_position_embeddings": 16}),
    ("mistral", {"rope_parameters": LONG | {"original_max_position_embeddings": 48}}),
    ("mistral", {"rope_parameters": LONG | {"original_max_position_embeddings": 47}}),
    ("llama", {"num_key_value_heads": 2, "rms_norm_eps": 0.1}),
    ("llama", {"rms_norm_eps": ...}),
    ("llama", {"hidden_act": "swish"}),
    ("llama", {"head_dim": ...}),
    ("llama", {"head_dim": None, "pretraining_tp": 2, "attention_dropout": 0.1, "use_cache": False}),
    ("llama", {"layer_types": ["full_attention"] * 2}),
    ("llama", {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}}),
    ("llama", {"num_experts": None, "logits_scaling": 0, "moe_layers": []}),
    ("mistral", {"sliding_window": 3}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": ...}),
    ("mistral", {"layer_types": ["sliding_attention"] * 2}),
    ("qwen2", {"sliding_window": 4, "use_sliding_window": False}),
    ("qwen2", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 2, "layer_types": ...}),
    ("qwen3", {"max_window_layers": 0, "layer_types": None}),
    ("phi3", {"rope_parameters": ..., "rope_theta": 500.0, "sliding_window": 9, "resid_pdrop": 0.1}),
    (
        "phi3",
        {
            "rope_parameters": ...,
            "rope_scaling": LONG3 | {"type": "su", "original_max_position_embeddings": 9},
            "partial_rotary_factor": 0.75,
            "rope_theta": 500.0,
        },
    ),
    ("phi3", {"rope_parameters": LONG3 | {"rope_type": "yarn"}, "partial_rotary_factor": 0.75, "max_position_embeddings": 64}),
    ("phi3", {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "x--modeling_phi3.Phi3ForCausalLM"}}),
    ("phi3", {"original_max_position_embeddings": ..., "rms_norm_eps": ...}),
    ("smollm3", {"no_rope_layers": [0, 1], "rope_parameters": ...}),
    ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 1, "num_key_value_heads": 2}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 5, "layer_types": ...}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}),
    ("granite", {"embedding_multiplier": ..., "attention_multiplier": ..., "residual_multiplier": 2, "logits_scaling": 8}),
    ("olmo2", {"rms_norm_eps": ..., "rope_parameters": ..., "rope_theta": 700}),
    ("olmo3", {"rope_parameters": ..., "rope_scaling": YARN, "rope_theta": 700.0}),
    ("olmo3", {"rope_parameters": {"sliding_attention": {"rope_theta": 50.0, "rope_type": "default"}}, "layer_types": ...}),
    ("gemma", {"hidden_act": "gelu", "hidden_activation": None, "rms_norm_eps": ...}),
    ("gemma", {"use_bidirectional_attention": False, "rope_parameters": ..., "rope_theta": 700.0}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": ..., "layer_types": None, "cache_implementation": "hybrid"}),
    ("gemma2", {"query_pre_attn_scalar": ..., "hidden_act": "gelu_pytorch_tanh", "attn_logit_softcapping": ...}),
    (
        "gemma3",
        {"rope_parameters": ..., "rope_theta": 900.0, "rope_local_base_freq": 50.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    ("gemma3", {"layer_types": ..., "sliding_window_pattern": 2, "final_logit_softcapping": 3.0}),
    ("gemma3", {"layer_types": ["full_attention"] * 3, "sliding_window": 4, "_sliding_window_pattern": 6}),
    ("mixtral", {"num_experts_per_tok": 1, "sliding_window": None, "router_aux_loss_coef": 0.1, "rope_parameters": ...}),
    (
        "mixtral",
        {"num_experts_per_tok": ..., "output_router_logits": True, "rms_norm_eps": ..., "num_experts": 5, "num_local_experts": ...},
    ),
    ("qwen3_moe", {"norm_topk_prob": True, "router_jitter_noise": 0.0}),
    ("qwen3_moe", {"mlp_only_layers": None, "decoder_sparse_step": 2, "num_local_experts": ..., "num_experts": 5}),
    ("gpt_oss", {"swiglu_limit": 2.0, "swiglu_alpha": 1.0, "router_aux_loss_coef": 0.9, "experts_per_token": 2}),
    ("gpt_oss", {"swiglu_limit": ..., "swiglu_alpha": ..., "layer_types": ..., "sliding_window": 4, "initial_context_length": 4096}),
    ("gpt_oss", {"rope_parameters": ..., "attention_bias": ..., "rms_norm_eps": ..., "max_position_embeddings": 131072}),
    ("gpt_oss", {"rope_parameters": ..., "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}, "rope_theta": 500}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 4, "norm_topk_prob": ...}),
]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind,changes", ACCEPTED)
def test_what_is_accepted_has_the_logits_of_transformers(edited, documents, kind, changes):
    path, ids = edited(kind, changes), torch.tensor(documents[1])
    ours = hf.load(path)
    torch.testing.assert_close(dense.probe(ours.params, ids, ours.cfg), expected_logits(path, ids), atol=1e-4, rtol=0)


CHANGES_THE_FUNCTION = [
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"hidden_act": "gelu"}),
    ("llama", {"is_causal": False}),
    ("llama", {"is_causal": None}),
    ("llama", {"sliding_window": 4}),
    ("llama", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("llama", {"layer_types": ["full_attention"]}),
    ("llama", {"partial_rotary_factor": 0.5}),
    ("llama", {"rope_scaling": {"type": "ntk", "factor": 2.0}}),
    ("llama", {"rope_parameters": {"rope_type": "proportional", "factor": 2.0, "rope_theta": 1e4}}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1]}}),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    ("llama", {"attn_logit_softcapping": 50.0}),
    ("llama", {"final_logit_softcapping": 30.0}),
    ("llama", {"query_pre_attn_scalar": 256}),
    ("llama", {"logits_scaling": 8.0}),
    ("llama", {"residual_multiplier": 0.2}),
    ("llama", {"embedding_multiplier": 12.0}),
    ("llama", {"num_experts": 8}),
    ("llama", {"num_local_experts": 8}),
    ("llama", {"no_rope_layers": [1, 0]}),
    ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling.Other"}}),
    ("llama", {"quantization_config": {"quant_method": "bitsandbytes"}}),
    ("llama", {"quantization": {"group_size": 64, "bits": 4}}),
    ("llama", {"text_config": {"hidden_size": 8}}),
    ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("mistral", {"sliding_window": None, "layer_types": ["sliding_attention"] * 2}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("qwen2", {"layer_types": ["sliding_attention"] * 2}),
    ("qwen3", {"attention_bias": True}),
    ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 4}}),
    ("phi3", {"auto_map": {"AutoModelForCausalLM": "modeling.Other"}}),
    ("phi3", {"rope_parameters": LONG3 | {"rope_type": "longrope", "short_mscale": 1.2}}),
    ("phi3", {"partial_rotary_factor": 0.4, "rope_parameters": ...}),
    ("smollm3", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}),
    ("smollm3", {"no_rope_layers": [1]}),
    ("smollm3", {"no_rope_layers": [1, 2]}),
    ("granite", {"logits_scaling": 0}),
    ("granite", {"attention_bias": True}),
    ("granite", {"num_local_experts": 8}),
    ("olmo2", {"sliding_window": 4}),
    ("olmo2", {"clip_qkv": 8.0}),
    ("olmo3", {"sliding_window": None}),
    ("olmo3", {"rope_parameters": {"full_attention": YARN | {"truncate": False}}}),
    ("olmo3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}),
    ("gemma", {"hidden_act": "gelu_new"}),
    ("gemma", {"hidden_activation": "gelu"}),
    ("gemma", {"use_bidirectional_attention": True}),
    ("gemma2", {"hidden_activation": "silu"}),
    ("gemma2", {"query_pre_attn_scalar": 0}),
    ("gemma2", {"final_logit_softcapping": 0}),
    ("gemma2", {"layer_types": ["chunked_attention", "full_attention"]}),
    ("gemma3", {"attn_logit_softcapping": 50.0}),
    ("gemma3", {"use_bidirectional_attention": True}),
    ("gemma3", {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 8.0}}),
    ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "default", "partial_rotary_factor": 0.5}}}),
    ("mixtral", {"router_jitter_noise": 0.1}),
    ("mixtral", {"num_experts_per_tok": 6}),
    ("mixtral", {"num_experts": 4}),
    ("mixtral", {"shared_expert_intermediate_size": 16}),
    ("qwen3_moe", {"mlp_only_layers": [0, 1]}),
    ("gpt_oss", {"attention_bias": False}),
    ("gpt_oss", {"swiglu_limit": 0}),
    ("gpt_oss", {"swiglu_alpha": 1e300}),
    ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}),
    ("gpt_oss", {"sliding_window": None}),
    ("qwen3_moe", {"moe_intermediate_size": 0}),
    ("qwen3_moe", {"router_jitter_noise": 0.1}),
    ("qwen3_moe", {"sliding_window": 4, "use_sliding_window": True, "layer_types": ["full_attention"] * 2}),
]


@pytest.mark.parametrize("kind,changes", CHANGES_THE_FUNCTION)
def test_what_changes_the_function_is_refused_by_name(edited, kind, changes):
    path = edited(kind, changes)
    with pytest.raises(ValueError) as caught:
        hf.read_config(path / "config.json")
    assert str(path / "config.json") in str(caught.value) and any(name in str(caught.value) for name in changes)


WRONG = [
    ("rms_norm_eps", None), ("rms_norm_eps", "1e-6"), ("rms_norm_eps", -1.0), ("rms_norm_eps", 7.0), ("rms_norm_eps", 1e400),
    ("max_position_embeddings", None), ("max_position_embeddings", 0), ("num_key_value_heads", 3), ("num_key_value_heads", 0),
    ("head_dim", 7), ("head_dim", 0), ("head_dim", 8.0), ("hidden_size", 34), ("num_hidden_layers", 10**9), ("vocab_size", 10**12),
    ("hidden_size", True), ("hidden_size", [32]), ("rope_scaling", "linear"), ("rope_scaling", 3), ("rope_scaling", {"type": 4}),
    ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}), ("rope_theta", 0), ("rope_theta", "10000"), ("rope_theta", None),
    ("rope_parameters", {"rope_type": None}), ("rope_parameters", LLAMA3 | {"high_freq_factor": 1.0}),
    ("rope_parameters", LLAMA3 | {"factor": None}), ("rope_parameters", LLAMA3 | {"original_max_position_embeddings": 0}),
    ("tie_word_embeddings", None), ("tie_word_embeddings", "yes"), ("initializer_range", -0.1), ("model_type", "no_such"),
    ("model_type", None), ("model_type", ["llama"]), ("layer_types", "full_attention"), ("hidden_act", None),
]  # fmt: skip


@pytest.mark.parametrize("name,value", WRONG)
def test_wrong_values_are_one_line_with_file_and_field(edited, name, value):
    path = edited("llama", {"rope_parameters": ..., "head_dim": ...} | {name: value})
    with pytest.raises(ValueError) as caught:
        hf.read_config(path / "config.json")
    message = str(caught.value)
    assert str(path / "config.json") in message and name in message and "\n" not in message


def test_windows_of_another_type(edited):
    with pytest.raises(ValueError, match="sliding_window must be a whole number"):
        hf.read_config(edited("mistral", {"sliding_window": "4096"}) / "config.json")


def test_a_missing_size_is_named(edited):
    with pytest.raises(ValueError, match="has no intermediate_size"):
        hf.read_config(edited("llama", {"intermediate_size": ...}) / "config.json")


@pytest.mark.parametrize(
    "text,message",
    [
        ("[]", "holds a list"),
        ("{", "not valid JSON at line 1"),
        ('{"model_type": "llama", "model_type": "qwen2"}', "names the field model_type twice"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "cannot be read"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_broken_files(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        hf.read_config(tmp_path / "config.json")
    assert str(tmp_path / "config.json") in str(caught.value)
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        hf.read_config(tmp_path / "config.json")
