"""Merging in the memory of one layer: layers are read, merged, compared and written one at a time."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treetune.core import check, lora, param, shard, tree
from treetune.core.lora import Lora
from treetune.core.param import Param, Params
from treetune.core.quant import Scheme
from treetune.models import (
    MODELS,
    Model,
    bridge,
    bridge_files,
    expert_files,
    families,
    fetch,
    heads,
    hf,
    hf_keys,
    hf_weights,
    loading,
    merging,
    processor,
    quant_config,
    quantised,
    quantising,
)
from treetune.models import tokenizer as tokenizers
from treetune.models.fetch import Say, silent
from treetune.models.merging import Merged
from treetune.models.quantised import Keep
from treetune.models.target import Target

LAYERS, HEAD = "layers", "lm_head"
LEGACY = "take merge_method legacy"


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

    Errors: ValueError as `loading.load_adapted`, and for a reward model, a .gguf file, or files otherwise than modules.
    """
    assert chosen.adapter is not None, "an adapter is to be merged"
    if heads.kind(tokenizers.adapter_folder(chosen.adapter)) is not None:
        raise ValueError(f"{chosen.adapter} is a reward model's adapter, and merge_method memory_efficient takes language models: {LEGACY}")
    model = _read(chosen, say)
    if bad := check.not_finite(model.params):
        raise ValueError(f"{chosen.model} holds weights that are not finite: {', '.join(bad[:3])}; download or save the model again")
    loading.check_base(chosen.adapter, loading.identify_base(chosen.model, model), say=say)
    model = loading.match_rows(model, chosen.adapter, chosen.model, revision=chosen.revision)
    low, whole, _ = loading.load_adapter(chosen.adapter, model)
    base, own = model.params[LAYERS], whole.get(LAYERS, [])
    layers = Layers(len(base), lambda index: tree.merge(base[index], own[index] if index < len(own) else {}))
    return model._replace(params=tree.merge(_outer(model.params), _outer(whole)) | {LAYERS: layers}), low


def merge(model: Model, adapter: Lora, tokenizer: Callable[..., Any], *, dtype: torch.dtype, scheme: Scheme | None = None) -> Merged:
    """As `merging.merge`, with layers that are made as they are asked for; with a scheme as `quantising.merge`, and kept in float32."""
    layers, own = model.params[LAYERS], adapter.tree.get(LAYERS, [])
    kept = dtype if scheme is None else torch.float32

    def one(index: int) -> Params:
        pair = ({LAYERS: [layers[index]]}, {LAYERS: [own[index] if index < len(own) else {}]})
        return _rounded(lora.merge(*pair, adapter.scale)[LAYERS][0], kept)

    top = _rounded(lora.merge(_outer(model.params), _outer(adapter.tree), adapter.scale), kept)
    merged = Merged(model._replace(params=top | {LAYERS: Layers(len(layers), one)}), merging.Difference(0, 0, 0), 0)
    return compared(merged, model, adapter, tokenizer, dtype, scheme)


def unquantised(merged: Merged, chosen: Target, tokenizer: Any, dtype: torch.dtype, scheme: Scheme | None, say: Say) -> Merged | None:
    """As `merging.unquantised`, of a model whose layers are made as they are asked for."""
    if chosen.scheme is None or quant_config.of_name(chosen.model, chosen.revision) is not None:
        return None
    return compared(merged, *load(chosen._replace(scheme=None), say=say), tokenizer, dtype, scheme)


@torch.no_grad()
def compared(merged: Merged, model: Model, adapter: Lora, tokenizer: Any, dtype: torch.dtype, scheme: Scheme | None) -> Merged:
    """The merged model with the difference of what its files will hold from a model with the adapter."""
    ids = merging.probe_ids(tokenizer, model.cfg)
    written = _written(merged.model, dtype, scheme)._replace(cfg=model.cfg)
    pair = families.document_logits(model, ids, lora=adapter), families.document_logits(written, ids)
    return merged._replace(difference=merging.compare(*pair), probe_tokens=len(ids))


def _written(model: Model, dtype: torch.dtype, scheme: Scheme | None) -> Model:
    """The model as its files will hold it, in float32."""
    chosen = set() if scheme is None else quantised.paths(hf.abstract_of(model), scheme._replace(experts=False))

    def one(path: str, leaf: Tensor) -> Tensor:
        kept = leaf if scheme is None else quantising.kept_leaf(path, leaf, chosen, scheme, dtype)
        return shard.gather(kept, torch.float32)

    def layer(index: int) -> Params:
        return tree.from_items((path, one(f"{LAYERS}.{index}.{path}", leaf)) for path, leaf in tree.items(model.params[LAYERS][index]))

    outer = tree.from_items((path, one(path, leaf)) for path, leaf in tree.items(_outer(model.params)))
    return model._replace(params=outer | {LAYERS: Layers(len(model.params[LAYERS]), layer)})


