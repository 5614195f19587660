"""The gemma family (the first): llama with norms of weight 1 + w in float32, GeGLU, and embeddings times sqrt(D)."""

from treetune.core import fields
from treetune.core.fields import Fields
from treetune.models import dense, hf_config, llama
from treetune.models.dense import Config

HF_TYPES = ("gemma",)
HF_KEYS = llama.HF_KEYS
GELU = "gelu_pytorch_tanh"
# "gelu" stands in the first releases, and meant its tanh approximation; `hidden_activation` is of their later files, and not read.
DEFAULTS = hf_config.Defaults(16, 8192, head_dim=256, tied=True, activations=(GELU, "gelu"), known=("hidden_activation",))
SWITCHES = {"norm": "gemma", "activation": "gelu", "embed_sqrt": True}

abstract = dense.abstract
forward = dense.forward
head = dense.head
read = dense.read
widen = dense.widen
logit_map = dense.logit_map


def config(hf: Fields) -> Config:
    """The sizes in a Hugging Face config.json of a gemma model; biases, a sliding window and bidirectional attention are refused."""
    hf_config.check_full(hf, switch=False)
    fields.text(hf, "hidden_activation", default=GELU, choices=(GELU,), null=True)
    return hf_config.read(hf, DEFAULTS, **SWITCHES)


def to_hf(cfg: Config) -> dict:
    """The config.json of a model of this family (inverse of `config`)."""
    extra = {"hidden_act": GELU, "attention_bias": False, "model_type": "gemma", "architectures": ["GemmaForCausalLM"]}
    return hf_config.to_hf(cfg) | extra
