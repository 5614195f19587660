"""The granite family (Granite 3 and 4 dense): llama with multipliers on embeddings, attention, residuals and logits."""

from treetune.core import fields
from treetune.core.fields import Fields
from treetune.models import dense, hf_config, llama
from treetune.models.dense import Config

HF_TYPES = ("granite",)
HF_KEYS = llama.HF_KEYS
SCALES = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
DEFAULTS = hf_config.Defaults(None, 2048, known=SCALES)

abstract = dense.abstract
forward = dense.forward
head = dense.head
read = dense.read
widen = dense.widen
logit_map = dense.logit_map


def config(hf: Fields) -> Config:
    """The sizes in a Hugging Face config.json of a granite model; biases and a sliding window are refused."""
    hf_config.check_full(hf, switch=False)
    embed, attention, residual, logits = (fields.number(hf, name, default=1.0, above=0) for name in SCALES)
    scales = {"embed_scale": embed, "attn_scale": attention, "residual_scale": residual, "logit_scale": 1 / logits}
    return hf_config.read(hf, DEFAULTS, **scales)


def to_hf(cfg: Config) -> dict:
    """The config.json of a model of this family (inverse of `config`)."""
    scales = (cfg.embed_scale, cfg.query_scale, cfg.residual_scale, 1 / cfg.logit_scale)
    names = {"model_type": "granite", "architectures": ["GraniteForCausalLM"]}
    return hf_config.to_hf(cfg) | dict(zip(SCALES, scales, strict=True)) | names
