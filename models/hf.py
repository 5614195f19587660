"""Hugging Face folders: config.json, safetensors weights and tokenizer files, to and from a `Model`.

A leaf path (`layers.3.q_proj`) and a file key (`model.layers.3.self_attn.q_proj.weight`) name the same tensor, in the
same orientation [out, in] (some as blocks of its rows, see `hf_keys`), so loading is a renaming and at most one cast. Pickled weights are
never read.
"""

import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from treetune.core import fields, manifest, param, partition, tensor_file, tree
from treetune.core.fields import Fields
from treetune.core.param import Param, Params
from treetune.core.quant import Scheme
from treetune.models import MODELS, Model, folder, hf_keys, hf_weights, model_files, processor, quantised, tokenizer_config
from treetune.models.dense import Config
from treetune.models.model_files import Files
from treetune.models.quantised import Home, Keep, See

INDEX, SINGLE = hf_weights.INDEX, hf_weights.SINGLE
# What a folder on the hub may give us: weights, configs, tokenizer files; never code or pickles, nor second copies of the weights.
WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt")
PLAIN_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
UNWANTED = ("consolidated*", "original/*", "*/*")

Leaf = TypeVar("Leaf", Tensor, Param)

hf_key = hf_keys.hf_key


def family_of(hf: Fields) -> str:
    """The family that computes a config.json: a native one, or that of transformers' modules. Raises ValueError when there is none."""
    kind = fields.text(hf, "model_type")
    native = [name for name, module in MODELS.items() if kind in module.HF_TYPES]
    if not native and kind not in MODELS:
        raise fields.wrong(hf, "model_type", "that of a causal language model of the installed transformers")
    return native[0] if native else kind


def read_config(path: Path) -> tuple[str, Config]:
    """Family and sizes in a config.json file. Raises ValueError for what no family here computes."""
    hf = fields.mapping(folder.read_json(path), str(path))
    family = family_of(hf)
    cfg = MODELS[family].config(hf)
    manifest.check(path.parent, weights=False)
    return family, cfg


def fetch(path_or_id: str | Path, *, revision: str | None = None, weights: bool = True) -> Path:
    """The local folder of a model: the folder itself, or the snapshot of a hub id, without `weights` only the files beside them.

    Raises ValueError when there is neither.
    """
    if (local := Path(path_or_id).expanduser()).is_dir():
        return local
    if local.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_id)):
        raise ValueError(f"{path_or_id} is not a folder, a .gguf file or a hub id like 'owner/name'")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot = huggingface_hub.snapshot_download(
            str(path_or_id),
            revision=revision,
            allow_patterns=list(WANTED),
            ignore_patterns=[*UNWANTED, *([] if weights else ["*.safetensors"])],
        )
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"no folder {path_or_id} here, and the hub cannot be reached to look for it: check the name, the network, and HF_HUB_OFFLINE"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise ValueError(f"the hub does not give {path_or_id} (status {status}): check the name, and your access if it is gated") from error
    return Path(snapshot)


def load(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    scheme: Scheme | None = None,
    see: See | None = None,
    home: Home | None = None,
) -> Model:
    """A model from a local folder, a hub id or a .gguf file, its leaves and its compute in `dtype`; quantised by a scheme as it is read.

    Leaves that the files hold quantised stay so; `scheme` may be theirs. see: is told of each leaf that is quantised here. home: where
    layers go as they are read, if not to the device, or how leaves are split among ranks.
    Raises ValueError when the weights are pickled, the family is unknown, a key is missing or unexpected, or a shape is
    not the one that config.json implies.
    """
    if trust_remote_code:
        raise ValueError("trust_remote_code has no effect on a native family, which runs no code of the repository: leave it out")
    if str(path_or_id).endswith(".gguf"):
        from treetune.models import gguf

        return gguf.load(path_or_id, dtype=dtype, device=device, scheme=scheme, see=see, home=home)
    root = fetch(path_or_id, revision=revision)
    family, cfg = read_config(root / "config.json")
    cfg = replace(cfg, dtype=dtype)
    keep = quantised.folder_keeping(root, MODELS[family].abstract(cfg), scheme, dtype)
    params = _read_params(root, family, cfg, device, keep._replace(see=see, home=home))
    return Model(family, replace(cfg, tied="lm_head" not in params), params)


def _read_params(root: Path, family: str, cfg: Config, device: torch.device | str, keep: Keep) -> Params:
    if (read := getattr(MODELS[family], "read_files", None)) is not None:
        hf_weights.checked_keys(root)
        return read(root, cfg, cfg.dtype, device, keep=keep)
    leaves = dict(tree.items(MODELS[family].abstract(cfg, dtype=cfg.dtype)))
    # Some tied models carry the head all the same: it counts only where it differs, as in transformers.
    optional = {"lm_head": leaves["embed_tokens"]} if cfg.tied else {}
    params = hf_weights.read_leaves(root, family, leaves, optional=optional, device=device, keep=keep)
    if optional and "lm_head" in params and partition.equal(params["lm_head"], params["embed_tokens"]):
        del params["lm_head"]
    return params


