"""The forward pass of a bridged model: a packed stream through transformers' base model, or its documents one at a time.

T stream tokens, D hidden. The output matrix is no part of it: our own head reads the hidden states.
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from treetune.core import gathers, grad, heartbeat, layer_offload, shard, tree
from treetune.core.lora import Lora
from treetune.core.param import Params
from treetune.models import bridge_modules, decoder_attention, dense
from treetune.models.bridge_attention import Heads
from treetune.models.bridge_modules import Adapters, Binding
from treetune.models.bridge_skeleton import EMBEDDING, HEAD, LAYERS, Skeleton
from treetune.models.decoder_attention import Rule
from treetune.ops import attention
from treetune.ops.attention_torch import Weighting


class Kept(NamedTuple):
    """The sampler's cache, and the number of each layer's first cache in it, and of all: a layer has one for each call of attention."""

    cache: dense.Cache | None
    first: tuple[int, ...]


class Run(NamedTuple):
    """One forward pass: what its layers need besides their own weights. `outer` are whole leaves outside of layers."""

    skeleton: Skeleton
    dtype: torch.dtype
    weights: Params
    outer: Mapping[str, Tensor]
    adapters: Adapters
    noise: Tensor | None
    plan: attention.Plan | None
    kept: Kept
    collect: Sequence[int]
    features: dict[int, Tensor]
    remat: str | None
    passage: gathers.Passage | None = None


def prepare(
    skeleton: Skeleton,
    weights: Params,
    batch: dict,
    dtype: torch.dtype,
    *,
    plan: attention.Plan | None = None,
    lora: Lora | None = None,
    kept: Kept,
    collect: Sequence[int] = (),
    **training: Unpack[dense.Training],
) -> Run:
    """A run over a batch."""
    heartbeat.beat()
    if training.get("routing"):
        raise ValueError(f"the routers of {type(skeleton.model).__name__} are transformers' own: losses of routing are not computed for it")
    weights = weights | {LAYERS: layer_offload.arriving(weights[LAYERS], batch["tokens"].device)}
    others = {name: part for name, part in weights.items() if name not in (LAYERS, HEAD)}
    for path, leaf in tree.items(others):
        gathers.begin(leaf, skeleton.wide.get(path, dtype))
    outer = {path: _whole(leaf, path, skeleton, dtype) for path, leaf in tree.items(others)}
    neftune = training.get("noise")
    noise = None if neftune is None else dense.embedding_noise(outer[EMBEDDING].shape[1], batch, neftune).to(dtype)
    adapters = _adapters(lora, batch, skeleton)
    return Run(skeleton, dtype, weights, outer, adapters, noise, plan, kept, collect, {}, training.get("remat"))


def _whole(leaf: Tensor, path: str, skeleton: Skeleton, dtype: torch.dtype) -> Tensor:
    return shard.gather(leaf, skeleton.wide.get(path, dtype))


def _adapters(lora: Lora | None, batch: dict, skeleton: Skeleton) -> Adapters:
    if lora is None:
        return Adapters({})
    pairs: dict[str, dict[str, Tensor]] = {}
    for path, leaf in tree.items(lora.tree):
        owner, _, side = path.rpartition(".")
        pairs.setdefault(owner, {})[side] = leaf
    if odd := [path for path in pairs if path not in skeleton.linears | skeleton.experts and path not in (EMBEDDING, HEAD)]:
        raise ValueError(f"{odd[0]} takes no adapter: it is no linear layer, and no stack of experts")
    return Adapters(pairs, lora.scale, lora.dropout, dense.dropout_keys(batch, lora))


def packed(run: Run, batch: dict) -> Tensor:
    """Hidden states [T, D] of the whole stream at once."""
    return _through(run, batch["tokens"], batch["positions"])


def one_by_one(run: Run, batch: dict) -> Tensor:
    """Hidden states [T, D] of each document by itself; a branch goes through with a copy of what it sees of its trunk.

    Ranks that have parts of the weights go through as often as the one with most documents.
    """
    if (cache := run.kept.cache) is not None:
        cache.k[0][cache.rows, cache.slots] = batch["tokens"]
        if run.plan is None:
            return _again(run, cache)
    parts, states, pieces = [], {layer: [] for layer in run.collect}, list(_documents(batch))
    idle = gathers.most(tree.leaves([run.weights[LAYERS], run.adapters.pairs]), len(pieces)) - len(pieces)
    first = torch.zeros(1, dtype=torch.int64, device=batch["tokens"].device)
    for rows, own in [*pieces, *[(first, 0)] * idle]:
        piece = run._replace(adapters=_rows_of(run.adapters, rows), noise=None if run.noise is None else run.noise[rows], features={})
        skip = len(rows) - own
        parts.append(_through(piece, batch["tokens"][rows])[skip:])  # of an idle pass nothing, through which a backward pass goes, too
        for layer, hidden in piece.features.items():
            states[layer].append(hidden[skip:])
    run.features.update({layer: torch.cat(hidden) for layer, hidden in states.items() if hidden})
    return torch.cat(parts)


def _again(run: Run, cache: dense.Cache) -> Tensor:
    """Hidden states [R, D] of the last token of each row of a cache of ids."""
    ids, ends = cache.k[0], (cache.slots + 1).tolist()
    before = cache.before or [ids[0, :0]] * len(ends)
    texts = [torch.cat([first, ids[row, :end]]) for row, (first, end) in enumerate(zip(before, ends, strict=True))]
    return torch.stack([_through(run, text)[-1] for text in texts])


def _rows_of(adapters: Adapters, rows: Tensor) -> Adapters:
    return adapters if adapters.key is None else adapters._replace(key=adapters.key[rows])


def _documents(batch: dict) -> Iterator[tuple[Tensor, int]]:
    """Rows of each trunk, and of each branch behind what it sees of its trunk, with how many of them, the last, are its own."""
    bounds, device = batch["cu_docs"].tolist(), batch["tokens"].device
    for lo, hi in zip(bounds, bounds[1:], strict=False):
        sizes = batch["branch"][lo:hi].bincount().tolist() if "branch" in batch and hi > lo else [hi - lo]
        first = lo
        for number, size in enumerate(sizes):
            seen = int(batch["start"][first]) if number and size else 0
            rows = torch.cat([torch.arange(lo, lo + seen), torch.arange(first, first + size)])
            first += size
            if size:
                yield rows.to(device), size


def _through(run: Run, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    """Tokens [T] through the base model: [T, D]. Without positions they are one document."""
    run = run._replace(passage=gathers.passage(_travelling(run, index) for index in range(len(run.weights[LAYERS]))))
    skeleton, seen = run.skeleton, bridge_modules.Reader()
    copies: dict[int, Any] = {id(layer): _lazy(layer, index, run) for index, layer in enumerate(skeleton.layers)}
    binding = Binding(skeleton, run.outer, run.adapters, None, run.noise)
    base = bridge_modules.bound(skeleton.base, binding, copies | {id(skeleton.head): seen})
    options = {} if positions is None else {"position_ids": positions[None]}
    states = base(input_ids=tokens[None], use_cache=False, **options)[0][0]
    if run.passage is not None:
        run.passage.turn()
    return states if seen.states is None else seen.states[0]


def _travelling(run: Run, index: int) -> list[tuple[Params, gathers.Computed]]:
    """What a layer gathers at its top, with the dtypes that it is computed in: its leaves and adapters, by their paths in the model."""
    own = {f"{LAYERS}.{index}.{path}": leaf for path, leaf in tree.items(run.weights[LAYERS][index])}
    return [(own, {path: run.skeleton.wide.get(path, run.dtype) for path in own}), (_pairs(run, index), None)]


def _pairs(run: Run, index: int) -> dict[str, dict[str, Tensor]]:
    pairs = run.adapters.pairs
    return {path: pairs[path] for path in run.skeleton.needs[index] if path in pairs}


def _lazy(layer: Any, index: int, run: Run) -> Any:
    """A copy of a layer that binds its weights when it is called."""
    copy = object.__new__(type(layer))
    copy.__dict__.update(layer.__dict__)
    copy.__dict__["forward"] = partial(_layer, layer, index, run)
    return copy


def _layer(layer: Any, index: int, run: Run, *args: Any, **options: Any) -> Any:
    x = args[0] if args else options["hidden_states"]
    if index in run.collect:
        run.features[index] = x[0]
    if index >= len(run.weights[LAYERS]):
        return x
    own = run.weights[LAYERS][index]
    needs = _needs(run, index, own)

    def compute(x: Tensor, needs: Mapping[str, Tensor], *_: Any) -> Any:
        adapters = run.adapters
        if run.passage is not None:
            needs, pairs = run.passage.whole(index, dict(needs), _pairs(run, index))
            adapters = adapters._replace(pairs={**adapters.pairs, **pairs})
        tensors = {path: _whole(leaf, path, run.skeleton, run.dtype) for path, leaf in needs.items()}
        calls = itertools.count(run.kept.first[index]) if run.kept.first else None
        attend = None if calls is None else partial(_attend, calls=calls, run=run)
        first, more = ((x, *args[1:]), options) if args else ((), options | {"hidden_states": x})
        out = bridge_modules.bound(layer, Binding(run.skeleton, tensors, adapters, attend))(*first, **more)
        if calls is not None and (number := next(calls)) != run.kept.first[index + 1]:
            raise ValueError(f"layer {index} of {type(layer).__name__} has called attention {number - run.kept.first[index]} times")
        return out

    # What the layer reads beside its input is given, too, so that a policy can tell it from what the layer computes.
    others = [run.adapters.pairs.get(path) for path in needs], args[1:], options
    # A rematerialised layer gathers its sharded leaves again by itself.
    with contextlib.nullcontext() if grad.recomputes(run.remat) else shard.gathering_again(own):
        return grad.remat(compute, run.remat)(x, needs, *others)


def _needs(run: Run, index: int, own: Params) -> dict[str, Any]:
    """The leaves of a layer by path, those that it shares with others included. Layers may be made when they are asked for."""
    leaves = {f"{LAYERS}.{index}.{path}": leaf for path, leaf in tree.items(own)}
    wanted = run.skeleton.needs[index]
    shared = {path for path in wanted if path not in leaves}
    if not all(path in run.outer for path in shared):
        leaves |= {path: leaf for path, leaf in tree.items(run.weights) if path in shared}
    return {path: leaves[path] if path in leaves else run.outer[path] for path in wanted}


def _attend(heads: Heads, *, calls: Iterator[int], run: Run) -> Tensor:
    rule = Rule(heads.window, Weighting(heads.scale, heads.softcap, heads.sinks))
    return decoder_attention.mix(heads.q, heads.k, heads.v, next(calls), rule, plan=run.plan, cache=run.kept.cache)
