"""The dense decoder that all native families share; what a layer does follows from its leaves and the switches of `decoder_config`.

T stream tokens, D hidden, H heads, K key/value heads, d head dim, F mlp width, L layers, V vocabulary, R cache rows, S slots.
x = x + attn(norm(x)) ; x = x + mlp(norm(x)), RMSNorm before each or after it, rotary positions, grouped keys and values, a gated mlp.
"""

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from treetune.core import gathers, grad, heartbeat, layer_offload, quant, shard, tree
from treetune.core.lora import Lora
from treetune.core.param import Params
from treetune.models import decoder_attention, decoder_config, moe, rope_scaling, tensor_rules
from treetune.models.decoder_attention import Cache, Rule
from treetune.models.decoder_config import Config
from treetune.models.rope_scaling import Rotation
from treetune.ops import attention, context_parallel, geglu, lora_linear, magnitude, noise, rms_norm, rope, swiglu, tensor_parallel
from treetune.ops.attention_torch import Weighting
from treetune.ops.fp8_linear import Rows
from treetune.ops.tensor_parallel import Split

abstract = decoder_config.abstract


class Neftune(NamedTuple):
    """Uniform noise of half-width alpha / sqrt(n D) on the embeddings of an n-token document; `seed` is the step's.

    Source: Jain et al., "NEFTune", arXiv 2310.05914. n is the true length of each document, so packing changes nothing.
    """

    alpha: float
    seed: Tensor


class Training(TypedDict, total=False):
    """What only training asks of a forward pass.

    noise: on the embeddings. remat: what of a layer is kept for the backward, see `grad.remat`. routing: the logits of routers, see `Out`.
    output: the output matrix is read next.
    """

    noise: Neftune | None
    remat: str | None
    routing: bool
    output: bool


class Out(NamedTuple):
    """hidden [T, D] after the last norm; features {layer: [T, D]} as asked; the cache that was written.

    routing: the router's logits [T, E] of each layer with experts, where they were asked for.
    """

    hidden: Tensor
    features: dict[int, Tensor]
    cache: Cache | None
    routing: Sequence[Tensor] = ()


class LogitMap(NamedTuple):
    """What a family does with the product z = h W^T of hidden states and output matrix: c tanh(s z / c), or s z where there is no cap c."""

    scale: float = 1.0
    softcap: float | None = None


def logit_map(cfg: Config) -> LogitMap:
    """Scale and soft-cap of the product."""
    return LogitMap(cfg.logit_scale, cfg.logit_softcap)


def map_logits(product: Tensor, rule: LogitMap) -> Tensor:
    """The logits of a product [..., V]."""
    z = product if rule.scale == 1 else product * rule.scale
    return z if rule.softcap is None else rule.softcap * torch.tanh(z / rule.softcap)


def _rotations(cfg: Config, batch: dict) -> list[Rotation | None]:
    """What each layer turns queries and keys by; None for one without positions."""
    full = rope_scaling.rotation(cfg.rope, cfg.rotary_dim, batch)
    windowed = rope_scaling.rotation(cfg.window_rope, cfg.rotary_dim, batch) if cfg.window_rope else full
    every = [full if cfg.window_of(index) is None else windowed for index in range(cfg.num_layers)]
    return [None if index in cfg.nope_layers else rotation for index, rotation in enumerate(every)]


def token_keys(batch: dict, seed: Tensor) -> Tensor:
    """int64 [T]: a key per token from (seed, data set row of its document, branch, position); independent of packing."""
    lens = batch["cu_docs"].long().diff()
    rows = torch.zeros_like(lens).scatter(0, batch["doc_of_seq"], batch["row"] + 1)
    document = torch.repeat_interleave(rows, lens, output_size=batch["tokens"].shape[0])
    return noise.keys(seed, document, batch.get("branch", 0), batch["positions"])