def abstract_of(model: Model, *, head: bool = False) -> Params:
    """The abstract tree of a model as it is; with `head`, a tied model has an `lm_head` leaf too, which adapters may target."""
    tied = "lm_head" not in model.params and not head
    dtype = model.params["embed_tokens"].dtype
    return MODELS[model.family].abstract(replace(model.cfg, tied=tied), dtype=dtype)


def random(
    family: str,
    source: Config | str | Path,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    keep: Callable[[str, Tensor], Tensor] = param.as_is,
) -> Model:
    """An untrained model of the sizes in `source` (a Config, or the path of a config.json), a function of the seed alone.

    keep: what becomes of each leaf as soon as it is made.
    """
    if isinstance(source, Config):
        cfg = replace(source, dtype=dtype)
    else:
        other, sizes = read_config(Path(source) / "config.json" if Path(source).is_dir() else Path(source))
        if other != family:
            raise ValueError(f"{source} describes a {other} model, not {family}")
        cfg = replace(sizes, dtype=dtype)
    _check_memory(MODELS[family].abstract(cfg, dtype=dtype), source)
    return Model(family, cfg, param.init(MODELS[family].abstract(cfg, dtype=dtype), seed=seed, keep=keep))


def _check_memory(sizes: Params, source: object) -> None:
    need, have = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in tree.leaves(sizes)), memory_bytes()
    if need > have:
        raise ValueError(f"{source} describes a model of {need / 2**30:.1f} GiB; this machine has {have / 2**30:.1f} GiB of memory")


def memory_bytes() -> int:
    """The memory of this machine; without a bound where the system does not tell."""
    names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    return math.prod(os.sysconf(name) for name in names) if hasattr(os, "sysconf") else sys.maxsize


def generation_config(path_or_id: str | Path) -> dict:
    """The generation_config.json of a local folder, {} where there is none: what `save` takes to hand it on.

    Raises ValueError for ids that are none; other fields are the business of whoever generates with them.
    """
    file = Path(path_or_id) / "generation_config.json"
    if not file.is_file():
        return {}
    config = fields.mapping(folder.read_json(file), str(file))
    for name in ("bos_token_id", "pad_token_id"):
        fields.integer(config, name, default=None, null=True)
    _end_ids(config)
    return config.values


def _end_ids(config: Fields) -> tuple[int, ...]:
    """The ids of `eos_token_id`, one or a list."""
    if isinstance(config.values.get("eos_token_id"), list):
        return fields.integers(config, "eos_token_id", least=0)
    single = fields.integer(config, "eos_token_id", default=None, null=True, least=0)
    return () if single is None else (single,)


def stop_ids(path_or_id: str | Path, tokenizer: Any) -> list[int]:
    """Ids that end an answer: those of generation_config.json, and the tokenizer's end-of-sequence token."""
    config = fields.mapping(generation_config(path_or_id), "generation_config.json")
    return sorted({*_end_ids(config), tokenizer.eos_token_id} - {None})


