"""config.json of the dense families: every field with its effect, read by type, to sizes and back.

A field is one of three: it is computed (a size, a number, a choice), it has no effect on any logit, or it is refused by name. What
null and a missing field mean is what transformers makes of them.
"""

from typing import Any, NamedTuple

from treetune.core import fields
from treetune.core.fields import Fields
from treetune.models import hf_rope, quant_config
from treetune.models.dense import Config

# Fields that change no logit: notes of the writer, options of training and of generation, ids, labels, choices of implementation.
WITHOUT_EFFECT = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "_commit_hash", "_flash_attn_2_enabled",
    "_name_or_path", "architectures", "attention_dropout", "attn_implementation", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "finetuning_task", "gradient_checkpointing", "id2label", "is_decoder", "is_llama_config", "label2id",
    "max_sequence_length", "max_window_layers", "model_max_length", "name_or_path", "num_labels", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "seq_length", "task_specific_params",
    "tie_last_hidden_states", "tokenizer_class", "torch_dtype", "transformers.js_config", "transformers_version", "unsloth_fixed",
    "unsloth_version", "use_bfloat16", "use_cache",
    # generation options of older files, which transformers leaves to generation_config.json
    "bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "length_penalty",
    "max_length", "max_new_tokens", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_scores", "prefix", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "sep_token_id",
    "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
})  # fmt: skip
COMPUTED = frozenset({
    "attention_bias", "head_dim", "hidden_act", "hidden_size", "initializer_range", "intermediate_size", "is_causal", "layer_types",
    "max_position_embeddings", "mlp_bias", "model_type", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "original_max_position_embeddings", "partial_rotary_factor", "quantization_config", "rms_norm_eps", "rope_parameters",
    "rope_scaling", "rope_theta", "sliding_window", "tie_word_embeddings", "use_sliding_window", "vocab_size",
})  # fmt: skip
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# More than any model has: a size beyond these is a damaged file, and is refused before anything of that size is made.
MOST = {
    "vocab_size": 2**24, "hidden_size": 2**20, "intermediate_size": 2**22, "num_hidden_layers": 2**12, "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14, "head_dim": 2**14, "max_position_embeddings": 2**31 - 1, "sliding_window": 2**31 - 1,
}  # fmt: skip


class Defaults(NamedTuple):
    """What transformers takes where a config.json is silent, and what else a family has.

    kv_heads None: as many keys as queries; head_dim None: hidden / heads; activations: the names of the one it computes, default first;
    known: further fields, which the family reads itself; attention_bias: whether all projections of attention have one.
    """

    kv_heads: int | None
    max_positions: int
    head_dim: int | None = None
    norm_eps: float = 1e-6
    tied: bool = False
    rope: hf_rope.Options = hf_rope.Options()
    activations: tuple[str, ...] = ("silu", "swish")
    known: tuple[str, ...] = ()
    attention_bias: bool = False


