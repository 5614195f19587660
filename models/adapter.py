"""Adapters in the format of PEFT: adapter_config.json and adapter_model.safetensors, which PEFT, transformers and vLLM load.

A [r, in] and B [out, r] keep our orientation. Whole modules trained beside the adapters are saved as PEFT's
`modules_to_save`, under the key of the base model; every file key must be used, and every needed key be there.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from treetune.core import lora, manifest, tree
from treetune.core.lora import Lora
from treetune.core.param import Params
from treetune.models import Model, folder, hf, resize

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENIZER, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"  # there when the adapter has a tokenizer or a template of its own
PREFIX, BASE = "base_model.model.", ".base_layer.weight"
CLASSIFIERS = ("classifier", "score")  # PEFT names both in the config of every classifier, whichever of them the model has
# What an adapter_config.json may say; anything else would change the function that the adapter computes.
PLAIN = {
    "peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "use_dora": False, "lora_bias": False, "rank_pattern": {},
    "alpha_pattern": {}, "layer_replication": None, "trainable_token_indices": None, "target_parameters": None,
    "alora_invocation_tokens": None, "use_qalora": False, "arrow_config": None, "kasa_config": None, "use_bdlora": None,
    "monteclora_config": None, "velora_config": None,
}  # fmt: skip


class Info(NamedTuple):
    """What an adapter_config.json says: sizes, dropout while training, the base model, and the paths of the adapted leaves."""

    rank: int
    alpha: float
    rslora: bool
    dropout: float
    base: str
    paths: list[str]


def module(family: str, path: str) -> str:
    """PEFT's name of the module that owns a leaf: `model.layers.0.self_attn.q_proj`."""
    return hf.hf_key(family, path).rpartition(".")[0]


def check(family: str, adapted: list[str], whole: list[str]) -> None:
    """Raise ValueError when PEFT's format cannot hold these adapted leaves and these leaves trained whole.

    PEFT saves whole modules, so a projection goes with its bias; and a module is adapted or saved, never both.
    """
    if not adapted:
        raise ValueError("an adapter folder needs at least one adapted leaf; save a model trained whole with hf.save instead")
    owners = {module(family, path): path for path in adapted}
    for path in whole:
        if (owner := module(family, path)) in owners:
            raise ValueError(f"{path} is trained whole and {owners[owner]} of the same module has an adapter: choose one of the two")
        for other in _siblings(family, path):
            if other not in whole:
                raise ValueError(f"{path} is trained whole without {other}; PEFT saves a module with all its leaves: train both or neither")


def _siblings(family: str, path: str) -> list[str]:
    """The leaves of the module that owns `path`."""
    owner = module(family, path)
    leaves = (hf.from_hf_key(family, f"{owner}.{kind}") for kind in ("weight", "bias"))
    return [leaf for leaf in leaves if leaf is not None]


