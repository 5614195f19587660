"""The qwen2 family (Qwen 2 and 2.5): llama with biases on the query, key and value projections."""

from treetune.core.fields import Fields
from treetune.models import dense, hf_config, llama
from treetune.models.dense import Config

HF_TYPES = ("qwen2",)
HF_KEYS = llama.HF_KEYS | {f"layers.{{}}.{x}_bias": f"model.layers.{{}}.self_attn.{x}_proj.bias" for x in "qkv"}

abstract = dense.abstract
forward = dense.forward
head = dense.head
read = dense.read
widen = dense.widen
logit_map = dense.logit_map


def config(hf: Fields) -> Config:
    """The sizes in a Hugging Face config.json of a qwen2 model; a sliding window that is switched on is refused."""
    hf_config.check_full(hf, switch=True)
    return hf_config.read(hf, hf_config.Defaults(32, 32768), qkv_bias=True)


def to_hf(cfg: Config) -> dict:
    """The config.json of a model of this family (inverse of `config`)."""
    return hf_config.to_hf(cfg) | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}
