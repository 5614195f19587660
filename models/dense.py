"""The dense decoder that the llama, qwen2 and qwen3 families share; what a layer does follows from its leaves.

T stream tokens, D hidden, H heads, K key/value heads, d head dim, F mlp width, L layers, V vocabulary, R cache rows, S slots.
x = x + attn(norm(x)) ; x = x + mlp(norm(x)), RMSNorm before each, rotary positions, grouped keys and values, SwiGLU.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from treetune.core import grad, shard
from treetune.core.lora import Lora
from treetune.core.param import Param, Params
from treetune.models import decoder_attention, moe, rope_scaling
from treetune.models.decoder_attention import Cache, Rule
from treetune.models.moe import Experts
from treetune.models.rope_scaling import Rope, Rotation, Scaling
from treetune.ops import attention, lora_linear, noise, rms_norm, rope, swiglu
from treetune.ops.attention_torch import Weighting


@dataclass(frozen=True)
class Config:
    """Sizes of a dense decoder. `dtype` is the dtype it computes in, whatever its leaves are stored in.

    rope_part: the part of each head that turns. nope_layers: layers without rotary positions. experts: of the layers that have some.
    """

    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Scaling | None = None
    max_positions: int = 2048
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    layer_windows: tuple[int | None, ...] = ()  # one for each layer, instead of `window` on all
    attn_softcap: float | None = None
    attn_sinks: bool = False
    init_std: float = 0.02
    dtype: torch.dtype = torch.float32
    rope_part: float = 1.0
    nope_layers: tuple[int, ...] = ()
    experts: Experts | None = None

    @property
    def rope(self) -> Rope:
        """Base and scaling of the rotary positions."""
        return Rope(self.rope_theta, self.rope_scaling)

    @property
    def shared_positions(self) -> int:
        """Positions that prompts with their continuations may have: up to them the keys of a prompt serve all of its continuations."""
        return rope_scaling.shared_positions(self.rope, self.max_positions)

    @property
    def rotary_dim(self) -> int:
        """The features of each head that turn."""
        return int(self.head_dim * self.rope_part)

    def __post_init__(self) -> None:
        if self.layer_windows and len(self.layer_windows) != self.num_layers:
            raise ValueError(f"layer_windows has {len(self.layer_windows)} windows; expected {self.num_layers}, one for each layer")

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct windows of the layers, in tokens."""
        return tuple(dict.fromkeys(self.layer_windows or (self.window,)))

    def window_of(self, layer: int) -> int | None:
        """The window of a layer, in tokens; None: it sees all tokens before it."""
        return self.layer_windows[layer] if self.layer_windows else self.window

    @property
    def plain_attention(self) -> bool:
        """Whether no layer has a soft-cap or sinks."""
        return self.attn_softcap is None and not self.attn_sinks


class Neftune(NamedTuple):
    """Uniform noise of half-width alpha / sqrt(n D) on the embeddings of an n-token document; `seed` is the step's.

    Source: Jain et al., "NEFTune", arXiv 2310.05914. n is the true length of each document, so packing changes nothing.
    """

    alpha: float
    seed: Tensor


class Training(TypedDict, total=False):
    """What only training asks of a forward pass: noise on the embeddings, and which layers `remat` computes again in the backward."""

    noise: Neftune | None
    remat: str | None


class Out(NamedTuple):
    """hidden [T, D] after the last norm; features {layer: [T, D]} as asked; the cache that was written."""

    hidden: Tensor
    features: dict[int, Tensor]
    cache: Cache | None


class LogitMap(NamedTuple):
    """What a family does with the product z = h W^T of hidden states and output matrix: c tanh(s z / c), or s z where there is no cap c."""

    scale: float = 1.0
    softcap: float | None = None


def logit_map(cfg: Config) -> LogitMap:
    """The product as it is."""
    return LogitMap()


def map_logits(product: Tensor, rule: LogitMap) -> Tensor:
    """The logits of a product [..., V]."""
    z = product if rule.scale == 1 else product * rule.scale
    return z if rule.softcap is None else rule.softcap * torch.tanh(z / rule.softcap)


