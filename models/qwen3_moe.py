"""The qwen3_moe family: qwen3 with experts in some or all layers."""

from dataclasses import replace

from treetune.core import fields
from treetune.core.fields import Fields
from treetune.models import dense, hf_config, hf_experts, moe, qwen3
from treetune.models.dense import Config

HF_TYPES = ("qwen3_moe",)
_EXPERTS = "model.layers.{}.mlp.experts."
HF_KEYS = qwen3.HF_KEYS | {
    "layers.{}.router": "model.layers.{}.mlp.gate.weight",
    "layers.{}.experts.gate_up_proj": f"{_EXPERTS}gate_up_proj",
    "layers.{}.experts.down_proj": f"{_EXPERTS}down_proj",
}
HF_PARTS = {
    "layers.{}.experts.gate_up_proj": tuple(f"{_EXPERTS}{{e}}.{name}_proj.weight" for name in ("gate", "up")),
    "layers.{}.experts.down_proj": (f"{_EXPERTS}{{e}}.down_proj.weight",),
}

abstract = dense.abstract
forward = dense.forward
head = dense.head
read = dense.read
widen = dense.widen
logit_map = dense.logit_map

SIZES = ("num_experts_per_tok", "moe_intermediate_size")
KNOWN = (*hf_experts.NAMES, *SIZES, "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", *hf_experts.WITHOUT_EFFECT)
DEFAULTS = hf_config.Defaults(4, 32768, known=KNOWN)


def config(hf: Fields) -> Config:
    """The sizes in a Hugging Face config.json of a qwen3_moe model; biases are refused."""
    window = hf_config.window(hf, 4096) if fields.flag(hf, "use_sliding_window", default=False) else None
    hf_config.check_layers(hf, "full_attention" if window is None else "sliding_attention")
    cfg = hf_config.read(hf, DEFAULTS, qk_norm=True, window=window)
    top_k, width = (hf_experts.size(hf, name, default) for name, default in zip(SIZES, (8, 768), strict=True))
    normalised = fields.flag(hf, "norm_topk_prob", default=False)
    experts = moe.Experts(hf_experts.count(hf, 128), top_k, width, _sparse(hf, cfg.num_layers), normalised=normalised)
    return replace(cfg, experts=hf_experts.check(hf, experts))


def _sparse(hf: Fields, layers: int) -> tuple[int, ...]:
    """The layers with experts."""
    step = fields.integer(hf, "decoder_sparse_step", default=1, least=1)
    dense_layers = fields.integers(hf, "mlp_only_layers", default=()) if hf.values.get("mlp_only_layers") is not None else ()
    return tuple(i for i in range(layers) if i not in dense_layers and (i + 1) % step == 0)


def to_hf(cfg: Config) -> dict:
    """The config.json of a model of this family (inverse of `config`)."""
    assert cfg.experts is not None
    extra = {
        "num_experts": cfg.experts.count, "num_experts_per_tok": cfg.experts.top_k, "moe_intermediate_size": cfg.experts.width,
        "norm_topk_prob": cfg.experts.normalised, "decoder_sparse_step": 1, "attention_bias": False,
        "mlp_only_layers": [i for i in range(cfg.num_layers) if i not in cfg.experts.layers],
        "use_sliding_window": cfg.window is not None, "sliding_window": cfg.window,
    }  # fmt: skip
    return hf_config.to_hf(cfg) | extra | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
