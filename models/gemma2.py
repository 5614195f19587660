"""The gemma2 family (Gemma 2, and the text models of Gemma 3): gemma with four norms a layer, windows on some layers, a scale of attention.

Gemma 2 has soft-caps on attention and logits; Gemma 3 has norms on queries and keys, and other rotary positions on layers with a window.
"""

from treetune.core import fields
from treetune.core.fields import Fields
from treetune.models import dense, gemma, hf_config, hf_rope, llama
from treetune.models.dense import Config

HF_TYPES = ("gemma2", "gemma3_text")
HF_KEYS = llama.HF_KEYS | {
    "layers.{}.attn_out_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.post_norm": "model.layers.{}.pre_feedforward_layernorm.weight",
    "layers.{}.mlp_out_norm": "model.layers.{}.post_feedforward_layernorm.weight",
    **{f"layers.{{}}.{x}_norm": f"model.layers.{{}}.self_attn.{x}_norm.weight" for x in "qk"},
}
KNOWN = ("hidden_activation", "query_pre_attn_scalar", "final_logit_softcapping", "cache_implementation")
COMMON = hf_config.Defaults(4, 8192, head_dim=256, tied=True, activations=(gemma.GELU,), known=KNOWN)
DEFAULTS = {
    "gemma2": COMMON._replace(known=(*KNOWN, "attn_logit_softcapping")),
    "gemma3_text": COMMON._replace(
        max_positions=131072,
        rope=hf_rope.Options(by_type=(1_000_000.0, 10_000.0), window_theta="rope_local_base_freq"),
        known=(*KNOWN, "rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern"),
    ),
}

abstract = dense.abstract
forward = dense.forward
head = dense.head
read = dense.read
widen = dense.widen
logit_map = dense.logit_map


def config(hf: Fields) -> Config:
    """The sizes in a Hugging Face config.json of a gemma2 or gemma3_text model; biases and bidirectional attention are refused."""
    kind = fields.text(hf, "model_type", choices=HF_TYPES)
    fields.text(hf, "hidden_activation", default=gemma.GELU, choices=(gemma.GELU,))
    first = kind == "gemma2"
    interval = 2 if first else fields.integer(hf, "sliding_window_pattern", default=6, least=1)
    default = ["full_attention" if (index + 1) % interval == 0 else "sliding_attention" for index in range(hf_config.layer_count(hf))]
    return hf_config.read(
        hf,
        DEFAULTS[kind],
        **gemma.SWITCHES,
        out_norms=True,
        qk_norm=not first,
        layer_windows=hf_config.layer_windows(hf, hf_config.window(hf, 4096), default),
        attn_scale=fields.number(hf, "query_pre_attn_scalar", default=256.0, above=0) ** -0.5,
        attn_softcap=_cap(hf, "attn_logit_softcapping", 50.0) if first else None,
        logit_softcap=_cap(hf, "final_logit_softcapping", 30.0 if first else None),
    )


def _cap(hf: Fields, name: str, default: float | None) -> float | None:
    """A soft-cap: null means none, absent the default."""
    if name in hf.values and hf.values[name] is None:
        return None
    return fields.number(hf, name, default=default, above=0)


def to_hf(cfg: Config) -> dict:
    """The config.json of a model of this family (inverse of `config`)."""
    scale = cfg.query_scale**-2
    extra = {"hidden_activation": gemma.GELU, "query_pre_attn_scalar": round(scale) if abs(scale - round(scale)) < 1e-6 * scale else scale}
    extra |= {"final_logit_softcapping": cfg.logit_softcap, "attention_bias": False} | hf_config.layer_types(cfg)
    if cfg.qk_norm:
        extra |= hf_config.ropes_by_type(cfg) | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    else:
        extra |= {"attn_logit_softcapping": cfg.attn_softcap, "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}
    return {name: value for name, value in hf_config.to_hf(cfg).items() if name != "hidden_act"} | extra