def save(merged: Merged, path: Path, chosen: Target, tokenizer: Any, *, dtype: torch.dtype, scheme: Scheme | None = None) -> None:
    """Write the folder of the merged model, a layer to a file. Errors: ValueError where there is one."""
    model, family = merged.model, MODELS[merged.model.family]
    params = model.params
    tied = "lm_head" not in params or (model.cfg.tied and torch.equal(params["lm_head"], params["embed_tokens"]))
    sizes = family.abstract(replace(model.cfg, tied=tied), dtype=params["embed_tokens"].dtype)
    config = family.to_hf(replace(model.cfg, tied=tied)) | {"dtype": str(dtype).removeprefix("torch.")} | hf.config_ids(model, tokenizer)
    tensors = _tensors(model, tied)
    if scheme is not None:
        keys = quantising.keys(model, scheme)
        config |= quantising.settings(model, scheme, keys, _dimensions(model, sizes), dtype)
        tensors = _stored(tensors, keys, scheme, dtype)
    largest = max(param.count(layer) for layer in sizes[LAYERS]) * params["embed_tokens"].dtype.itemsize
    generation = hf.special_ids(tokenizer) | (tokenizers.generation_config(chosen.model, tokenizer, revision=chosen.revision) or {})
    beside = processor.read(chosen.model, revision=chosen.revision)
    hf.write(path, tensors, config, tokenizer=tokenizer, generation=generation, beside=beside, max_shard_bytes=largest)


def _stored(tensors: Iterator[tuple[str, Tensor]], keys: set[str], scheme: Scheme, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for key, leaf in tensors:
        yield from quantising.stored(key, leaf, keys, scheme, dtype).items()


def _dimensions(model: Model, sizes: Params) -> dict[str, int]:
    """{key: dimensions of its tensor} of the files."""
    leaves = dict(tree.items(sizes))
    split = hf_weights.parts(model.family, sizes)
    stored = hf_keys.sizes(model.family, leaves)
    return {name: 2 if key in split else len(leaf.shape) for key, leaf in stored.items() for name in split.get(key, (key,))}


def _tensors(model: Model, tied: bool) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of the files, in the order of the model."""
    split = hf_weights.parts(model.family, hf.abstract_of(model))
    for name, node in model.params.items():
        if name == LAYERS:
            groups = ({f"{LAYERS}.{index}.{path}": leaf for path, leaf in tree.items(layer)} for index, layer in enumerate(node))
        else:
            groups = iter([] if tied and name == "lm_head" else [dict(tree.items({name: node}))])
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
        raise ValueError(f"merge_method memory_efficient reads layers from folders, and {path} is a file: {LEGACY}")
    family, cfg = hf.read_config(path / "config.json")
    cfg = replace(cfg, dtype=torch.float32)
    leaves = dict(tree.items(MODELS[family].abstract(cfg)))
    keep = quantised.folder_keeping(path, MODELS[family].abstract(cfg), chosen.scheme, torch.float32)
    keys = hf_weights.checked_keys(path)
    read = _bridged(path, cfg, keys, keep) if isinstance(cfg, bridge.Config) else _native(path, family, leaves, keys, keep)
    # A tied model may have a head in its files all the same; it counts where it differs.
    outer = read({name: leaf for name, leaf in leaves.items() if not name.startswith(f"{LAYERS}.")}, cfg.tied)
    if cfg.tied and HEAD in outer and torch.equal(outer[HEAD], outer["embed_tokens"]):
        del outer[HEAD]

    def layer(index: int) -> Params:
        return read({name: leaf for name, leaf in leaves.items() if name.startswith(f"{LAYERS}.{index}.")}, False)[LAYERS][index]

    ordered = {"embed_tokens": outer.pop("embed_tokens"), LAYERS: Layers(cfg.num_layers, layer)} | outer
    return Model(family, replace(cfg, tied=HEAD not in outer), ordered)


Read = Callable[[dict[str, Param], bool], Params]  # of these leaves, and of a head that may be missing


def _native(path: Path, family: str, leaves: dict[str, Param], keys: set[str], keep: Keep) -> Read:
    parts = hf_weights.parts(family, leaves)
    known = {*hf_keys.sizes(family, leaves), *(name for names in parts.values() for name in names), hf_keys.hf_key(family, HEAD)}
    if odd := sorted(key for key in keys - known if not key.endswith("rotary_emb.inv_freq")):
        raise ValueError(f"{path}: the file has {len(odd)} tensors besides those of its family, the first is {odd[0]}")

    def read(own: dict[str, Param], head: bool) -> Params:
        extra = {HEAD: leaves["embed_tokens"]} if head else {}
        return hf_weights.read_leaves(path, family, own, unread=keys, keep=keep, optional=extra)

    return read


def _bridged(path: Path, cfg: bridge.Config, keys: set[str], keep: Keep) -> Read:
    skeleton = bridge.skeleton(cfg)
    if not bridge_files.one_by_one(path, skeleton):
        raise ValueError(
            f"merge_method memory_efficient reads one weight after another, and the files of {path} hold those of {cfg.kind} "
            f"otherwise than its modules do: {LEGACY}"
        )

    def read(own: dict[str, Param], head: bool) -> Params:
        return tree.from_items(bridge_files.read_each(path, skeleton, own, "cpu", keep, unread=keys).items())

    return read
