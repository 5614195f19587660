"""The olmo2 family (Olmo 2 and 3): norms after attention and mlp instead of before, on queries and keys as a whole; Olmo 3 has windows."""

from treetune.core import fields
from treetune.core.fields import Fields
from treetune.models import dense, hf_config, hf_rope, llama
from treetune.models.dense import Config

HF_TYPES = ("olmo2", "olmo3")
HF_KEYS = {path: key for path, key in llama.HF_KEYS.items() if not path.endswith((".input_norm", ".post_norm"))} | {
    "layers.{}.attn_out_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.mlp_out_norm": "model.layers.{}.post_feedforward_layernorm.weight",
    **{f"layers.{{}}.{x}_norm": f"model.layers.{{}}.self_attn.{x}_norm.weight" for x in "qk"},
}
DEFAULTS = {
    "olmo2": hf_config.Defaults(None, 2048, norm_eps=1e-5),
    "olmo3": hf_config.Defaults(None, 2048, norm_eps=1e-5, rope=hf_rope.Options(by_type=(500_000.0, 500_000.0))),
}
SWITCHES = {"norm": "olmo", "pre_norms": False, "out_norms": True, "qk_norm": True, "qk_norm_whole": True}

abstract = dense.abstract
forward = dense.forward
head = dense.head
read = dense.read
widen = dense.widen
logit_map = dense.logit_map


def config(hf: Fields) -> Config:
    """The sizes in a Hugging Face config.json of an olmo2 or olmo3 model; biases are refused."""
    kind = fields.text(hf, "model_type", choices=HF_TYPES)
    if kind == "olmo2":
        hf_config.check_full(hf, switch=False)
        return hf_config.read(hf, DEFAULTS[kind], **SWITCHES)
    default = ["full_attention" if (index + 1) % 4 == 0 else "sliding_attention" for index in range(hf_config.layer_count(hf))]
    return hf_config.read(hf, DEFAULTS[kind], **SWITCHES, layer_windows=hf_config.layer_windows(hf, hf_config.window(hf, 4096), default))


def to_hf(cfg: Config) -> dict:
    """The config.json of a model of this family (inverse of `config`)."""
    extra = hf_config.layer_types(cfg) | hf_config.ropes_by_type(cfg) if cfg.layer_windows else {}
    names = ("olmo3", "Olmo3ForCausalLM") if cfg.layer_windows else ("olmo2", "Olmo2ForCausalLM")
    return hf_config.to_hf(cfg) | {"attention_bias": False} | extra | {"model_type": names[0], "architectures": [names[1]]}
