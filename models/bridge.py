"""Any causal language model of transformers as a family: its modules, our weights, attention, adapters and head.

`model_type` names the family. What a config computes is found out by a probe (`bridge_probe`), not from a list.
"""

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from treetune.core import fields, tree
from treetune.core.fields import Fields
from treetune.core.lora import Lora
from treetune.core.param import Param, Params
from treetune.models import (
    adapter_parameters,
    bridge_files,
    bridge_forward,
    bridge_probe,
    bridge_skeleton,
    dense,
    hf_config,
    hf_keys,
    plain_model,
    quant_config,
    quantised,
)
from treetune.models.bridge_skeleton import EMBEDDING, HEAD, HEAD_BIAS, Skeleton
from treetune.models.dense import LogitMap
from treetune.models.quantised import Keep
from treetune.ops import attention

# What all configs have, and what only training from scratch or further heads read.
KNOWN = hf_config.WITHOUT_EFFECT | {
    "auto_map", "aux_loss_alpha", "ep_size", "model_type", "num_nextn_predict_layers", "quantization_config", "seq_aux",
    "transformers_weights",
}  # fmt: skip
ROPE = frozenset({
    "alpha", "attention_factor", "beta_fast", "beta_slow", "factor", "high_freq_factor", "llama_4_scaling_beta", "long_factor",
    "long_mscale", "low_freq_factor", "max_position_embeddings", "mrope_interleaved", "mrope_section", "mscale", "mscale_all_dim",
    "original_max_position_embeddings", "partial_rotary_factor", "rope_theta", "rope_type", "short_factor", "short_mscale", "truncate",
    "type",
})  # fmt: skip
OLDEST = (5, 7)  # of transformers, that takes functions for experts by name
UNBOUNDED = 1 << 20  # positions of a model without a largest one


@dataclass(frozen=True)
class Config(dense.Config):
    """Sizes that all families have, and the config.json as canonical JSON.

    reason: why documents are not packed. widths: for each call of attention of each layer its heads, key width and value width. whole:
    whether states are read behind what stands before the output matrix. short: positions up to which all documents turn alike.
    """

    kind: str = ""
    text: str = ""
    reason: str = ""
    widths: tuple[tuple[tuple[int, int, int], ...], ...] = ()
    whole: bool = False
    short: int | None = None

    @property
    def shared_positions(self) -> int:
        """Positions of what is sampled: a longer text would turn the tokens that it was sampled behind otherwise."""
        return min(self.max_positions, self.short or self.max_positions)

    @property
    def alone(self) -> str:
        """Why documents go through the model one at a time; empty where they are packed."""
        return self.reason

    @property
    def caches(self) -> tuple[tuple[int, int, int], ...]:
        """Heads, key width and value width of what is kept of a token for each call of attention."""
        return tuple(itertools.chain(*self.widths))

    @property
    def first_caches(self) -> tuple[int, ...]:
        """The number of each layer's first cache, and of all; empty where documents go through one at a time."""
        return () if self.reason else tuple(itertools.accumulate(map(len, self.widths), initial=0))


