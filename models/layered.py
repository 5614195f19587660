"""Merging in the memory of one layer: layers are read, merged, compared and written one at a time."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treetune.core import check, lora, param, shard, tree
from treetune.core.lora import Lora
from treetune.core.param import Params
from treetune.models import (
    MODELS,
    Model,
    bridge,
    expert_files,
    families,
    fetch,
    hf,
    hf_keys,
    hf_weights,
    loading,
    merging,
    processor,
    quantised,
)
from treetune.models import tokenizer as tokenizers
from treetune.models.fetch import Say, silent
from treetune.models.merging import Merged
from treetune.models.target import Target

LAYERS = "layers"


class Layers(list):
    """The layers of a tree, each made when it is asked for and kept by nobody here."""

    def __init__(self, count: int, make: Callable[[int], Params]) -> None:
        super().__init__([None] * count)
        self.make = make

    def __iter__(self) -> Iterator[Params]:
        """The layers in order, made one after another."""
        return (self.make(index) for index in range(len(self)))

    def __getitem__(self, index: Any) -> Params:
        """A layer."""
        return self.make(index)


def load(chosen: Target, *, say: Say = silent) -> tuple[Model, Lora]:
    """A model whose layers are read as they are asked for, the adapter's whole weights laid over it, and the adapter.

    Errors: ValueError as `loading.load_adapted`, and for a model of transformers' modules or a .gguf file.
    """
    assert chosen.adapter is not None, "an adapter is to be merged"
    model = _read(chosen, say)
    if bad := check.not_finite(model.params):
        raise ValueError(f"{chosen.model} holds weights that are not finite: {', '.join(bad[:3])}; download or save the model again")
    loading.check_base(chosen.adapter, loading.identify_base(chosen.model, model), say=say)
    model = loading.match_rows(model, chosen.adapter, chosen.model, revision=chosen.revision)
    low, whole, _ = loading.load_adapter(chosen.adapter, model)
    base, own = model.params[LAYERS], whole.get(LAYERS, [])
    layers = Layers(len(base), lambda index: tree.merge(base[index], own[index] if index < len(own) else {}))
    return model._replace(params=tree.merge(_outer(model.params), _outer(whole)) | {LAYERS: layers}), low


def merge(model: Model, adapter: Lora, tokenizer: Callable[..., Any], *, dtype: torch.dtype) -> Merged:
    """As `merging.merge`, with layers that are made as they are asked for."""
    layers, own = model.params[LAYERS], adapter.tree.get(LAYERS, [])

    def one(index: int) -> Params:
        pair = ({LAYERS: [layers[index]]}, {LAYERS: [own[index] if index < len(own) else {}]})
        return _rounded(lora.merge(*pair, adapter.scale)[LAYERS][0], dtype)

    top = _rounded(lora.merge(_outer(model.params), _outer(adapter.tree), adapter.scale), dtype)
    merged = model._replace(params=top | {LAYERS: Layers(len(layers), one)})
    wide = {name: leaf.float() for name, leaf in top.items()}
    upcast = model._replace(params=wide | {LAYERS: Layers(len(layers), lambda index: tree.map(lambda leaf: leaf.float(), one(index)))})
    ids = merging.probe_ids(tokenizer, model.cfg)
    with torch.no_grad():
        pair = families.document_logits(model, ids, lora=adapter), families.document_logits(upcast, ids)
    return Merged(merged, merging.compare(*pair), len(ids))


def save(merged: Merged, path: Path, chosen: Target, tokenizer: Any) -> None:
    """Write the folder of the merged model, a layer to a file. Errors: ValueError where there is one."""
    model = merged.model
    params = model.params
    tied = "lm_head" not in params or (model.cfg.tied and torch.equal(params["lm_head"], params["embed_tokens"]))
    dtype = params["embed_tokens"].dtype
    config = MODELS[model.family].to_hf(replace(model.cfg, tied=tied))
    config |= {"dtype": str(dtype).removeprefix("torch.")} | hf.special_ids(tokenizer)
    sizes = MODELS[model.family].abstract(model.cfg, dtype=dtype)
    largest = max(param.count(layer) for layer in sizes[LAYERS]) * dtype.itemsize
    generation = hf.special_ids(tokenizer) | (tokenizers.generation_config(chosen.model, tokenizer, revision=chosen.revision) or {})
    beside = processor.read(chosen.model, revision=chosen.revision)
    hf.write(path, _tensors(model, tied), config, tokenizer=tokenizer, generation=generation, beside=beside, max_shard_bytes=largest)


def _tensors(model: Model, tied: bool) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of the files, in the order of the model."""
    split = hf_weights.parts(model.family, hf.abstract_of(model))
    for name, node in model.params.items():
        if name == LAYERS:
            groups = ({f"{LAYERS}.{index}.{path}": leaf for path, leaf in tree.items(layer)} for index, layer in enumerate(node))
        else:
            groups = iter([] if tied and name == "lm_head" else [{name: node}])
        for group in groups:
            for key, leaf in hf_keys.join(model.family, group).items():
                cut = expert_files.cut(leaf, split[key]) if key in split else {key: leaf}
                yield from ((part, rows.contiguous()) for part, rows in cut.items())


def _outer(params: Params) -> Params:
    return {name: leaf for name, leaf in params.items() if name != LAYERS}


def _rounded(params: Params, dtype: torch.dtype) -> Params:
    return tree.map(lambda leaf: shard.gather(leaf, dtype), params)


def _read(chosen: Target, say: Say) -> Model:
    path = fetch.resolve(chosen.model, say=say, revision=chosen.revision)
    if not path.is_dir():
        raise ValueError(f"merge_method memory_efficient reads layers from folders, and {path} is a file: take merge_method legacy")
    family, cfg = hf.read_config(path / "config.json")
    if isinstance(cfg, bridge.Config):
        raise ValueError(f"merge_method memory_efficient takes native families, and {path} is a {family} model: take merge_method legacy")
    cfg = replace(cfg, dtype=torch.float32)
    leaves = dict(tree.items(MODELS[family].abstract(cfg)))
    keep = quantised.folder_keeping(path, MODELS[family].abstract(cfg), chosen.scheme, torch.float32)
    keys = hf_weights.checked_keys(path)
    _check_keys(path, family, leaves, keys)

    def read(own: Params, **options: Any) -> Params:
        return hf_weights.read_leaves(path, family, own, unread=keys, keep=keep, **options)

    optional = {"lm_head": leaves["embed_tokens"]} if cfg.tied else {}
    outer = read({name: leaf for name, leaf in leaves.items() if not name.startswith(f"{LAYERS}.")}, optional=optional)
    if optional and "lm_head" in outer and torch.equal(outer["lm_head"], outer["embed_tokens"]):
        del outer["lm_head"]

    def layer(index: int) -> Params:
        return read({name: leaf for name, leaf in leaves.items() if name.startswith(f"{LAYERS}.{index}.")})[LAYERS][index]

    ordered = {"embed_tokens": outer.pop("embed_tokens"), LAYERS: Layers(cfg.num_layers, layer)} | outer
    return Model(family, replace(cfg, tied="lm_head" not in outer), ordered)


def _check_keys(path: Path, family: str, leaves: Params, keys: set[str]) -> None:
    parts = hf_weights.parts(family, leaves)
    known = {*hf_keys.sizes(family, leaves), *(name for names in parts.values() for name in names), hf_keys.hf_key(family, "lm_head")}
    if odd := sorted(key for key in keys - known if not key.endswith("rotary_emb.inv_freq")):
        raise ValueError(f"{path}: the file has {len(odd)} tensors besides those of its family, the first is {odd[0]}")
