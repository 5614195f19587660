"""The qwen3 family: llama with RMSNorm on each query and key head, and a head dim of its own."""

from treetune.core.fields import Fields
from treetune.models import dense, hf_config, llama
from treetune.models.dense import Config

HF_TYPES = ("qwen3",)
HF_KEYS = llama.HF_KEYS | {f"layers.{{}}.{x}_norm": f"model.layers.{{}}.self_attn.{x}_norm.weight" for x in "qk"}

abstract = dense.abstract
forward = dense.forward
head = dense.head
read = dense.read
widen = dense.widen
logit_map = dense.logit_map


def config(hf: Fields) -> Config:
    """The sizes in a Hugging Face config.json of a qwen3 model; biases and a sliding window are refused."""
    hf_config.check_full(hf, switch=True)
    return hf_config.read(hf, hf_config.Defaults(32, 32768, head_dim=128), qk_norm=True)


def to_hf(cfg: Config) -> dict:
    """The config.json of a model of this family (inverse of `config`)."""
    extra = {"attention_bias": False, "use_sliding_window": False}
    return hf_config.to_hf(cfg) | extra | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
