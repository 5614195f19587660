"""Adapters in the format of PEFT: adapter_config.json and adapter_model.safetensors, which PEFT, transformers and vLLM load.

A [r, in] and B [out, r] keep our orientation. Whole modules trained beside the adapters are saved as PEFT's
`modules_to_save`, under the key of the base model; every file key must be used, and every needed key be there.
"""

import math
from collections.abc import Container, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treetune.core import fields, lora, manifest, tree
from treetune.core.lora import Lora
from treetune.core.param import Params
from treetune.core.quant import Scheme
from treetune.models import (
    Model,
    adapter_bias,
    adapter_blocks,
    adapter_config,
    adapter_parameters,
    adapter_tensors,
    folder,
    hf,
    hf_keys,
    quantised,
    resize,
)
from treetune.models.adapter_tensors import BASE, PREFIX, module

CONFIG, WEIGHTS = adapter_config.NAME, "adapter_model.safetensors"
TOKENIZER, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"  # earlier versions wrote those that are not the base model's alone
BASE_FILE = "treetune_base.json"  # what adapter_config.json has no field for
WORDS = ("tokenizer.json", TOKENIZER)  # what has the words of a tokenizer, the first that is there
CLASSIFIERS = ("classifier", "score")  # PEFT names both in the config of every classifier, whichever of them the model has


class Base(NamedTuple):
    """The base model of an adapter: its name or path, its `identity.digest`, empty where it is not known, and how it was quantised."""

    name: str
    digest: str
    scheme: Scheme | None = None


class Info(NamedTuple):
    """What an adapter_config.json says: sizes, dropout in training, the base model and its digest, the paths of the adapted leaves.

    scheme: how the base was quantised while the adapter trained. ratios: (path, its scale over that of rank and alpha), where it differs.
    bias: which biases train beside it, as of `adapter_bias`.
    """

    rank: int
    alpha: float
    rslora: bool = False
    dropout: float = 0.0
    base: str = ""
    paths: Sequence[str] = ()
    digest: str = ""
    scheme: Scheme | None = None
    ratios: tuple[tuple[str, float], ...] = ()
    bias: str = adapter_bias.NONE


class Carried(NamedTuple):
    """The tokenizer that goes into an adapter's folder, and whether it has words that the base model's has not."""

    tokenizer: Any = None
    own: bool = True


class Head(NamedTuple):
    """A head that is no leaf of the family: PEFT's task_type for it, and its tensors by name."""

    task: str
    tensors: dict[str, Tensor]


def check(family: str, adapted: Sequence[str], whole: Sequence[str], *, dropout: float = 0.0, bias: str = adapter_bias.NONE) -> None:
    """Raise ValueError when PEFT's format cannot hold these adapted leaves, with this dropout, and these leaves and biases trained whole.

    PEFT saves whole modules, so a projection goes with its bias; and a module is adapted or saved, never both.
    """
    if not adapted:
        raise ValueError("an adapter folder needs at least one adapted leaf; save a model trained whole with hf.save instead")
    adapter_blocks.check(family, adapted)
    adapter_parameters.check(family, adapted, dropout=dropout)
    adapter_bias.check(family, adapted, bias)
    biases = adapter_bias.alone(family, whole, bias)
    owners = {module(family, path): path for path in adapted}
    for path in (path for path in whole if path not in biases):
        if (owner := module(family, path)) in owners:
            raise ValueError(
                f"modules_to_save: {path} is trained whole and {owners[owner]} of the same module has an adapter: choose one of the two"
            )
        for other in _siblings(family, path):
            if other not in whole:
                both = "PEFT saves a module with all its leaves: train both or neither"
                raise ValueError(f"modules_to_save: {path} is trained whole without {other}; {both}")


def _siblings(family: str, path: str) -> list[str]:
    """The leaves of the module that owns `path`."""
    owner = module(family, path)
    kinds = ("weight", "bias", *adapter_parameters.STACKS)
    return [leaf for kind in kinds for leaf in hf_keys.leaves_of(family, f"{owner}.{kind}")]


