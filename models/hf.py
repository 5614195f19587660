"""Hugging Face folders: config.json, safetensors weights and tokenizer files, to and from a `Model`.

A leaf path (`layers.3.q_proj`) and a file key (`model.layers.3.self_attn.q_proj.weight`) name the same tensor, in the
same orientation [out, in] (some as blocks of its rows, see `hf_keys`), so loading is a renaming and at most one cast. Pickled weights are
never read.
"""

import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treetune.core import fields, manifest, param, tree
from treetune.core.fields import Fields
from treetune.core.param import Param, Params
from treetune.models import MODELS, Model, expert_files, folder, hf_keys, processor, tokenizer_config
from treetune.models.dense import Config

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# What a folder on the hub may give us: weights, configs, tokenizer files; never code or pickles, nor second copies of the weights.
WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt")
PLAIN_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
FLOATS = ("F32", "BF16", "F16", "F64")
UNWANTED = ("consolidated*", "original/*", "*/*")


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


def fetch(path_or_id: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of a model: the folder itself, or the snapshot of a hub id. Raises ValueError when there is neither."""
    if (local := Path(path_or_id).expanduser()).is_dir():
        return local
    if local.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_id)):
        raise ValueError(f"{path_or_id} is not a folder, a .gguf file or a hub id like 'owner/name'")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot = huggingface_hub.snapshot_download(
            str(path_or_id), revision=revision, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)
        )
    except LocalEntryNotFoundError as error:
        raise ValueError(f"no folder {path_or_id} here, and the hub cannot be reached to look for it") from error
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
) -> Model:
    """A model from a local folder, a hub id or a .gguf file, its leaves and its compute in `dtype`.

    Raises ValueError when the weights are pickled, the family is unknown, a key is missing or unexpected, or a shape is
    not the one that config.json implies.
    """
    if trust_remote_code:
        raise ValueError("trust_remote_code has no effect on a native family, which runs no code of the repository: leave it out")
    if str(path_or_id).endswith(".gguf"):
        from treetune.models import gguf

        return gguf.load(path_or_id, dtype=dtype, device=device)
    root = fetch(path_or_id, revision=revision)
    family, cfg = read_config(root / "config.json")
    cfg = replace(cfg, dtype=dtype)
    params = _read_params(root, family, cfg, dtype, device)
    return Model(family, replace(cfg, tied="lm_head" not in params), params)


def _read_params(root: Path, family: str, cfg: Config, dtype: torch.dtype, device: torch.device | str) -> Params:
    if (read := getattr(MODELS[family], "read_files", None)) is not None:
        checked_keys(root)
        return read(root, cfg, dtype, device)
    leaves = dict(tree.items(MODELS[family].abstract(cfg, dtype=dtype)))
    # Some tied models carry the head all the same: it counts only where it differs, as in transformers.
    optional = {"lm_head": leaves["embed_tokens"]} if cfg.tied else {}
    wanted, extra = (hf_keys.sizes(family, part) for part in (leaves, optional))
    tensors = read_tensors(root, wanted, optional=extra, parts=parts(family, leaves), device=device)
    params = tree.from_items(hf_keys.split(family, tensors, leaves | optional).items())
    if optional and "lm_head" in params and torch.equal(params["lm_head"], params["embed_tokens"]):
        del params["lm_head"]
    return params


def checked_keys(root: Path) -> set[str]:
    """The keys of a folder's tensors. Raises ValueError for files that cannot be read, are damaged, or hold other numbers than floats."""
    with ExitStack() as stack:
        files = _open(root, stack)
        for key, file in files.items():
            piece = file.get_slice(key)
            _check_tensor(root, piece, key, Param(tuple(piece.get_shape())))
        return set(files)


def parts(family: str, sizes: Params) -> expert_files.Parts:
    """{Hugging Face key of a stacked leaf: keys of its parts in older files}; of families with experts."""
    table = getattr(MODELS[family], "HF_PARTS", {})
    return {hf_key(family, path): names for path, names in expert_files.parts_of(table, sizes).items()}


def read_tensors(
    root: Path,
    wanted: dict[str, Param],
    *,
    optional: dict[str, Param] | None = None,
    unread: Iterable[str] = (),
    parts: expert_files.Parts | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """{key: tensor} of a folder's safetensors: all that is wanted, whole or in `parts`, and what it has of the optional keys.

    Raises ValueError for a key that is missing, one that is in no argument (`unread` names those to leave be), or another shape.
    """
    optional = optional or {}
    with ExitStack() as stack:
        files = _open(root, stack)
        split = {key: names for key, names in (parts or {}).items() if key in wanted and key not in files}
        pieces = {name: expert_files.part(wanted[key], len(names)) for key, names in split.items() for name in names}
        needed = {key: leaf for key, leaf in wanted.items() if key not in split} | pieces
        extra = {key for key in files if not key.endswith("rotary_emb.inv_freq")} - {*needed, *optional, *unread}
        _check_keys(root, set(needed) - set(files), extra)
        needed |= {key: leaf for key, leaf in optional.items() if key in files}
        for key, leaf in needed.items():  # all of them before the first is read, so that nothing of a wrong size takes memory
            _check_tensor(root, files[key].get_slice(key), key, leaf)
        tensors = {key: _read(files[key], key, leaf, device) for key, leaf in needed.items() if key not in pieces}
        tensors |= {key: _read_parts(files, names, wanted[key], device) for key, names in split.items()}
        # In the order of the model, whatever the layout: sums over leaves follow it.
        return {key: tensors[key] for key in (*wanted, *optional) if key in tensors}


def _open(root: Path, stack: ExitStack) -> dict:
    """{key: open safetensors file that has it} of a folder, memory-mapped."""
    from safetensors import SafetensorError, safe_open

    names = _weight_files(root)
    manifest.check(root)
    files: dict = {}
    for name in names:
        try:
            file = stack.enter_context(safe_open(root / name, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{root / name} cannot be read as safetensors ({error}): download or save the model again") from error
        if repeated := sorted(files.keys() & set(file.keys())):
            raise ValueError(f"{root}: {name} has the tensor {repeated[0]}, which another file of the folder has too: download it again")
        files |= dict.fromkeys(file.keys(), file)
    return files


def _weight_files(root: Path) -> list[str]:
    if (root / INDEX).is_file():
        return _indexed(root)
    if (root / SINGLE).is_file():
        return [SINGLE]
    if pickled := sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in root.glob(pattern)):
        raise ValueError(
            f"{root} holds pickled weights only ({pickled[0]}), which can run code when they are read. Convert them where you trust "
            "them: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) writes safetensors"
        )
    raise ValueError(f"{root} holds no {SINGLE} and no {INDEX}; expected a model folder with safetensors weights")


def _indexed(root: Path) -> list[str]:
    """The file names in an index. They must be names inside the folder: an index of others could have any file read."""
    places = fields.inner(fields.mapping(folder.read_json(root / INDEX), str(root / INDEX)), "weight_map")
    names = sorted({fields.text(places, key) for key in places.values})
    if not names:
        raise ValueError(f"{root / INDEX}: weight_map is empty; expected the file of each tensor")
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{root / INDEX}: weight_map names the file {fields.shown(name)}; expected a .safetensors file of this folder")
        if not (root / name).is_file():
            raise ValueError(f"{root / INDEX}: weight_map names {name}, which is not in the folder: download or save the model again")
    return names


def _check_keys(root: Path, missing: set[str], unexpected: set[str]) -> None:
    for keys, problem in ((missing, "lacks"), (unexpected, "has besides those of its family")):
        if keys:
            raise ValueError(f"{root}: the file {problem} {len(keys)} tensors, the first is {min(keys)}; config.json is of another model")


def _check_tensor(root: Path, piece, key: str, leaf: Param) -> None:
    if tuple(piece.get_shape()) != tuple(leaf.shape):
        raise ValueError(f"{root}: {key} has shape {list(piece.get_shape())}; config.json implies {list(leaf.shape)}")
    if piece.get_dtype() not in FLOATS:
        raise ValueError(f"{root}: {key} has dtype {piece.get_dtype()}; expected one of {', '.join(FLOATS)}: take the unquantised model")


def _read(file, key: str, leaf: Param, device: torch.device | str) -> Tensor:
    # A copy even without a cast: a view of the mapped file would be unaligned, and would die with the file.
    return file.get_tensor(key).to(device=device, dtype=leaf.dtype, copy=True)


def _read_parts(files: dict, names: tuple[str, ...], leaf: Param, device: torch.device | str) -> Tensor:
    """A stacked leaf, filled part by part, so that it is in memory once."""
    whole = torch.empty(leaf.shape, dtype=leaf.dtype, device=device)
    for name, rows in expert_files.cut(whole, names).items():
        rows.copy_(files[name].get_tensor(name))
    return whole


def abstract_of(model: Model, *, head: bool = False) -> Params:
    """The abstract tree of a model as it is; with `head`, a tied model has an `lm_head` leaf too, which adapters may target."""
    tied = "lm_head" not in model.params and not head
    dtype = model.params["embed_tokens"].dtype
    return MODELS[model.family].abstract(replace(model.cfg, tied=tied), dtype=dtype)


def random(family: str, source: Config | str | Path, *, seed: int, dtype: torch.dtype = torch.float32) -> Model:
    """An untrained model of the sizes in `source` (a Config, or the path of a config.json), a function of the seed alone."""
    if isinstance(source, Config):
        cfg = replace(source, dtype=dtype)
    else:
        other, sizes = read_config(Path(source) / "config.json" if Path(source).is_dir() else Path(source))
        if other != family:
            raise ValueError(f"{source} describes a {other} model, not {family}")
        cfg = replace(sizes, dtype=dtype)
    _check_memory(MODELS[family].abstract(cfg, dtype=dtype), source)
    return Model(family, cfg, param.init(MODELS[family].abstract(cfg, dtype=dtype), seed=seed))


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
    leaves, config = described(model, tokenizer, stacked=stacked)
    generation = special_ids(tokenizer) | (generation or {})
    write(path, leaves, config, tokenizer=tokenizer, generation=generation, beside=beside, max_shard_bytes=max_shard_bytes)


def write(
    path: str | Path,
    leaves: dict[str, Tensor],
    config: dict,
    *,
    tokenizer: Any = None,
    generation: dict | None = None,
    beside: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a model folder from tensors by their Hugging Face key and a config.json; it appears whole or not at all."""
    from safetensors.torch import save_file

    with folder.writing(path) as part:
        shards = list(_shards(leaves, max_shard_bytes))
        names = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        for name, shard in zip(names, shards, strict=True):
            save_file(shard, part / name, metadata={"format": "pt"})
        if len(shards) > 1:
            weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            folder.write_json(part / INDEX, {"metadata": {"total_size": tree.bytes(leaves)}, "weight_map": weight_map})
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        folder.write_json(part / "config.json", config)
        if generation:
            folder.write_json(part / "generation_config.json", generation)
        processor.write(beside or {}, part)


def described(model: Model, tokenizer: Any = None, *, stacked: bool = False) -> tuple[dict[str, Tensor], dict]:
    """The tensors by Hugging Face key and the config.json with which a model, and its tokenizer, is saved."""
    leaves, tied = _saved_leaves(model)
    if not stacked and (convert := getattr(MODELS[model.family], "to_files", None)) is not None:
        leaves = convert(model.cfg, leaves)
    split = {} if stacked else parts(model.family, abstract_of(model))
    pieces = [expert_files.cut(leaf, split[key]) if key in split else {key: leaf} for key, leaf in leaves.items()]
    leaves = {name: rows for group in pieces for name, rows in group.items()}
    config = MODELS[model.family].to_hf(replace(model.cfg, tied=tied))
    return leaves, config | {"dtype": str(next(iter(leaves.values())).dtype).removeprefix("torch.")} | special_ids(tokenizer)


def _saved_leaves(model: Model) -> tuple[dict[str, Tensor], bool]:
    params = model.params
    tied = "lm_head" not in params or (model.cfg.tied and torch.equal(params["lm_head"], params["embed_tokens"]))
    leaves = {path: leaf.detach() for path, leaf in tree.items(params) if not (tied and path == "lm_head")}
    return {key: leaf.contiguous() for key, leaf in hf_keys.join(model.family, leaves).items()}, tied


def _shards(leaves: dict[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    """Consecutive leaves of at most `limit` bytes together, or one larger leaf."""
    shard: dict[str, Tensor] = {}
    for key, leaf in leaves.items():
        if shard and tree.bytes(shard) + leaf.nbytes > limit:
            yield shard
            shard = {}
        shard[key] = leaf
    yield shard


def special_ids(tokenizer: Any) -> dict[str, int]:
    """The special ids of a tokenizer, {} without one, as config.json names them."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {} if tokenizer is None else {name: value for name in names if (value := getattr(tokenizer, name)) is not None}


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