def dropout_keys(batch: dict, lora: Lora | None) -> Tensor | None:
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
    heartbeat.beat()
    adapters = lora.tree.get("layers", []) if lora else []
    layers = layer_offload.arriving(weights["layers"], batch["tokens"].device)
    own = [adapters[index] if index < len(adapters) else {} for index in range(len(layers))]
    gathers.begin(weights["embed_tokens"], cfg.dtype)
    passage = gathers.passage(((layer, cfg.dtype), (pairs, None)) for layer, pairs in zip(layers, own, strict=True))
    split = tensor_rules.split_of(weights)
    part = plan.part if plan is not None and cache is None else None  # the tokens of this rank, where ranks share the stream
    x = _embed(weights, context_parallel.own(part, batch["tokens"]), cfg, lora, split)  # [T, D]
    remat, neftune = training.get("remat"), training.get("noise")
    if neftune is not None:
        x = x + context_parallel.own(part, embedding_noise(x.shape[1], batch, neftune)).to(x.dtype)
    x = x if cfg.embed_scale == 1 else x * cfg.embed_scale
    bare = lora and lora._replace(tree={})  # rematerialisation walks all that a layer is given
    keys, positions = dropout_keys(batch, lora), context_parallel.own(part, batch["positions"])
    keys = None if keys is None else context_parallel.own(part, keys)
    shared = _Shared(cfg, positions, None, plan, cache, bare, keys, passage, split)
    layer_fn, features, rotations, routing = grad.remat(_layer, remat), {}, _rotations(cfg, batch), []
    again = grad.recomputes(remat)
    for index, layer in enumerate(layers):
        if index in collect:
            (features[index],) = context_parallel.joined(part, x)
        if index + 1 == len(layers):
            _begin_ends(weights, cfg, head=training.get("output", False))
        # A rematerialised layer gathers its sharded leaves again by itself.
        with contextlib.nullcontext() if again else shard.gathering_again(layer):
            x, logits = layer_fn(x, layer, own[index], index, shared._replace(rotation=rotations[index]))
        if logits is not None and training.get("routing"):
            routing.append(context_parallel.joined(part, logits)[0])
    if passage is not None:
        passage.turn(back=torch.is_grad_enabled())
    if len(weights["layers"]) in collect:
        (features[len(weights["layers"])],) = context_parallel.joined(part, x)
    (hidden,) = context_parallel.joined(part, _normed(x, shard.gather(weights["norm"], cfg.dtype), cfg))
    return Out(hidden, features, cache, routing)


def head(weights: Params, cfg: Config, lora: Lora | None = None) -> Tensor:
    """The output matrix [V, D] in the compute dtype: `lm_head`, or the embedding of a tied model.

    A bias is a further column, and so is the B [V, r] of an adapter, which meet those of `widen`: the low-rank part is never rounded
    into the weight, so bfloat16 loses nothing of it.
    """
    weight = shard.gather(_output(weights), cfg.dtype)
    columns = [shard.gather(weights["lm_head_bias"], cfg.dtype)[:, None]] if cfg.head_bias else []
    columns += [shard.gather(lora.tree["lm_head"]["B"], cfg.dtype)] if lora is not None and "lm_head" in lora.tree else []
    return torch.cat([weight, *columns], dim=1) if columns else weight


def _output(weights: Params) -> Any:
    return weights["lm_head"] if "lm_head" in weights else weights["embed_tokens"]


def _begin_ends(weights: Params, cfg: Config, *, head: bool) -> None:
    """Have what is behind the layers travel while the last of them computes."""
    for leaf in [weights["norm"], *([_output(weights)] if head else [])]:
        gathers.begin(leaf, cfg.dtype)


def widen(hidden: Tensor, cfg: Config, lora: Lora | None = None, key: Tensor | None = None) -> Tensor:
    """hidden [N, D] with 1 beside it for the bias of the head, and s u A^T for an adapter on it: u is hidden after dropout by `key` [N]."""
    columns = [hidden.new_ones(hidden.shape[0], 1)] if cfg.head_bias else []
    if lora is not None and "lm_head" in lora.tree:
        u = hidden if key is None else noise.dropout(hidden, key, rate=lora.dropout, stream=_HEAD_STREAM)
        columns.append(lora.scale * (u @ shard.gather(lora.tree["lm_head"]["A"], hidden.dtype).T))
    return torch.cat([hidden, *columns], dim=1) if columns else hidden


def read(hidden: Tensor, batch: dict, cfg: Config, lora: Lora | None = None) -> Tensor:
    """The read rows [N, D] of the hidden states [T, D] of a stream, widened."""
    at = batch["at"]
    keys = dropout_keys(batch, lora) if lora is not None and "lm_head" in lora.tree else None
    return widen(hidden[at], cfg, lora, None if keys is None else keys[at])


_STREAMS = {"q_proj": 0, "o_proj": 1, "gate_proj": 2, "down_proj": 3}
_ENDS = ("o_proj", "down_proj")  # what brings heads, or features of the mlp, together
_HEAD_STREAM = (1 << 20) + 1
_NEFTUNE_STREAM = 1 << 20


