"""The phi3 family (Phi 3 to 4): llama whose files hold q, k and v as one tensor, gate and up as another; longrope in a part of a head."""

from treetune.core.fields import Fields
from treetune.models import dense, hf_config, hf_rope, llama
from treetune.models.dense import Config
from treetune.models.rope_scaling import LongRope

HF_TYPES = ("phi3",)
HF_KEYS = llama.HF_KEYS | {
    **{f"layers.{{}}.{x}_proj": "model.layers.{}.self_attn.qkv_proj.weight" for x in "qkv"},
    **{f"layers.{{}}.{x}_proj": "model.layers.{}.mlp.gate_up_proj.weight" for x in ("gate", "up")},
}
ROPE = hf_rope.Options(aliases=(("su", "longrope"), ("yarn", "longrope")), partial=True, original=4096)
DEFAULTS = hf_config.Defaults(None, 4096, norm_eps=1e-5, rope=ROPE, known=("embd_pdrop", "resid_pdrop"))

abstract = dense.abstract
forward = dense.forward
head = dense.head
read = dense.read
widen = dense.widen
logit_map = dense.logit_map


def config(hf: Fields) -> Config:
    """The sizes in a Hugging Face config.json of a phi3 model. Dropout of embeddings and residuals is not applied."""
    # The repositories of these models carry the code from before transformers had it, under the names of its classes.
    own = {name: value for name, value in hf.values.items() if name != "auto_map" or not _is_phi3(value)}
    window = hf_config.window(hf, None)
    hf_config.check_layers(hf, "full_attention" if window is None else "sliding_attention")
    return hf_config.read(hf._replace(values=own), DEFAULTS, window=window)


def _is_phi3(auto_map: object) -> bool:
    names = list(auto_map.values()) if isinstance(auto_map, dict) else [None]
    return all(isinstance(name, str) and name.rpartition(".")[2].startswith("Phi3") for name in names)


def to_hf(cfg: Config) -> dict:
    """The config.json of a model of this family (inverse of `config`)."""
    # Without a tokenizer's, transformers would take the padding token of the released models, which a smaller vocabulary lacks.
    extra = {"sliding_window": cfg.window, hf_rope.PARTIAL: cfg.rope_part, "pad_token_id": None}
    # This family reads the original length beside the mapping, and takes 4096 where there is none.
    extra |= {hf_rope.ORIGINAL: cfg.rope_scaling.original_max_positions} if isinstance(cfg.rope_scaling, LongRope) else {}
    return hf_config.to_hf(cfg) | extra | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