def read(hf: Fields, defaults: Defaults, **family_fields: Any) -> Config:
    """The sizes in a config.json; `family_fields` are fields of `Config` that the family decides itself.

    Raises ValueError naming file and field for what is missing, of another type, out of range, or changes a function that is not computed.
    """
    if absent := [name for name in SIZES if name not in hf.values]:
        raise ValueError(f"{hf.source} has no {', '.join(absent)}; expected the config.json of a causal language model")
    _check_unknown(hf, defaults)
    _check_choices(hf, defaults)
    heads, hidden = _size(hf, "num_attention_heads"), _size(hf, "hidden_size")
    max_positions = _size(hf, "max_position_embeddings", default=defaults.max_positions)
    head_dim = _head_dim(hf, heads, hidden, defaults)
    ropes = hf_rope.read(hf, max_positions, head_dim, defaults.rope)
    return Config(
        vocab_size=_size(hf, "vocab_size"),
        hidden_size=hidden,
        mlp_size=_size(hf, "intermediate_size"),
        num_layers=_size(hf, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_kv_heads(hf, heads, defaults),
        head_dim=head_dim,
        norm_eps=_between(hf, "rms_norm_eps", defaults.norm_eps, 0.0, 1.0),
        rope_theta=ropes.rope.theta,
        rope_scaling=ropes.rope.scaling,
        rope_part=ropes.part,
        window_rope=ropes.window_rope,
        max_positions=max_positions,
        tied=fields.flag(hf, "tie_word_embeddings", default=defaults.tied),
        init_std=_between(hf, "initializer_range", 0.02, 0.0, 1.0),
        **family_fields,
    )


def to_hf(cfg: Config) -> dict:
    """The fields of a config.json that all dense families share (inverse of `read`)."""
    rope = hf_rope.to_hf(cfg.rope, cfg.rope_part)
    return {
        "vocab_size": cfg.vocab_size, "hidden_size": cfg.hidden_size, "intermediate_size": cfg.mlp_size,
        "num_hidden_layers": cfg.num_layers, "num_attention_heads": cfg.num_heads, "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim, "rms_norm_eps": cfg.norm_eps, "rope_theta": cfg.rope_theta, "rope_parameters": rope,
        "rope_scaling": None if cfg.rope_scaling is None else rope, "max_position_embeddings": cfg.max_positions,
        "tie_word_embeddings": cfg.tied, "initializer_range": cfg.init_std, "hidden_act": "silu",
    }  # fmt: skip


def window(hf: Fields, default: int | None) -> int | None:
    """`sliding_window`: null means none, absent the default."""
    if "sliding_window" in hf.values and hf.values["sliding_window"] is None:
        return None
    return fields.integer(hf, "sliding_window", default=default, least=1, most=MOST["sliding_window"])


def check_full(hf: Fields, *, switch: bool) -> None:
    """Raise ValueError unless every layer sees all tokens before it; with `switch`, the family has `use_sliding_window`."""
    size = window(hf, None)
    if not switch and size is not None:
        raise fields.wrong(hf, "sliding_window", "null, since this family has no window")
    if switch and fields.flag(hf, "use_sliding_window", default=False) and size is not None:
        first = fields.integer(hf, "max_window_layers", default=28)
        if first < _size(hf, "num_hidden_layers"):
            raise fields.wrong(hf, "use_sliding_window", "false: a window on some layers is not computed by this family")
    check_layers(hf, "full_attention")


def check_layers(hf: Fields, kind: str) -> None:
    """Raise ValueError unless `layer_types`, where it is given, says the same of every layer."""
    types = fields.texts(hf, "layer_types", default=None, null=True)
    if types is not None and (set(types) != {kind} or len(types) != _size(hf, "num_hidden_layers")):
        raise fields.wrong(hf, "layer_types", f"{kind} for each layer")


def layer_count(hf: Fields) -> int:
    """Layers of the model."""
    return _size(hf, "num_hidden_layers")


def layer_windows(hf: Fields, size: int | None, default: list[str]) -> tuple[int | None, ...]:
    """The window of each layer by `layer_types`; `default` are the types where the file has none."""
    types = list(fields.texts(hf, "layer_types", default=default, null=True))
    if len(types) != layer_count(hf) or not set(types) <= set(hf_rope.LAYERS):
        raise fields.wrong(hf, "layer_types", f"a list of {layer_count(hf)} of {' and '.join(hf_rope.LAYERS)}")
    if size is None and "sliding_attention" in types:
        raise fields.wrong(hf, "sliding_window", "a number of tokens, since layer_types names sliding layers")
    return tuple(size if kind == "sliding_attention" else None for kind in types)


def layer_types(cfg: Config) -> dict:
    """`layer_types` and `sliding_window` (inverse of `layer_windows`)."""
    types = ["sliding_attention" if cfg.window_of(index) else "full_attention" for index in range(cfg.num_layers)]
    return {"layer_types": types, "sliding_window": next((size for size in cfg.layer_windows if size), None)}


def ropes_by_type(cfg: Config) -> dict:
    """The rotary positions of families that have them by the type of a layer; `rope_scaling`, if any, is within."""
    ropes = zip(hf_rope.LAYERS, (cfg.rope, cfg.window_rope or cfg.rope), strict=True)
    return {"rope_parameters": {name: hf_rope.to_hf(rope) for name, rope in ropes}, "rope_scaling": None}


def _check_unknown(hf: Fields, defaults: Defaults) -> None:
    """A field that is not known may change the function; one that is null, false, 0 or empty is switched off."""
    odd = [name for name in fields.unknown(hf, (*WITHOUT_EFFECT, *COMPUTED, *defaults.known)) if hf.values[name]]
    if odd:
        kind = hf.values.get("model_type")
        raise ValueError(
            f"{hf.source} has {', '.join(f'{name} = {fields.shown(hf.values[name])}' for name in odd[:3])}, which is not known for "
            f"{kind}: it may change what the model computes; remove the field if it has no effect"
        )


def _check_choices(hf: Fields, defaults: Defaults) -> None:
    quant_config.read(hf)
    for name, own in (("attention_bias", defaults.attention_bias), ("mlp_bias", False)):
        if fields.flag(hf, name, default=own) != own:
            raise fields.wrong(hf, name, f"{str(own).lower()}: this family computes {'nothing without' if own else 'no'} such bias")
    if not fields.flag(hf, "is_causal", default=True):
        raise fields.wrong(hf, "is_causal", "true: attention to later tokens is not computed")
    fields.text(hf, "hidden_act", default=defaults.activations[0], choices=defaults.activations)


def _size(hf: Fields, name: str, **bounds: Any) -> int:
    return fields.integer(hf, name, least=1, most=MOST[name], **bounds)


def _between(hf: Fields, name: str, default: float, least: float, most: float) -> float:
    value = fields.number(hf, name, default=default, least=least)
    if value > most:
        raise fields.wrong(hf, name, f"a number from {least:g} to {most:g}")
    return value


def _kv_heads(hf: Fields, heads: int, defaults: Defaults) -> int:
    if hf.values.get("num_key_value_heads", ()) is None:
        return heads
    count = _size(hf, "num_key_value_heads", default=defaults.kv_heads or heads)
    if heads % count:
        raise fields.wrong(hf, "num_key_value_heads", f"a divisor of num_attention_heads, which is {heads}")
    return count


def _head_dim(hf: Fields, heads: int, hidden: int, defaults: Defaults) -> int:
    size = _size(hf, "head_dim", default=defaults.head_dim, null=defaults.head_dim is None)
    if size is None and hidden % heads:
        raise fields.wrong(hf, "hidden_size", f"a multiple of num_attention_heads, which is {heads}, where there is no head_dim")
    size = hidden // heads if size is None else size
    if size % 2:
        raise fields.wrong(hf, "head_dim", f"an even number, since rotary positions turn pairs (hidden_size and heads give {size})")
    return size
