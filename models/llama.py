"""The llama family: Llama 2 and 3, SmolLM, and Mistral with its sliding window."""

from treetune.models import dense
from treetune.models.dense import Config, Llama3Rope

HF_TYPES = ("llama", "mistral")
HF_KEYS = {
    "embed_tokens": "model.embed_tokens.weight",
    "layers.{}.input_norm": "model.layers.{}.input_layernorm.weight",
    "layers.{}.q_proj": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.k_proj": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.v_proj": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.o_proj": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.post_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.gate_proj": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.up_proj": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.down_proj": "model.layers.{}.mlp.down_proj.weight",
    "norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}

abstract = dense.abstract
forward = dense.forward
head = dense.head
read = dense.read
widen = dense.widen


def config(hf: dict) -> Config:
    """The sizes in a Hugging Face config.json of a llama or mistral model.

    Raises ValueError for a feature that this family does not compute, naming it.
    """
    dense.refuse(hf, attention_bias=False, mlp_bias=False, hidden_act="silu", pretraining_tp=1)
    # A mistral config.json without the field means the class default; null means no window.
    return dense.config_base(hf, window=hf.get("sliding_window", 4096) if hf["model_type"] == "mistral" else None)


def to_hf(cfg: Config) -> dict:
    """The config.json of a model of this family (inverse of `config`)."""
    mistral = cfg.window is not None
    extra = {"sliding_window": cfg.window} if mistral else {"attention_bias": False, "mlp_bias": False}
    names = ("mistral", "MistralForCausalLM") if mistral else ("llama", "LlamaForCausalLM")
    return dense.hf_base(cfg) | extra | {"model_type": names[0], "architectures": [names[1]]}


__all__ = ["HF_KEYS", "HF_TYPES", "Config", "Llama3Rope", "abstract", "config", "forward", "head", "read", "to_hf", "widen"]