def save(
    path: str | Path,
    adapter: Params,
    *,
    family: str,
    base: str,
    rank: int,
    alpha: float,
    rslora: bool = False,
    dropout: float = 0.0,
    whole: Params | None = None,
    tied: bool = False,
    tokenizer=None,
    template: str | None = None,
    task: str = "CAUSAL_LM",
    beside: dict[str, Tensor] | None = None,
) -> None:
    """Write an adapter folder that `peft.PeftModel.from_pretrained` turns into the same function as ours.

    `adapter` is the LoRA tree, `whole` a tree of leaves trained whole beside it, `base` the name or path of the base
    model, `tied` whether that model is tied. `tokenizer` goes into the folder when it is not the base model's, or only its
    chat `template` when that is all that differs. `task` is PEFT's task_type, `beside` the tensors by name of whole modules
    that are no leaves of the family, such as a scalar head. Raises ValueError as `check` does, and when a rank is not `rank`.
    """
    from safetensors.torch import save_file

    replaced = dict(tree.items(whole or {}))
    found = lora.pairs(adapter)
    check(family, list(found), list(replaced))
    if wrong := [name for name, (a, _) in found.items() if a.shape[0] != rank]:
        raise ValueError(f"the adapter of {wrong[0]} has rank {found[wrong[0]][0].shape[0]}; adapter_config.json would say {rank}")
    key = partial(hf.hf_key, family)
    tensors = lora.to_peft(adapter, key) | {PREFIX + key(name): leaf for name, leaf in replaced.items()}
    tensors |= {PREFIX + name: leaf for name, leaf in (beside or {}).items()}
    modules = {module(family, name) for name in replaced} | {name.rpartition(".")[0] for name in beside or {}}
    if tied and "embed_tokens" in replaced and "lm_head" not in replaced:
        # PEFT would leave a tied head at the old embedding: give it the new one, as a module or under its adapter.
        name = module(family, "lm_head")
        modules |= set() if "lm_head" in found else {name}
        tensors[f"{PREFIX}{name}{BASE if 'lm_head' in found else '.weight'}"] = replaced["embed_tokens"].clone()
    config = PLAIN | {
        "task_type": task, "base_model_name_or_path": base, "inference_mode": True, "init_lora_weights": True,
        "r": rank, "lora_alpha": alpha, "use_rslora": rslora, "lora_dropout": dropout,
        "target_modules": [module(family, name) for name in found], "modules_to_save": sorted(modules) or None,
    }  # fmt: skip
    with folder.writing(path) as part:
        save_file({name: leaf.detach().contiguous() for name, leaf in tensors.items()}, part / WEIGHTS, metadata={"format": "pt"})
        folder.write_json(part / CONFIG, config)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        elif template is not None:
            (part / TEMPLATE).write_text(template, encoding="utf-8")


def load(path: str | Path, model: Model, *, dtype: torch.dtype = torch.float32) -> tuple[Lora, Params, Info]:
    """The adapter in a folder (no dropout), the leaves to lay over the model's, and what its config says.

    Raises ValueError unless every tensor of the file is used, every A has its B in the shapes of the model, every module
    that the config names is there, and the config asks for nothing but plain LoRA.
    """
    found, whole, _, info = load_beside(path, model, (), dtype=dtype)
    return found, whole, info


def load_beside(
    path: str | Path, model: Model, names: Sequence[str], *, dtype: torch.dtype = torch.float32
) -> tuple[Lora, Params, dict[str, Tensor], Info]:
    """As `load`, from a folder that may hold tensors of these names besides, which come third."""
    root = Path(path).expanduser()
    config = _read_config(root / CONFIG)
    if names:
        config["modules_to_save"] = [name for name in config.get("modules_to_save") or [] if name not in CLASSIFIERS]
    tensors = _read_tensors(root / WEIGHTS)
    shapes = dict(tree.items(hf.abstract_of(model, head=True)))
    paths = [name for name, leaf in shapes.items() if len(leaf.shape) == 2]
    key = partial(hf.hf_key, model.family)
    bases = {name: tensors.pop(name) for name in sorted(tensors) if name.endswith(BASE)}
    beside = {name: tensors.pop(PREFIX + name) for name in names if PREFIX + name in tensors}
    whole = {name: tensors.pop(PREFIX + key(name)) for name in shapes if PREFIX + key(name) in tensors}
    tree_ = tree.map(lambda leaf: leaf.to(model.params["norm"].device, dtype), lora.from_peft(tensors, paths, key))
    adapted = lora.pairs(tree_)
    _check_shapes(adapted, whole, shapes, config["r"])
    _check_modules(model.family, config, list(adapted), list(whole))
    whole = _untie(_based(bases, whole, model), model)
    scale = lora.scale(rank=config["r"], alpha=config["lora_alpha"], rslora=config.get("use_rslora", False))
    info = Info(config["r"], config["lora_alpha"], config.get("use_rslora", False), config.get("lora_dropout", 0.0),
                config.get("base_model_name_or_path") or "", list(adapted))  # fmt: skip
    like = dict(tree.items(model.params))
    leaves = ((name, leaf.to(like.get(name, like["embed_tokens"]))) for name, leaf in whole.items())
    return Lora(tree_, scale), tree.from_items(leaves), beside, info


def base_of(path: str | Path) -> str:
    """The base model that an adapter folder names; empty when it names none."""
    return _read_config(Path(path).expanduser() / CONFIG).get("base_model_name_or_path") or ""


