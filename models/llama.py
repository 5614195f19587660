"""The llama family: Llama 2 and 3, SmolLM, and Mistral with its sliding window."""

from treetune.core import fields
from treetune.core.fields import Fields
from treetune.models import dense, hf_config
from treetune.models.dense import Config

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
logit_map = dense.logit_map


DEFAULTS = {"llama": hf_config.Defaults(None, 2048), "mistral": hf_config.Defaults(8, 131072)}


def config(hf: Fields) -> Config:
    """The sizes in a Hugging Face config.json of a llama or mistral model.

    Raises ValueError for a feature that this family does not compute, naming it.
    """
    kind = fields.text(hf, "model_type", choices=HF_TYPES)
    if kind == "llama":
        hf_config.check_full(hf, switch=False)
        return hf_config.read(hf, DEFAULTS[kind])
    window = hf_config.window(hf, 4096)
    hf_config.check_layers(hf, "full_attention" if window is None else "sliding_attention")
    return hf_config.read(hf, DEFAULTS[kind], window=window)


def to_hf(cfg: Config) -> dict:
    """The config.json of a model of this family (inverse of `config`)."""
    mistral = cfg.window is not None
    extra = {"sliding_window": cfg.window} if mistral else {"attention_bias": False, "mlp_bias": False}
    names = ("mistral", "MistralForCausalLM") if mistral else ("llama", "LlamaForCausalLM")
    return hf_config.to_hf(cfg) | extra | {"model_type": names[0], "architectures": [names[1]]}


__all__ = ["HF_KEYS", "HF_TYPES", "Config", "abstract", "config", "forward", "head", "logit_map", "read", "to_hf", "widen"]