def save(
    path: str | Path,
    adapter: Params,
    *,
    family: str,
    info: Info,
    whole: Params | None = None,
    tied: bool = False,
    carried: Carried | None = None,
    head: Head | None = None,
) -> None:
    """Write an adapter folder that `peft.PeftModel.from_pretrained` turns into the same function as ours.

    `adapter` is the LoRA tree, `whole` a tree of leaves trained whole beside it, `tied` whether the base model is tied; the paths in
    `info` are those of the tree. Raises ValueError as `check` does.
    """
    from safetensors.torch import save_file

    pairs = lora.pairs(adapter)
    leaves = dict(tree.items(whole or {}))
    check(family, list(pairs), list(leaves), dropout=info.dropout, bias=info.bias)
    lengths = _check_magnitudes(adapter)
    biases = adapter_bias.names(family, adapter_bias.alone(family, list(leaves), info.bias), list(pairs))
    tensors, modules = _saved_modules(family, {path: leaf for path, leaf in leaves.items() if path not in biases}, tied, pairs)
    tensors |= {PREFIX + name: leaves[path] for path, name in biases.items()}
    if head is not None:
        tensors |= {PREFIX + name: leaf for name, leaf in head.tensors.items()}
        modules |= {name.rpartition(".")[0] for name in head.tensors}
    parameters = [name for name in pairs if adapter_parameters.is_parameter(name)]
    joined = adapter_blocks.join(family, adapter)
    files = adapter_parameters.flat(joined)
    tensors = lora.to_peft(files, adapter_parameters.names(family, parameters, partial(hf.hf_key, family))) | tensors
    ranks, alphas = adapter_blocks.patterns(_sizes(family, joined, pairs, info), info.rank, info.alpha)
    config = adapter_config.OFF | {
        "peft_type": "LORA", "bias": info.bias, "fan_in_fan_out": False, "rank_pattern": ranks, "alpha_pattern": alphas,
        "task_type": "CAUSAL_LM" if head is None else head.task, "base_model_name_or_path": info.base, "inference_mode": True,
        "init_lora_weights": True, "use_dora": lengths,
        "r": info.rank, "lora_alpha": info.alpha, "use_rslora": info.rslora, "lora_dropout": info.dropout,
        "target_modules": list(dict.fromkeys(module(family, name) for name in pairs if name not in parameters)),
        "target_parameters": [hf.hf_key(family, name) for name in parameters] or None, "modules_to_save": sorted(modules) or None,
    }  # fmt: skip
    with folder.writing(path) as part:
        save_file({name: leaf.detach().contiguous() for name, leaf in tensors.items()}, part / WEIGHTS, metadata={"format": "pt"})
        folder.write_json(part / CONFIG, config)
        if carried is not None and carried.tokenizer is not None:
            carried.tokenizer.save_pretrained(part)
        if info.digest:
            scheme = {} if info.scheme is None else {"quantised": quantised.options(info.scheme)}
            words = {"tokenizer": _words(part)} if carried is not None and not carried.own else {}
            folder.write_json(part / BASE_FILE, {"format": 1, "base": info.base, "digest": info.digest} | scheme | words)


def _check_magnitudes(adapter: Params) -> bool:
    """Whether an adapter is DoRA's: PEFT has magnitudes on all of its modules, or on none."""
    pairs, lengths = lora.pairs(adapter), lora.magnitudes(adapter)
    if lengths and (odd := next((path for path in pairs if path not in lengths), None)):
        raise ValueError(f"{next(iter(lengths))} has a magnitude and {odd} has none: DoRA is for all adapted weights or for none")
    return bool(lengths)


def _sizes(family: str, joined: Params, pairs: Iterable[str], info: Info) -> dict[str, tuple[int, float]]:
    """(rank, alpha) of each adapted module in the file, under which its scale is that of its leaves."""
    common, ratios, sizes = lora.scale(rank=info.rank, alpha=info.alpha, rslora=info.rslora), dict(info.ratios), {}
    groups = {paths[0]: paths for paths in hf_keys.groups(family, pairs).values()}
    for path, (a, _) in lora.pairs(joined).items():
        rank, several, leaves = a.shape[-2], {ratios.get(leaf, 1.0) for leaf in groups[path]}, " and ".join(groups[path])
        if len(several) > 1:
            raise ValueError(f"{leaves} are rows of one module and have scales of their own: give them one alpha and rank")
        scale, key = common * several.pop(), hf.hf_key(family, path)
        alpha = float(f"{scale * (math.sqrt(rank) if info.rslora else rank):.12g}")
        parameter = adapter_parameters.is_parameter(path)
        if parameter and (rank, alpha) != (info.rank, info.alpha):
            raise ValueError(f"{path} has rank {rank} and alpha {alpha:g}: experts and routers have those of the whole adapter")
        sizes[key if parameter else key.rpartition(".")[0]] = (rank, alpha)
    return sizes


def _saved_modules(family: str, leaves: dict[str, Tensor], tied: bool, adapted: Container[str]) -> tuple[dict[str, Tensor], set[str]]:
    """The tensors of leaves trained whole by PEFT's key, and the modules that PEFT's config names for them."""
    tensors = {PREFIX + key: leaf for key, leaf in hf_keys.join(family, leaves).items()}
    modules = {module(family, name) for name in leaves}
    if tied and "embed_tokens" in leaves and "lm_head" not in leaves:
        # PEFT would leave a tied head at the old embedding: give it the new one, as a module or under its adapter.
        name = module(family, "lm_head")
        modules |= set() if "lm_head" in adapted else {name}
        tensors[f"{PREFIX}{name}{BASE if 'lm_head' in adapted else '.weight'}"] = leaves["embed_tokens"].clone()
    return tensors, modules


