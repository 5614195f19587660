"""The gpt_oss family: experts with biases and a clamped SwiGLU in every layer, sinks in attention, windows on every other layer, yarn."""

from dataclasses import replace

from treetune.core import fields
from treetune.core.fields import Fields
from treetune.models import dense, hf_config, hf_experts, hf_rope, mixtral, moe, qwen2
from treetune.models.dense import Config

HF_TYPES = ("gpt_oss",)
_MLP = "model.layers.{}.mlp."
HF_KEYS = {path: key for path, key in qwen2.HF_KEYS.items() if path not in mixtral.DENSE} | {
    "layers.{}.o_bias": "model.layers.{}.self_attn.o_proj.bias",
    "layers.{}.sinks": "model.layers.{}.self_attn.sinks",
    "layers.{}.router": f"{_MLP}router.weight",
    "layers.{}.router_bias": f"{_MLP}router.bias",
    **{f"layers.{{}}.experts.{name}_proj": f"{_MLP}experts.{name}_proj" for name in ("gate_up", "down")},
    **{f"layers.{{}}.experts.{name}_bias": f"{_MLP}experts.{name}_proj_bias" for name in ("gate_up", "down")},
}
HF_TURNED = ("layers.{}.experts.gate_up_proj", "layers.{}.experts.down_proj")  # [E, I, O] in the files

abstract = dense.abstract
forward = dense.forward
head = dense.head
read = dense.read
widen = dense.widen
logit_map = dense.logit_map

YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    hf_rope.ORIGINAL: 4096,
}  # fmt: skip
MOST = 1e6  # of the gain and the bounds of the SwiGLU: more is a damaged file
WITHOUT_EFFECT = (*hf_experts.WITHOUT_EFFECT, "experts_per_token", "initial_context_length")  # the last two are of its own code
KNOWN = (*hf_experts.NAMES, "num_experts_per_tok", "swiglu_alpha", "swiglu_limit", *WITHOUT_EFFECT)
DEFAULTS = hf_config.Defaults(
    8, 131072, head_dim=64, norm_eps=1e-5, rope=hf_rope.Options(theta=150_000.0), known=KNOWN, attention_bias=True
)


def config(hf: Fields) -> Config:
    """The sizes in a Hugging Face config.json of a gpt_oss model; quantised weights (mxfp4) are refused."""
    if not hf.values.get("rope_parameters") and not hf.values.get("rope_scaling"):
        hf = hf._replace(values=hf.values | {"rope_parameters": YARN})  # what transformers takes there
    default = ["full_attention" if index % 2 else "sliding_attention" for index in range(hf_config.layer_count(hf))]
    windows = hf_config.layer_windows(hf, hf_config.window(hf, 128), default)
    cfg = hf_config.read(hf, DEFAULTS, layer_windows=windows, attn_sinks=True, qkv_bias=True, o_bias=True, norm="olmo")
    clamp = _clamp(hf, "swiglu_alpha", 1.702), _clamp(hf, "swiglu_limit", 7.0)
    count, top_k = hf_experts.count(hf, 128), hf_experts.size(hf, "num_experts_per_tok", 4)
    experts = moe.Experts(count, top_k, cfg.mlp_size, tuple(range(cfg.num_layers)), biased=True, clamp=clamp)
    return replace(cfg, experts=hf_experts.check(hf, experts))


def _clamp(hf: Fields, name: str, default: float) -> float:
    value = fields.number(hf, name, default=default, above=0)
    if value > MOST:
        raise fields.wrong(hf, name, f"a number above 0 and at most {MOST:g}")
    return value


def to_hf(cfg: Config) -> dict:
    """The config.json of a model of this family (inverse of `config`)."""
    assert cfg.experts is not None and cfg.experts.clamp is not None
    alpha, limit = cfg.experts.clamp
    extra = {
        "num_local_experts": cfg.experts.count, "num_experts_per_tok": cfg.experts.top_k, "swiglu_alpha": alpha, "swiglu_limit": limit,
        "attention_bias": True, "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"],
    }  # fmt: skip
    return hf_config.to_hf(cfg) | hf_config.layer_types(cfg) | extra