def abstract(cfg: Config, *, dtype: torch.dtype = torch.float32) -> Params:
    """The tree of `Param`s of a model: shapes, axes and initial values."""
    # What adds to the residual stream starts smaller by the number of additions, so that its variance does not grow with depth.
    normal, deep = f"normal:{cfg.init_std}", f"normal:{cfg.init_std / math.sqrt(2 * cfg.num_layers)}"
    leaf = partial(Param, dtype=dtype)
    tree_ = {
        "embed_tokens": leaf((cfg.vocab_size, cfg.hidden_size), axes=("vocab", "embed"), init=normal, op="embedding"),
        "layers": [_abstract_layer(cfg, index, leaf, normal, deep) for index in range(cfg.num_layers)],
        "norm": leaf((cfg.hidden_size,), axes=("embed",), init="ones"),
    }
    if not cfg.tied:
        tree_["lm_head"] = leaf((cfg.vocab_size, cfg.hidden_size), axes=("vocab", "embed"), init=normal, op="head")
    return tree_


def _abstract_layer(cfg: Config, index: int, leaf, normal: str, deep: str) -> Params:
    d, q, kv = cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    layer = {
        "input_norm": leaf((d,), axes=("embed",), init="ones"),
        "q_proj": leaf((q, d), axes=("heads", "embed"), init=normal, op="linear"),
        "k_proj": leaf((kv, d), axes=("kv_heads", "embed"), init=normal, op="linear"),
        "v_proj": leaf((kv, d), axes=("kv_heads", "embed"), init=normal, op="linear"),
        "o_proj": leaf((d, q), axes=("embed", "heads"), init=deep, op="linear"),
        "post_norm": leaf((d,), axes=("embed",), init="ones"),
        **_abstract_mlp(cfg, index, leaf, normal, deep),
    }
    if cfg.qkv_bias:
        sizes = {"q_bias": (q, "heads"), "k_bias": (kv, "kv_heads"), "v_bias": (kv, "kv_heads")}
        layer |= {name: leaf((size,), axes=(axis,), init="zeros") for name, (size, axis) in sizes.items()}
    if cfg.qk_norm:
        layer |= {name: leaf((cfg.head_dim,), axes=("head_dim",), init="ones") for name in ("q_norm", "k_norm")}
    if cfg.attn_sinks:
        layer["sinks"] = leaf((cfg.num_heads,), axes=("heads",), init="zeros")
    return layer


def _abstract_mlp(cfg: Config, index: int, leaf, normal: str, deep: str) -> Params:
    if cfg.experts is not None and index in cfg.experts.layers:
        return moe.abstract(cfg.experts, cfg.hidden_size, leaf, normal, deep)
    return {
        "gate_proj": leaf((cfg.mlp_size, cfg.hidden_size), axes=("mlp", "embed"), init=normal, op="linear"),
        "up_proj": leaf((cfg.mlp_size, cfg.hidden_size), axes=("mlp", "embed"), init=normal, op="linear"),
        "down_proj": leaf((cfg.hidden_size, cfg.mlp_size), axes=("embed", "mlp"), init=deep, op="linear"),
    }


def inv_freq(cfg: Config, device: torch.device) -> Tensor:
    """Rotary frequencies [r/2] in radians per position, float32."""
    return rope_scaling.inv_freq(cfg.rope, cfg.rotary_dim, device)


def _rotations(cfg: Config, batch: dict) -> list[Rotation | None]:
    """What each layer turns queries and keys by; None for one without positions."""
    rotation = rope_scaling.rotation(cfg.rope, cfg.rotary_dim, batch)
    return [None if index in cfg.nope_layers else rotation for index in range(cfg.num_layers)]


def token_keys(batch: dict, seed: Tensor) -> Tensor:
    """int64 [T]: a key per token from (seed, data set row of its document, branch, position); independent of packing."""
    lens = batch["cu_docs"].long().diff()
    rows = torch.zeros_like(lens).scatter(0, batch["doc_of_seq"], batch["row"] + 1)
    document = torch.repeat_interleave(rows, lens, output_size=batch["tokens"].shape[0])
    return noise.keys(seed, document, batch.get("branch", 0), batch["positions"])


def _dropout_keys(batch: dict, lora: Lora | None) -> Tensor | None:
    """The keys [T] that an adapter's dropout is drawn by; None where there is none."""
    if lora is None or lora.dropout == 0:
        return None
    if lora.seed is None:
        raise ValueError(f"the adapter has dropout {lora.dropout} and no seed to draw it from: give a seed, or no dropout")
    return token_keys(batch, lora.seed)