def load(path: str | Path, model: Model, *, dtype: torch.dtype = torch.float32) -> tuple[Lora, Params, Info]:
    """The adapter in a folder (no dropout), the leaves to lay over the model's, and what its config says.

    Raises ValueError unless every tensor of the file is used, every A has its B in the shapes of the model, every module
    that the config names is there, and the config asks for nothing but plain LoRA.
    """
    low, whole, _, info = load_with_tensors(path, model, (), dtype=dtype)
    return low, whole, info


def load_with_tensors(
    path: str | Path, model: Model, names: Sequence[str], *, dtype: torch.dtype = torch.float32
) -> tuple[Lora, Params, dict[str, Tensor], Info]:
    """As `load`, from a folder that may hold tensors of these names besides, which come third."""
    root = Path(path).expanduser()
    config = adapter_config.read(root)
    if names:
        config = config._replace(saved=tuple(name for name in config.saved if name not in CLASSIFIERS))
    tensors = _read_tensors(root / WEIGHTS)
    extra = {name: tensors.pop(PREFIX + name) for name in names if PREFIX + name in tensors}
    try:
        low, whole = adapter_tensors.read(tensors, config, model, headless=bool(names))
    except ValueError as error:
        raise ValueError(str(error) if str(root) in str(error) else f"{root}: {error}") from error
    low = tree.map(lambda leaf: leaf.to(model.params["embed_tokens"].device, dtype), low)
    info = Info(config.rank, config.alpha, config.rslora, config.dropout, config.base, list(lora.pairs(low)))
    if adapter_bias.alone(model.family, list(whole), config.bias):
        info = info._replace(bias=config.bias)
    # Of a model whose layers are read when they are asked for, one at a time.
    like = {name: leaf for name, leaf in tree.items(model.params) if name in {"embed_tokens", *whole}}
    kinds = {name: like.get(name, like["embed_tokens"]) for name in whole}
    leaves = ((name, leaf.to(kinds[name].device, kinds[name].dtype)) for name, leaf in whole.items())
    scale = lora.scale(rank=config.rank, alpha=config.alpha, rslora=config.rslora)
    return Lora(low, scale), tree.from_items(leaves), extra, info


def base_of(path: str | Path) -> str:
    """The base model that an adapter folder names; empty when it names none."""
    return adapter_config.read(Path(path).expanduser()).base


def revision_of(path: str | Path) -> str | None:
    """The revision of the base model that an adapter folder names; None when it names none."""
    return adapter_config.read(Path(path).expanduser()).revision


def base(path: str | Path) -> Base:
    """The base model that an adapter folder was trained on, with its digest where we wrote the folder, and how it was quantised."""
    root = Path(path).expanduser()
    recorded = _recorded(root)
    scheme = fields.inner(recorded, "quantised", default=None, null=True)
    return Base(base_of(root), fields.text(recorded, "digest", default=""), None if scheme is None else quantised.read(scheme))


def own_words(path: str | Path) -> bool:
    """Whether the tokenizer in an adapter folder may have other words than the base model's: it is not the one that we wrote as such."""
    root = Path(path).expanduser()
    recorded = fields.text(_recorded(root), "tokenizer", default="")
    return not recorded or recorded != _words(root)


def _words(root: Path) -> str:
    """The sha256 of the file that has the words of the tokenizer in a folder; empty where there is none."""
    file = next((root / name for name in WORDS if (root / name).is_file()), None)
    return "" if file is None else manifest.entry(file).sha256


def _recorded(root: Path) -> fields.Fields:
    """What the folder says of its base model."""
    return fields.mapping(folder.read_json(root / BASE_FILE) if (root / BASE_FILE).is_file() else {}, str(root / BASE_FILE))


def task_of(path: str | Path) -> str | None:
    """PEFT's task_type of an adapter folder; None when it names none."""
    return adapter_config.read(Path(path).expanduser()).task


def rows(path: str | Path, family: str) -> int | None:
    """Rows of the vocabulary that an adapter was trained with; None where it holds no whole embedding or head to tell."""
    from safetensors import SafetensorError, safe_open

    manifest.check(Path(path).expanduser())
    try:
        with safe_open(Path(path).expanduser() / WEIGHTS, framework="pt") as file:
            keys = set(file.keys())
            present = [key for name in resize.LEAVES if (key := PREFIX + hf.hf_key(family, name)) in keys]
            return file.get_slice(present[0]).get_shape()[0] if present else None
    except (SafetensorError, OSError):
        return None  # `load` says what is wrong with the file


def _read_tensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise ValueError(f"{file} does not exist; expected a PEFT adapter saved as safetensors")
    manifest.check(file.parent)
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read as safetensors ({error}): save or download the adapter again") from error