class _Shared(NamedTuple):
    """What every layer needs besides its own weights and adapters: of `lora` scale, dropout and seed. The rotation is the layer's own.

    split: the ranks among which layers are split; each has some of the heads, of the features of the mlp, of the experts.
    """

    cfg: Config
    positions: Tensor
    rotation: Rotation | None
    plan: attention.Plan | None
    cache: Cache | None
    lora: Lora | None
    key: Tensor | None
    passage: gathers.Passage | None = None
    split: Split | None = None


def _embed(weights: Params, tokens: Tensor, cfg: Config, lora: Lora | None, split: Split | None) -> Tensor:
    table = shard.gather(weights["embed_tokens"], cfg.dtype)
    x = F.embedding(tokens, table) if split is None else _own_rows(table, tokens, cfg.vocab_size, split)
    if lora is not None and "embed_tokens" in lora.tree:
        ab = shard.gather_all(lora.tree["embed_tokens"], cfg.dtype)
        x = x + lora.scale * F.embedding(tokens, ab["A"].T) @ ab["B"].T
    return x * cfg.embed_factor if cfg.embed_sqrt else x


def _own_rows(table: Tensor, tokens: Tensor, vocabulary: int, split: Split) -> Tensor:
    """Embeddings [T, D] of tokens from the rows [v, D] that each rank has."""
    first, end = split.part(vocabulary)
    elsewhere = (tokens < first) | (tokens >= end)
    own = F.embedding(torch.where(elsewhere, 0, tokens - first), table).masked_fill(elsewhere[:, None], 0)
    return tensor_parallel.leave(split, own)


def embedding_noise(dim: int, batch: dict, option: Neftune) -> Tensor:
    """The noise [T, D] of `Neftune`, float32."""
    lens = batch["cu_docs"].long().diff()
    length = torch.repeat_interleave(lens, lens, output_size=batch["tokens"].shape[0])  # [T]
    width = option.alpha / torch.sqrt(length.float() * dim)
    unit = noise.uniform(token_keys(batch, option.seed), dim, stream=_NEFTUNE_STREAM) * 2 - 1
    return unit * width[:, None]


def _layer(x: Tensor, layer: Params, adapters: Params, index: int, s: _Shared) -> tuple[Tensor, Tensor | None]:
    """The residual stream after a layer, and the logits of its router where it has experts."""
    if s.passage is not None:
        layer, adapters = s.passage.whole(index, layer, adapters)
    w, ab = tree.map(partial(_computed_with, dtype=s.cfg.dtype), layer), shard.gather_all(adapters)
    x = _add(x, _attention(_normed(x, w.get("input_norm"), s.cfg), w, ab, index, s), w.get("attn_out_norm"), s.cfg)
    y, routing = _mlp(_normed(x, w.get("post_norm"), s.cfg), w, ab, index, s)
    return _add(x, y, w.get("mlp_out_norm"), s.cfg), routing


def _computed_with(leaf: Any, dtype: torch.dtype) -> Any:
    """The whole leaf, or its codes where these are multiplied."""
    return Rows(leaf.codes, leaf.scale) if quant.quantised(leaf) and leaf.multiplied else shard.gather(leaf, dtype)


def _normed(x: Tensor, weight: Tensor | None, cfg: Config) -> Tensor:
    """RMSNorm over the last dim; x as it is where a layer has no such norm."""
    if weight is None:
        return x
    if cfg.norm == "llama":
        return rms_norm.rms_norm(x, weight, eps=cfg.norm_eps)
    scale = weight if cfg.norm == "olmo" else 1 + weight.to(torch.promote_types(weight.dtype, torch.float32))
    return rms_norm.rms_norm(x, scale, eps=cfg.norm_eps, once=True)


def _add(x: Tensor, y: Tensor, norm: Tensor | None, cfg: Config) -> Tensor:
    """What attention or mlp adds to the residual stream."""
    y = _normed(y, norm, cfg)
    return x + y if cfg.residual_scale == 1 else x + y * cfg.residual_scale


def _mlp(h: Tensor, w: Params, ab: Params, index: int, s: _Shared) -> tuple[Tensor, Tensor | None]:
    if s.cfg.experts is not None and "router" in w:
        return moe.mlp(h, w, ab, s.cfg.experts, s.lora, s.split)
    gate, up = _project(h, ("gate_proj", "up_proj"), w, ab, index, s)
    gated = swiglu.swiglu(gate, up) if s.cfg.activation == "silu" else geglu.geglu(gate, up)
    return _project(gated, ("down_proj",), w, ab, index, s)[0], None