def forward(
    weights: Params,
    batch: dict,
    plan: attention.Plan | None,
    cfg: Config,
    *,
    lora: Lora | None = None,
    cache: Cache | None = None,
    collect: Sequence[int] = (),
    **training: Unpack[Training],
) -> Out:
    """Hidden states of a packed stream. With a cache and no plan, each token attends to its cache row up to its own slot."""
    x = _embed(weights, batch["tokens"], cfg, lora)  # [T, D]
    remat, neftune = training.get("remat"), training.get("noise")
    if neftune is not None:
        x = x + _neftune(x, batch, neftune)
    adapters = lora.tree.get("layers", []) if lora else []
    bare = lora and lora._replace(tree={})  # rematerialisation walks all that a layer is given
    shared = _Shared(cfg, batch["positions"], None, plan, cache, bare, _dropout_keys(batch, lora))
    layer_fn, features, rotations = grad.remat(_layer, remat), {}, _rotations(cfg, batch)
    for index, layer in enumerate(weights["layers"]):
        if index in collect:
            features[index] = x
        # A rematerialised layer gathers its sharded leaves again by itself.
        with contextlib.nullcontext() if remat else shard.gathering_again(layer):
            x = layer_fn(x, layer, adapters[index] if index < len(adapters) else {}, index, shared._replace(rotation=rotations[index]))
    if len(weights["layers"]) in collect:
        features[len(weights["layers"])] = x
    hidden = rms_norm.rms_norm(x, shard.gather(weights["norm"], cfg.dtype), eps=cfg.norm_eps)
    return Out(hidden, features, cache)


def head(weights: Params, cfg: Config, lora: Lora | None = None) -> Tensor:
    """The output matrix [V, D] in the compute dtype: `lm_head`, or the embedding of a tied model.

    An adapter on the head adds its B [V, r] as further columns, which meet those of `widen`: the low-rank part is never
    rounded into the weight, so bfloat16 loses nothing of it.
    """
    weight = shard.gather(weights["lm_head"] if "lm_head" in weights else weights["embed_tokens"], cfg.dtype)
    if lora is None or "lm_head" not in lora.tree:
        return weight
    return torch.cat([weight, shard.gather(lora.tree["lm_head"]["B"], cfg.dtype)], dim=1)


def widen(hidden: Tensor, lora: Lora | None = None, key: Tensor | None = None) -> Tensor:
    """hidden [N, D] -> [N, D + r] with s u A^T beside it, where an adapter sits on the head; u is hidden after dropout by `key` [N]."""
    if lora is None or "lm_head" not in lora.tree:
        return hidden
    u = hidden if key is None else noise.dropout(hidden, key, rate=lora.dropout, stream=_HEAD_STREAM)
    low = lora.scale * (u @ shard.gather(lora.tree["lm_head"]["A"], hidden.dtype).T)
    return torch.cat([hidden, low], dim=1)


def read(hidden: Tensor, batch: dict, lora: Lora | None = None) -> Tensor:
    """The read rows [N, D] (or [N, D + r], see `widen`) of the hidden states [T, D] of a stream."""
    at = batch["at"]
    keys = _dropout_keys(batch, lora) if lora is not None and "lm_head" in lora.tree else None
    return widen(hidden[at], lora, None if keys is None else keys[at])


_STREAMS = {"q_proj": 0, "o_proj": 1, "gate_proj": 2, "down_proj": 3}
_HEAD_STREAM = (1 << 20) + 1
_NEFTUNE_STREAM = 1 << 20


class _Shared(NamedTuple):
    """What every layer needs besides its own weights and adapters: of `lora` scale, dropout and seed. The rotation is the layer's own."""

    cfg: Config
    positions: Tensor
    rotation: Rotation | None
    plan: attention.Plan | None
    cache: Cache | None
    lora: Lora | None
    key: Tensor | None


def _embed(weights: Params, tokens: Tensor, cfg: Config, lora: Lora | None) -> Tensor:
    x = F.embedding(tokens, shard.gather(weights["embed_tokens"], cfg.dtype))
    if lora is None or "embed_tokens" not in lora.tree:
        return x
    ab = shard.gather_all(lora.tree["embed_tokens"], cfg.dtype)
    return x + lora.scale * F.embedding(tokens, ab["A"].T) @ ab["B"].T


