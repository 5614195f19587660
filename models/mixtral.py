"""The mixtral family: Mistral with experts in every layer."""

from dataclasses import replace

from treetune.core import fields
from treetune.core.fields import Fields
from treetune.models import dense, hf_config, hf_experts, hf_rope, llama, moe
from treetune.models.dense import Config

HF_TYPES = ("mixtral",)
DENSE = {f"layers.{{}}.{name}_proj" for name in ("gate", "up", "down")}
HF_KEYS = {path: key for path, key in llama.HF_KEYS.items() if path not in DENSE} | {
    "layers.{}.router": "model.layers.{}.mlp.gate.weight",
    "layers.{}.experts.gate_up_proj": "model.layers.{}.mlp.experts.gate_up_proj",
    "layers.{}.experts.down_proj": "model.layers.{}.mlp.experts.down_proj",
}
_OLD = "model.layers.{}.block_sparse_moe."
HF_PARTS = {
    "layers.{}.router": (f"{_OLD}gate.weight",),
    "layers.{}.experts.gate_up_proj": (f"{_OLD}experts.{{e}}.w1.weight", f"{_OLD}experts.{{e}}.w3.weight"),
    "layers.{}.experts.down_proj": (f"{_OLD}experts.{{e}}.w2.weight",),
}

abstract = dense.abstract
forward = dense.forward
head = dense.head
read = dense.read
widen = dense.widen
logit_map = dense.logit_map

KNOWN = (*hf_experts.NAMES, "num_experts_per_tok", "router_jitter_noise", *hf_experts.WITHOUT_EFFECT)
DEFAULTS = hf_config.Defaults(8, 131072, norm_eps=1e-5, rope=hf_rope.Options(theta=1e6), known=KNOWN)


def config(hf: Fields) -> Config:
    """The sizes in a Hugging Face config.json of a mixtral model; noise on the router's input is refused."""
    if fields.number(hf, "router_jitter_noise", default=0.0) != 0:
        raise fields.wrong(hf, "router_jitter_noise", "0: noise on what the router reads is not computed")
    window = hf_config.window(hf, None)
    hf_config.check_layers(hf, "full_attention" if window is None else "sliding_attention")
    cfg = hf_config.read(hf, DEFAULTS, window=window)
    top_k, layers = hf_experts.size(hf, "num_experts_per_tok", 2), tuple(range(cfg.num_layers))
    experts = moe.Experts(hf_experts.count(hf, 8), top_k, cfg.mlp_size, layers)
    return replace(cfg, experts=hf_experts.check(hf, experts))


def to_hf(cfg: Config) -> dict:
    """The config.json of a model of this family (inverse of `config`)."""
    assert cfg.experts is not None
    extra = {"num_local_experts": cfg.experts.count, "num_experts_per_tok": cfg.experts.top_k, "sliding_window": cfg.window}
    return hf_config.to_hf(cfg) | extra | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