def task_of(path: str | Path) -> str | None:
    """PEFT's task_type of an adapter folder; None when it names none."""
    return _read_config(Path(path).expanduser() / CONFIG).get("task_type")


def rows(path: str | Path, family: str) -> int | None:
    """Rows of the vocabulary that an adapter was trained with; None where it holds no whole embedding or head to tell."""
    from safetensors import SafetensorError, safe_open

    manifest.check(Path(path).expanduser())
    try:
        with safe_open(Path(path).expanduser() / WEIGHTS, framework="pt") as file:
            there = set(file.keys())
            found = [key for name in resize.LEAVES if (key := PREFIX + hf.hf_key(family, name)) in there]
            return file.get_slice(found[0]).get_shape()[0] if found else None
    except (SafetensorError, OSError):
        return None  # `load` says what is wrong with the file


def _read_config(file: Path) -> dict:
    config = folder.read_json(file)
    for name, value in PLAIN.items():
        if config.get(name) and config[name] != value:
            raise ValueError(f"{file} has {name}={config[name]!r}; only plain LoRA is known here ({name}={value!r})")
    if "r" not in config or "lora_alpha" not in config:
        raise ValueError(f"{file} has no r or no lora_alpha; expected the config of a LoRA adapter")
    manifest.check(file.parent, weights=False)
    return config


def _read_tensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise ValueError(f"{file} does not exist; expected a PEFT adapter saved as safetensors")
    manifest.check(file.parent)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read as safetensors ({error}): save or download the adapter again") from error


def _check_shapes(adapted: dict, whole: dict[str, Tensor], shapes: dict, rank: int) -> None:
    for path, (a, b) in adapted.items():
        out, inner = shapes[path].shape[::-1] if path == "embed_tokens" else shapes[path].shape
        if tuple(a.shape) != (rank, inner) or tuple(b.shape) != (out, rank):
            raise ValueError(
                f"the adapter of {path} has A {list(a.shape)} and B {list(b.shape)}; "
                f"the model and rank {rank} ask for {[rank, inner]} and {[out, rank]}"
            )
    for path, leaf in whole.items():
        if tuple(leaf.shape) != shapes[path].shape:
            raise ValueError(f"{path} in the adapter file has shape {list(leaf.shape)}; the model has {list(shapes[path].shape)}")


def _check_modules(family: str, config: dict, adapted: list[str], whole: list[str]) -> None:
    """Every module that the config names with its full path must be in the file (short names stand for any number of modules)."""
    there = {module(family, path) for path in adapted + whole}
    targets = config.get("target_modules")
    named = [*(targets if isinstance(targets, list) else []), *(config.get("modules_to_save") or [])]
    for name in named:
        if not any(owner == name or owner.endswith(f".{name}") for owner in there):
            raise ValueError(f"adapter_config.json names {name}, and the adapter file has nothing for it")


def _based(bases: dict[str, Tensor], whole: dict[str, Tensor], model: Model) -> dict[str, Tensor]:
    """PEFT may save the base weight below an adapter: it is used when it equals the model's, or the trained tied embedding."""
    for name, leaf in bases.items():
        path = hf.from_hf_key(model.family, name.removeprefix(PREFIX).replace(BASE, ".weight"))
        tied = path == "lm_head" and "lm_head" not in model.params
        source = "embed_tokens" if tied else path
        expected = whole.get(source, dict(tree.items(model.params)).get(source))
        if expected is None or expected.shape != leaf.shape or not torch.equal(expected.cpu().to(leaf.dtype), leaf):
            raise ValueError(f"the adapter file holds a base weight {name} that is not the one of this model: load it over its own base")
    return whole


def _untie(whole: dict[str, Tensor], model: Model) -> dict[str, Tensor]:
    """Drop a head that repeats the trained embedding of a tied model: the model ties the two itself."""
    both = "lm_head" in whole and "embed_tokens" in whole and "lm_head" not in model.params
    if both and torch.equal(whole["lm_head"], whole["embed_tokens"]):
        return {name: leaf for name, leaf in whole.items() if name != "lm_head"}
    return whole
