"""The qwen3 family: llama with RMSNorm on each query and key head, and a head dim of its own."""

from treetune.models import dense, llama
from treetune.models.dense import Config

HF_TYPES = ("qwen3",)
HF_KEYS = llama.HF_KEYS | {f"layers.{{}}.{x}_norm": f"model.layers.{{}}.self_attn.{x}_norm.weight" for x in "qk"}

abstract = dense.abstract
forward = dense.forward
head = dense.head
read = dense.read
widen = dense.widen


def config(hf: dict) -> Config:
    """The sizes in a Hugging Face config.json of a qwen3 model; biases and a sliding window are refused."""
    dense.refuse(hf, attention_bias=False, use_sliding_window=False, hidden_act="silu")
    return dense.config_base(hf, qk_norm=True)


def to_hf(cfg: Config) -> dict:
    """The config.json of a model of this family (inverse of `config`)."""
    extra = {"attention_bias": False, "use_sliding_window": False}
    return dense.hf_base(cfg) | extra | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
