"""The smollm3 family: llama in which some layers have no rotary positions, and these may have a window."""

from treetune.core import fields
from treetune.core.fields import Fields
from treetune.models import dense, hf_config, hf_rope, llama
from treetune.models.dense import Config

HF_TYPES = ("smollm3",)
HF_KEYS = llama.HF_KEYS
KNOWN = ("no_rope_layers", "no_rope_layer_interval")
DEFAULTS = hf_config.Defaults(4, 32768, tied=True, rope=hf_rope.Options(theta=2_000_000.0), known=KNOWN)

abstract = dense.abstract
forward = dense.forward
head = dense.head
read = dense.read
widen = dense.widen
logit_map = dense.logit_map


def config(hf: Fields) -> Config:
    """The sizes in a Hugging Face config.json of a smollm3 model; biases are refused."""
    rotary, count = _rotary(hf), hf_config.layer_count(hf)
    if fields.flag(hf, "use_sliding_window", default=False) and (size := hf_config.window(hf, None)) is not None:
        default = ["full_attention" if turns else "sliding_attention" for turns in rotary]
        windows = hf_config.layer_windows(hf, size, default)
    else:
        windows = ()
        hf_config.check_layers(hf, "full_attention")
    nope = tuple(index for index in range(count) if not rotary[index])
    return hf_config.read(hf, DEFAULTS, nope_layers=nope, layer_windows=windows)


def _rotary(hf: Fields) -> tuple[int, ...]:
    """For each layer whether it has rotary positions."""
    count, interval = hf_config.layer_count(hf), fields.integer(hf, "no_rope_layer_interval", default=4, least=1)
    every = fields.integers(hf, "no_rope_layers", default=None, null=True)
    if every is None:
        return tuple(int((index + 1) % interval != 0) for index in range(count))
    if len(every) != count or not set(every) <= {0, 1}:
        raise fields.wrong(hf, "no_rope_layers", f"a list of {count} zeros and ones, one for each layer")
    return every


def to_hf(cfg: Config) -> dict:
    """The config.json of a model of this family (inverse of `config`)."""
    extra = {"no_rope_layers": [int(index not in cfg.nope_layers) for index in range(cfg.num_layers)], "attention_bias": False}
    # Without a tokenizer's, transformers would take the padding token of the released model, which a smaller vocabulary lacks.
    extra |= {"pad_token_id": None, "mlp_bias": False, "use_sliding_window": any(cfg.layer_windows)} | hf_config.layer_types(cfg)
    return hf_config.to_hf(cfg) | extra | {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"]}