def _neftune(x: Tensor, batch: dict, option: Neftune) -> Tensor:
    lens = batch["cu_docs"].long().diff()
    length = torch.repeat_interleave(lens, lens, output_size=x.shape[0])  # [T]
    width = option.alpha / torch.sqrt(length.float() * x.shape[1])
    unit = noise.uniform(token_keys(batch, option.seed), x.shape[1], stream=_NEFTUNE_STREAM) * 2 - 1
    return (unit * width[:, None]).to(x.dtype)


def _layer(x: Tensor, layer: Params, adapters: Params, index: int, s: _Shared) -> Tensor:
    w, ab = shard.gather_all(layer, s.cfg.dtype), shard.gather_all(adapters)
    x = x + _attention(rms_norm.rms_norm(x, w["input_norm"], eps=s.cfg.norm_eps), w, ab, index, s)
    h = rms_norm.rms_norm(x, w["post_norm"], eps=s.cfg.norm_eps)
    if s.cfg.experts is not None and "router" in w:
        return x + moe.mlp(h, w, ab, s.cfg.experts, s.lora)[0]
    gate, up = _project(h, ("gate_proj", "up_proj"), w, ab, index, s)
    return x + _project(swiglu.swiglu(gate, up), ("down_proj",), w, ab, index, s)[0]


def _project(x: Tensor, names: tuple[str, ...], w: Params, ab: Params, index: int, s: _Shared) -> list[Tensor]:
    """x through the named projections and their adapters; each name has its own dropout stream in each layer."""
    u = None
    if s.key is not None and s.lora is not None and any(name in ab for name in names):
        u = noise.dropout(x, s.key, rate=s.lora.dropout, stream=len(_STREAMS) * index + _STREAMS[names[0]])
    scale = s.lora.scale if s.lora else 1.0
    return lora_linear.lora_linears(x, [w[name] for name in names], [ab.get(name) for name in names], scale=scale, u=u)


def _attention(h: Tensor, w: Params, ab: Params, index: int, s: _Shared) -> Tensor:
    cfg = s.cfg
    q, k, v = _project(h, ("q_proj", "k_proj", "v_proj"), w, ab, index, s)
    if "q_bias" in w:
        q, k, v = q + w["q_bias"], k + w["k_bias"], v + w["v_bias"]
    q, k, v = (t.view(t.shape[0], -1, cfg.head_dim) for t in (q, k, v))  # [T, H, d], [T, K, d]
    if "q_norm" in w:
        q, k = (rms_norm.rms_norm(t, w[name], eps=cfg.norm_eps) for t, name in ((q, "q_norm"), (k, "k_norm")))
    if s.rotation is not None:
        q, k = rope.rope(q, k, s.positions, s.rotation.inv_freq, scale=s.rotation.scale)
    rule = Rule(cfg.window_of(index), Weighting(cfg.head_dim**-0.5, cfg.attn_softcap, w.get("sinks")))
    mixed = decoder_attention.mix(q, k, v, index, rule, plan=s.plan, cache=s.cache)
    return _project(mixed.reshape(h.shape[0], -1), ("o_proj",), w, ab, index, s)[0]


def probe(weights: Params, tokens: Tensor, cfg: Config, *, lora: Lora | None = None) -> Tensor:
    """Logits [T, V] in float32 of one document of token ids [T]: for checks and small prompts only."""
    batch = single(tokens)
    hidden = forward(weights, batch, decoder_attention.plan(batch, cfg), cfg, lora=lora).hidden
    return (widen(hidden, lora) @ head(weights, cfg, lora).T).float()


def single(tokens: Tensor) -> dict[str, Tensor]:
    """The stream of one bare document, nothing scored."""
    size, device = tokens.shape[0], tokens.device
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return {
        "tokens": tokens, "positions": torch.arange(size, device=device), "at": none, "targets": none, "seq": none,
        "cu_docs": torch.tensor([0, size], dtype=torch.int32, device=device),
        "seq_lens": torch.zeros(1, dtype=torch.int64, device=device),
        "doc_of_seq": torch.zeros(1, dtype=torch.int64, device=device), "row": torch.zeros(1, dtype=torch.int64, device=device),
    }  # fmt: skip


def kv_shape(cfg: Config, rows: int, slots: int) -> tuple[int, ...]:
    """Shape of one layer's cached keys (or values)."""
    return (rows, slots, cfg.num_kv_heads, cfg.head_dim)