def _project(x: Tensor, names: tuple[str, ...], w: Params, ab: Params, index: int, s: _Shared) -> list[Tensor]:
    """x through the named projections and their adapters; each name has its own dropout stream in each layer.

    Where layers are split, x of those that begin a block is whole and each rank has some of their rows; those that end it have columns.
    """
    adapters, ends, u = [ab.get(name) for name in names], names[0] in _ENDS, None
    if s.split is not None:
        adapters = [_of_known_length(w[name], ab, s, ends=ends) for name, ab in zip(names, adapters, strict=True)]
        x, adapters = _entered(x, adapters, s.split, ends=ends)
    if s.key is not None and s.lora is not None and any(name in ab for name in names):
        first = s.split.rank * x.shape[1] if s.split is not None and ends else 0
        u = noise.dropout(x, s.key, rate=s.lora.dropout, stream=len(_STREAMS) * index + _STREAMS[names[0]], first=first)
    scale = s.lora.scale if s.lora else 1.0
    out = lora_linear.lora_linears(x, [w[name] for name in names], adapters, scale=scale, u=u)
    return [tensor_parallel.leave(s.split, y) for y in out] if ends else out


def _of_known_length(weight: Tensor, adapter: dict | None, s: _Shared, *, ends: bool) -> dict | None:
    """The adapter; with the magnitude over the norms of rows where each rank has a part of every row."""
    if not adapter or not ends or magnitude.TRAINED not in adapter or s.split is None or s.lora is None:
        return adapter
    norms = magnitude.split_norms(weight, adapter["A"], adapter["B"], s.lora.scale, s.split)
    rest = {name: leaf for name, leaf in adapter.items() if name != magnitude.TRAINED}
    return rest | {magnitude.SETTLED: tensor_parallel.enter(s.split, adapter[magnitude.TRAINED])[0] / norms}


def _entered(x: Tensor, adapters: list[dict | None], split: Split, *, ends: bool) -> tuple[Tensor, list[dict | None]]:
    """x and the sides of adapters that ranks have whole, of whose gradients each computes a share."""
    side, inputs = "B" if ends else "A", [] if ends else [x]
    entered = iter(tensor_parallel.enter(split, *inputs, *(adapter[side] for adapter in adapters if adapter)))
    x = x if ends else next(entered)
    return x, [adapter | {side: next(entered)} if adapter else None for adapter in adapters]


def _attention(h: Tensor, w: Params, ab: Params, index: int, s: _Shared) -> Tensor:
    cfg = s.cfg
    q, k, v = _project(h, ("q_proj", "k_proj", "v_proj"), w, ab, index, s)
    if "q_bias" in w:
        q, k, v = q + w["q_bias"], k + w["k_bias"], v + w["v_bias"]
    if "q_norm" in w:  # head by head, or all of them together: as many features as the weight has
        norms = tensor_parallel.enter(s.split, w["q_norm"], w["k_norm"])
        q, k = (_normed_heads(t, norm, cfg, s.split) for t, norm in zip((q, k), norms, strict=True))
    q, k, v = (t.view(t.shape[0], -1, cfg.head_dim) for t in (q, k, v))  # [T, H, d], [T, K, d]
    if s.rotation is not None:
        q, k = rope.rope(q, k, s.positions, s.rotation.inv_freq, scale=s.rotation.scale)
    rule = Rule(cfg.window_of(index), Weighting(cfg.query_scale, cfg.attn_softcap, w.get("sinks")))
    mixed = decoder_attention.mix(q, k, v, index, rule, plan=s.plan, cache=s.cache)
    out = _project(mixed.reshape(h.shape[0], -1), ("o_proj",), w, ab, index, s)[0]
    return out + w["o_bias"] if "o_bias" in w else out


def _normed_heads(t: Tensor, norm: Tensor, cfg: Config, split: Split | None) -> Tensor:
    """Queries or keys [T, H d] under a norm of each head, or of the heads of all ranks together: features by rows of the norm."""
    if split is None or not cfg.qk_norm_whole:
        return _normed(t.view(t.shape[0], -1, norm.shape[0]), norm, cfg)
    first, end = split.part(norm.shape[0])
    return _normed(tensor_parallel.join(split, t, norm.shape[0]), norm, cfg)[:, first:end].contiguous()


def probe(weights: Params, tokens: Tensor, cfg: Config, *, lora: Lora | None = None, rule: LogitMap | None = None) -> Tensor:
    """Logits [T, V] in float32 of one document of token ids [T], mapped by `rule` or by `logit_map`: for checks and small prompts only."""
    batch = single(tokens)
    hidden = forward(weights, batch, decoder_attention.plan(batch, cfg), cfg, lora=lora).hidden
    return map_logits((widen(hidden, cfg, lora) @ head(weights, cfg, lora).T).float(), rule or logit_map(cfg))


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