class Bridge:
    """The family of one `model_type` of transformers."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.keys: dict[str, str] = {}

    @property
    def HF_TYPES(self) -> tuple[str, ...]:
        """The one `model_type` that it computes."""
        return (self.kind,)

    @property
    def HF_KEYS(self) -> Mapping[str, str]:
        """The keys of the leaves of all configs that were read, by path: which leaves there are depends on the config."""
        return self.keys

    def config(self, hf: Fields) -> Config:
        """The sizes in a config.json.

        Raises ValueError for a field that transformers does not know of this model, and for a model that is not computed, with the reason.
        """
        _check_version(hf, metadata.version("transformers"))
        # How weights are stored is no part of what a model computes.
        text = json.dumps({name: value for name, value in hf.values.items() if name != quant_config.NAME}, sort_keys=True)
        try:
            _check_sizes(hf)
            whole = bridge_skeleton.hf_config(self.kind, text)
            _check(hf, whole, bridge_skeleton.text_part(whole))
            cfg = _config(self.kind, text, whole, bridge_probe.facts(self.kind, text))
        except ValueError as error:
            raise ValueError(f"{hf.source}: {error}".replace(f"{hf.source}: {hf.source}", hf.source)) from error
        self.keys |= {hf_keys.pattern(path): hf_keys.pattern(key) for path, key in skeleton(cfg).keys.items()}
        return cfg

    def to_hf(self, cfg: dense.Config) -> dict[str, Any]:
        """The config.json of a model: the inverse of `config`."""
        cfg = _own(cfg)
        values, sizes = json.loads(cfg.text), {"vocab_size": cfg.vocab_size, "tie_word_embeddings": cfg.tied}
        name = bridge_skeleton.text_part(bridge_skeleton.hf_config(cfg.kind, cfg.text))
        if name is None:
            return values | sizes
        # Of a model with other parts the vocabulary is that of its text; whether it is tied may be said twice.
        inner = values.get(name) or {}
        known = {key: value for key, value in sizes.items() if key in values}
        part = inner | {key: value for key, value in sizes.items() if key == "vocab_size" or key in inner}
        return values | known | {"tie_word_embeddings": cfg.tied, name: part}

    def abstract(self, cfg: dense.Config, *, dtype: torch.dtype = torch.float32) -> Params:
        """The tree of `Param`s: shapes, axes and initial values."""
        cfg = _own(cfg)
        parts = skeleton(cfg)
        leaves = {path: _param(parts, path, cfg, dtype) for path in parts.keys if path != HEAD}
        if not cfg.tied:
            leaves[HEAD] = leaves[EMBEDDING]._replace(op="head")
        return tree.from_items(leaves.items())

    def forward(
        self,
        weights: Params,
        batch: dict,
        plan: attention.Plan | None,
        cfg: dense.Config,
        *,
        lora: Lora | None = None,
        cache: dense.Cache | None = None,
        collect: Sequence[int] = (),
        **training: Unpack[dense.Training],
    ) -> dense.Out:
        """Hidden states of a packed stream. Layers that `weights` lack are passed over."""
        parts = skeleton(_own(cfg), batch["tokens"].device)
        kept = bridge_forward.Kept(cache, _own(cfg).first_caches)
        run = bridge_forward.prepare(parts, weights, batch, cfg.dtype, plan=plan, lora=lora, kept=kept, collect=collect, **training)
        hidden = bridge_forward.one_by_one(run, batch) if _own(cfg).alone else bridge_forward.packed(run, batch)
        return dense.Out(hidden, run.features, cache)

    def read(self, hidden: Tensor, batch: dict, cfg: dense.Config, lora: Lora | None = None) -> Tensor:
        """The rows `at` of the hidden states, as `head` takes them."""
        return dense.read(hidden, batch, cfg, lora)

    def head(self, weights: Params, cfg: dense.Config, lora: Lora | None = None) -> Tensor:
        """The output matrix, with its bias and the B of an adapter on it as further columns."""
        return dense.head(weights, cfg, lora)

    def widen(self, hidden: Tensor, cfg: dense.Config, lora: Lora | None = None, key: Tensor | None = None) -> Tensor:
        """Hidden states with what meets those columns beside them."""
        return dense.widen(hidden, cfg, lora, key)

    def logit_map(self, cfg: dense.Config) -> LogitMap:
        """Scale and soft-cap of the product of hidden states and output matrix."""
        return dense.logit_map(cfg)

    def wide(self, cfg: dense.Config) -> Mapping[str, torch.dtype]:
        """The dtypes of leaves that are not computed with in that of the model, by path."""
        return skeleton(_own(cfg)).wide

    def counts_from_padding(self, cfg: dense.Config) -> bool:
        """Whether positions begin behind the id of padding, as RoBERTa's do: config.json then says what is computed by it."""
        parts = skeleton(_own(cfg))
        tables = [part for part in parts.base.modules() if isinstance(part, nn.Embedding) and part is not parts.embedding]
        return any(table.padding_idx is not None for table in tables)

    def read_files(
        self,
        root: Path,
        cfg: dense.Config,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        beside: Sequence[str] = (),
        keep: Keep = quantised.AS_READ,
    ) -> Params:
        """The tree of a folder's weights, through transformers' own conversions of older layouts; with keys `beside`, without a head."""
        parts = skeleton(_own(cfg))
        each = bool(keep.chosen or keep.home) and not beside and bridge_files.one_by_one(root, parts)
        if keep.stored and not each:
            raise ValueError(
                f"{root} is quantised, and its files hold the weights of {self.kind} otherwise than its modules do: take the unquantised "
                "model, with --quant"
            )
        if each:
            leaves = dict(tree.items(self.abstract(cfg, dtype=dtype)))
            return tree.from_items(bridge_files.read_each(root, parts, leaves, device, keep).items())
        return tree.from_items(bridge_files.read(root, parts, dtype, device, beside=beside, keep=keep).items())

    def to_files(self, cfg: dense.Config, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leaves by key in the layout in which transformers saves the model."""
        return bridge_files.saved(skeleton(_own(cfg)), leaves)


@functools.cache
def family(kind: str) -> Bridge:
    """The family of a `model_type`. Raises KeyError where transformers has no causal language model of it."""
    if not knows(kind):
        raise KeyError(kind)
    return Bridge(kind)


def knows(kind: str) -> bool:
    """Whether transformers has a causal language model of this `model_type`."""
    return plain_model.knows(kind)


def skeleton(cfg: Config, device: torch.device = bridge_skeleton.CPU) -> Skeleton:
    """The modules of a config, without weights."""
    return bridge_skeleton.skeleton(cfg.kind, cfg.text, cfg.dtype, bool(cfg.alone), device, cfg.whole)


def _own(cfg: dense.Config) -> Config:
    assert isinstance(cfg, Config)
    return cfg


def _check_version(hf: Fields, installed: str) -> None:
    """Raise ValueError for a transformers that does not take experts and attention of others."""
    if tuple(map(int, installed.split(".")[:2])) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise ValueError(
            f"{hf.source}: a {hf.values.get('model_type')} model is computed by the modules of transformers from {needed} on, and "
            f'{installed} is installed: pip install -U "transformers>={needed}"'
        )


def _check_sizes(hf: Fields) -> None:
    """Raise ValueError for a size beyond any model's, also in a part, before modules of that size are made."""
    parts = [hf, *(fields.mapping(value, f"{hf.source}: {name}") for name, value in hf.values.items() if isinstance(value, dict))]
    for part, (name, most) in itertools.product(parts, hf_config.MOST.items()):
        if isinstance(value := part.values.get(name), int) and value > most:
            raise fields.wrong(part, name, f"a whole number of at most {most}")


def _check(hf: Fields, whole: Any, text: str | None) -> None:
    """A field that transformers does not know of this model may change its function. text: the field that holds the language model's."""
    quant_config.read(hf)
    if getattr(whole, "is_encoder_decoder", False):
        raise ValueError(f"{hf.source}: {whole.model_type} has an encoder; only decoders are computed")
    _check_known(hf, whole)
    if text is not None and isinstance(hf.values.get(text), dict):
        _check_known(fields.inner(hf, text), getattr(whole, text))


def _check_known(hf: Fields, config: Any) -> None:
    """Raise ValueError for a field that a config of transformers neither knows nor has taken another from.

    One that is null, false, 0 or empty is off.
    """
    known, left = KNOWN | bridge_skeleton.fields_of(config), vars(config)
    odd = [(hf, name) for name in fields.unknown(hf, known) if hf.values[name] and name in left]
    for name in ("rope_parameters", "rope_scaling"):
        odd += _unknown_rope(hf, name)
    for inside, name in odd[:1]:
        raise ValueError(
            f"{inside.source} has {name} = {fields.shown(inside.values[name])}, which transformers does not know of {config.model_type}: "
            "it may change what the model computes; remove the field if it has no effect"
        )


def _unknown_rope(hf: Fields, name: str) -> list[tuple[Fields, str]]:
    """Fields of rotary positions, of all layers or of one type of them, that no model of transformers reads."""
    if not isinstance(value := hf.values.get(name), dict):
        return []
    inside = fields.mapping(value, f"{hf.source}: {name}")
    by_type = [key for key, part in value.items() if isinstance(part, dict)]
    plain = [(inside, key) for key in fields.unknown(inside, ROPE) if value[key] and key not in by_type]
    return plain + list(itertools.chain(*(_unknown_rope(inside, key) for key in by_type)))


def _config(kind: str, text: str, whole: Any, facts: bridge_probe.Facts) -> Config:
    config = whole.get_text_config(decoder=True)
    parts = bridge_skeleton.skeleton(kind, text, torch.float32, bool(facts.alone), bridge_skeleton.CPU, facts.whole)
    rows, hidden = parts.leaves[HEAD].shape
    heads = _size(config, "num_attention_heads") or 1
    return Config(
        vocab_size=rows,
        hidden_size=hidden,
        mlp_size=_size(config, "intermediate_size") or 0,
        num_layers=len(parts.layers),
        num_heads=heads,
        num_kv_heads=facts.widths[0][0][0] if facts.widths else _size(config, "num_key_value_heads") or heads,
        head_dim=facts.widths[0][0][1] if facts.widths else _size(config, "head_dim") or max(hidden // heads, 1),
        max_positions=_size(config, "max_position_embeddings") or UNBOUNDED,
        tied=parts.leaves[HEAD] is parts.leaves[EMBEDDING],
        layer_windows=facts.windows,
        attn_softcap=facts.softcap,
        attn_sinks=facts.sinks,
        head_bias=facts.bias,
        init_std=getattr(config, "initializer_range", None) or 0.02,
        kind=kind,
        text=text,
        reason=facts.alone,
        widths=facts.widths,
        whole=facts.whole,
        short=facts.short,
        logit_scale=facts.logits.scale,
        logit_softcap=facts.logits.softcap,
    )


def _size(config: Any, name: str) -> int | None:
    """A size that a config may lack, or have for each layer."""
    try:
        value = getattr(config, name, None)
    except Exception:  # of another value for each layer, which transformers has several errors for
        return None
    return value if isinstance(value, int) else None


def _param(parts: Skeleton, path: str, cfg: Config, dtype: torch.dtype) -> Param:
    leaf = parts.leaves[path]
    shape = (cfg.vocab_size, *leaf.shape[1:]) if path in (EMBEDDING, HEAD_BIAS) else tuple(leaf.shape)
    axes = ("vocab", "embed") if path == EMBEDDING else ("embed", *("out",) * (leaf.ndim - 1))
    op = "embedding" if path == EMBEDDING else "experts" if path in parts.experts else "linear" if _adaptable(parts, path, cfg) else ""
    init = f"normal:{cfg.init_std}" if leaf.ndim > 1 else "zeros" if path.endswith("bias") else "ones"
    trains = isinstance(leaf, nn.Parameter) and path not in bridge_probe.facts(cfg.kind, cfg.text).unread
    return Param(shape, parts.wide.get(path, dtype), axes[: leaf.ndim], init, op, trains)


def _adaptable(parts: Skeleton, path: str, cfg: Config) -> bool:
    """Whether an adapter may sit on a leaf: on a linear layer that is called as one, and that PEFT would adapt, too."""
    taken = parts.keys[path].removesuffix(".weight").rpartition(".")[2] in adapter_parameters.takes_none(cfg.kind)
    return path in parts.linears and path in bridge_probe.facts(cfg.kind, cfg.text).called and not taken