def save(
    path: str | Path,
    model: Model,
    *,
    tokenizer: Any = None,
    generation: dict | None = None,
    beside: Mapping[str, bytes] | None = None,
    stacked: bool = False,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a folder that `load` and transformers read: the leaves in their own dtype, a tokenizer's files, generation_config.json, others.

    The folder appears whole or not at all. A tied model that has grown a different `lm_head` is saved untied. `stacked`: experts in
    one tensor a projection, as transformers 5 holds them, instead of one for each, which older versions and servers read, too.
    """
    files, config = files_of(model, tokenizer, stacked=stacked)
    generation = special_ids(tokenizer) | (generation or {})
    own = {"sizes": files.sizes, "generation": generation, "beside": beside, "max_shard_bytes": max_shard_bytes}
    write(path, files.tensors(), config, tokenizer=tokenizer, **own)


def write(
    path: str | Path,
    leaves: dict[str, Tensor] | Iterator[tuple[str, Tensor]],
    config: dict,
    *,
    tokenizer: Any = None,
    generation: dict | None = None,
    beside: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = 5 * 10**9,
    sizes: Mapping[str, Param] | None = None,
) -> None:
    """Write a model folder from tensors by their Hugging Face key and a config.json; it appears whole or not at all.

    sizes: shapes and dtypes by key, in the order of the tensors: with them each is written as it comes, and dropped.
    """
    with folder.writing(path) as part:
        tensors = iter(leaves.items() if isinstance(leaves, dict) else leaves)
        if sizes is None:
            _write_shards(part, tensors, max_shard_bytes)
        else:
            _write_each(part, tensors, sizes, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        folder.write_json(part / "config.json", config)
        if generation:
            folder.write_json(part / "generation_config.json", generation)
        processor.write(beside or {}, part)


def files_of(model: Model, tokenizer: Any = None, *, stacked: bool = False) -> tuple[Files, dict]:
    """The tensors and the config.json with which a model, and its tokenizer, is saved. Leaves may be `Late`."""
    tied = model_files.tied(model)
    files = model_files.of(model, hf_weights.parts(model.family, abstract_of(model)), tied=tied, stacked=stacked)
    if files.sizes is None:
        tensors = dict(files.tensors())
        files = Files({key: Param(tuple(leaf.shape), leaf.dtype) for key, leaf in tensors.items()}, lambda: iter(tensors.items()))
    assert files.sizes is not None
    config = MODELS[model.family].to_hf(replace(model.cfg, tied=tied))
    dtype = str(next(iter(files.sizes.values())).dtype).removeprefix("torch.")
    return files, config | {"dtype": dtype} | config_ids(model, tokenizer)


def described(model: Model, tokenizer: Any = None, *, stacked: bool = False) -> tuple[dict[str, Tensor], dict]:
    """The tensors by Hugging Face key and the config.json with which a model, and its tokenizer, is saved."""
    files, config = files_of(model, tokenizer, stacked=stacked)
    return dict(files.tensors()), config


def _write_each(part: Path, tensors: Iterator[tuple[str, Tensor]], sizes: Mapping[str, Param], limit: int) -> None:
    """Write tensors of known sizes as they come, into files of at most `limit` bytes or one larger tensor, with an index if several."""
    groups = list(_shards(sizes.items(), limit))
    names = _file_names(len(groups))
    for name, group in zip(names, groups, strict=True):
        tensor_file.write(part / name, group, itertools.islice(tensors, len(group)))
    if len(groups) > 1:
        places = {key: name for name, group in zip(names, groups, strict=True) for key in group}
        _write_index(part, sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in sizes.values()), places)


def _write_shards(part: Path, leaves: Iterable[tuple[str, Tensor]], limit: int) -> None:
    """Write leaves as they come, a file at a time, and an index where there are several."""
    from safetensors.torch import save_file

    places, total = {}, 0
    for number, shard in enumerate(_shards(leaves, limit)):
        save_file(shard, part / f"{number}.safetensors", metadata={"format": "pt"})
        places |= dict.fromkeys(shard, number)
        total += tree.bytes(shard)
    count = len(set(places.values()))
    names = _file_names(count)
    for number, name in enumerate(names):
        (part / f"{number}.safetensors").rename(part / name)
    if count > 1:
        _write_index(part, total, {key: names[i] for key, i in places.items()})


def _file_names(count: int) -> list[str]:
    return [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def _write_index(part: Path, total: int, places: Mapping[str, str]) -> None:
    folder.write_json(part / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(places)})


def _shards(leaves: Iterable[tuple[str, Leaf]], limit: int) -> Iterator[dict[str, Leaf]]:
    """Consecutive leaves, or their sizes, of at most `limit` bytes together, or one larger leaf."""
    shard, held = dict[str, Leaf](), 0
    for key, leaf in leaves:
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        if shard and held + size > limit:
            yield shard
            shard, held = {}, 0
        shard[key], held = leaf, held + size
    yield shard


def special_ids(tokenizer: Any) -> dict[str, int]:
    """The special ids of a tokenizer, {} without one, as config.json names them."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {} if tokenizer is None else {name: value for name in names if (value := getattr(tokenizer, name)) is not None}


def config_ids(model: Model, tokenizer: Any) -> dict[str, int]:
    """Those of a model's config.json; that of padding stays as it is where the model counts its positions from it."""
    counts = getattr(MODELS[model.family], "counts_from_padding", None)
    kept = counts is not None and counts(model.cfg)
    return {name: value for name, value in special_ids(tokenizer).items() if not (kept and name == "pad_token_id")}


def tokenizer(path_or_id: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The fast tokenizer of a local folder, a hub id or a .gguf file: the same ids and chat template as AutoTokenizer gives.

    Most folders name the plain class, which needs a third of the imports of AutoTokenizer; the others go through it.
    """
    if str(path_or_id).endswith(".gguf"):
        from treetune.models import gguf

        return gguf.tokenizer(path_or_id)
    root = fetch(path_or_id, revision=revision)
    manifest.check(root, weights=False)
    config = tokenizer_config.read(root)
    if config.get("tokenizer_class") in PLAIN_TOKENIZERS and "auto_map" not in config and (root / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(root)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(root, trust_remote_code=trust_remote_code)
