"""Sizes of models that many train, as their config.json has them: a table of memory needs no file and no hub."""

from typing import Any

QWEN = {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 5e5}
MISTRAL = {
    "model_type": "mistral",
    "head_dim": 128,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
}
GEMMA = {
    "model_type": "gemma2",
    "vocab_size": 256000,
    "head_dim": 256,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}


def _of(kind: dict[str, Any], width: int, layers: int, heads: int, inner: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": inner}
    return {"tie_word_embeddings": False, "max_position_embeddings": 8192, "hidden_act": "silu"} | kind | sizes | more


# From the smallest to the largest.
CONFIGS = {
    "Qwen3-0.6B": _of(QWEN, 1024, 28, 16, 3072, tie_word_embeddings=True),
    "Qwen3-1.7B": _of(QWEN, 2048, 28, 16, 6144, tie_word_embeddings=True),
    "Qwen3-4B": _of(QWEN, 2560, 36, 32, 9728, tie_word_embeddings=True),
    "Mistral-7B-v0.3": _of(MISTRAL, 4096, 32, 32, 14336, vocab_size=32768),
    "Llama-3.1-8B": _of(LLAMA, 4096, 32, 32, 14336, head_dim=128),
    "Gemma-2-9B": _of(GEMMA, 3584, 42, 16, 14336),
    "Qwen3-14B": _of(QWEN, 5120, 40, 40, 17408),
    "Qwen3-32B": _of(QWEN, 5120, 64, 64, 25600),
    "Llama-3.1-70B": _of(LLAMA, 8192, 80, 64, 28672, head_dim=128),
}
