"""The skeleton of a bridged model: transformers' modules without weights, and the names of its leaves.

Parameters are on the meta device; buffers that no file holds (rotary frequencies) are computed for real. A leaf's path is transformers' key
without the prefix of the base model and without `.weight`; embedding, head and layers have the names that all families give them.
"""

import collections
import dataclasses
import functools
import inspect
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from treetune.models import bridge_attention, bridge_experts, plain_model

CPU = torch.device("cpu")
LAYERS, EMBEDDING, HEAD, HEAD_BIAS = "layers", "embed_tokens", "lm_head", "lm_head_bias"


class Skeleton(NamedTuple):
    """A model of transformers without weights. `base` yields hidden states, `layers` are modules inside it; a base that is the whole model
    yields them as the input of its output matrix, `head`.

    keys: {path of a leaf: transformers' key}; leaves: {path: its tensor in the skeleton}; paths: {id of that tensor: path};
    numbers: {path: its number in the order of the files}; linears: paths of linear layers; experts: paths of stacks of experts that our
    products compute; needs: the leaves of each layer, shared ones included; wide: the dtype of those that stay in float32 whatever the
    model computes in; constants: tables by key that files hold, too.
    """

    model: Any
    base: Any
    head: nn.Module
    layers: nn.ModuleList
    embedding: nn.Module
    keys: dict[str, str]
    leaves: dict[str, Tensor]
    paths: dict[int, str]
    numbers: dict[str, int]
    linears: frozenset[str]
    experts: frozenset[str]
    needs: tuple[tuple[str, ...], ...]
    wide: dict[str, torch.dtype]
    constants: dict[str, Tensor]


def fields_of(config: Any) -> set[str]:
    """The fields that a config of transformers knows, by every name that it takes for them."""
    own = {field.name for field in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else set(vars(config))
    kind: Any = type(config)
    return own | set(kind.attribute_map) | set(kind().to_dict())


def hf_config(kind: str, text: str) -> Any:
    """The config of transformers for a config.json's text. Errors: ValueError, one line, for what transformers refuses."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[kind].from_dict(json.loads(text, object_hook=_special))
    except Exception as error:  # whatever class its validators raise: strict dataclasses have their own
        reason = " ".join(str(error).split())
        raise ValueError(f"transformers refuses this config.json of {kind}: {reason[:300]}") from error


def _special(value: dict[str, Any]) -> Any:
    """Infinity and nan, as transformers writes them."""
    return float(value["__float__"]) if set(value) == {"__float__"} else value


@functools.lru_cache(maxsize=8)
def skeleton(kind: str, text: str, dtype: torch.dtype, alone: bool, device: torch.device, whole: bool = False) -> Skeleton:
    """The skeleton of a config. alone: with transformers' own attention, which knows one document; else with that over a plan.

    whole: the base is the whole model, because it does more than scale states between its layers and its output matrix.
    """
    model = _build(kind, text, dtype, alone, device)
    base = model if whole else _base(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    if id(embedding) not in names or id(head) not in names or set(head._parameters) - {"weight", "bias"} or not is_linear(head):
        raise ValueError(f"{type(model).__name__} has no matrix of token embeddings, or its head is no linear layer")
    decoder = _decoder(model, base)
    layers = _layers(decoder, getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None))
    renames = {names[id(layers)]: LAYERS, names[id(embedding)]: EMBEDDING, names[id(head)]: HEAD}
    tensors, constants = dict(_tensors(model)), _constants(model)
    renames |= {key: HEAD_BIAS for key, leaf in tensors.items() if leaf is head.bias}  # which some have under another name
    # Both also where one is the other, since a tied model may come to have its own; the first is what a tied tensor is called.
    tensors = {f"{names[id(embedding)]}.weight": embedding.weight} | tensors | {f"{names[id(head)]}.weight": head.weight}
    if odd := [key for key, tensor in tensors.items() if not tensor.is_floating_point()]:
        raise ValueError(f"{type(model).__name__} has the table of integers {odd[0]}, which no optimiser can hold")
    keys = _paths(tensors, renames, _home(names[id(layers)]))
    leaves = {path: tensors[key] for path, key in keys.items()}
    paths = {id(tensor): path for path, tensor in reversed(leaves.items())}
    linears, experts = _linears(model, paths) - {HEAD}, _experts(decoder, paths)
    numbers = {path: number for number, path in enumerate(keys)}
    needs = tuple(tuple(paths[id(tensor)] for _, tensor in _tensors(layer)) for layer in layers)
    wide = _kept_wide(model, keys, dtype)
    return Skeleton(model, base, head, layers, embedding, keys, leaves, paths, numbers, linears, experts, needs, wide, constants)


def takes_positions(base: Any) -> bool:
    """Whether a module takes position ids, by name or among further keywords."""
    taken = inspect.signature(type(base).forward).parameters
    return "position_ids" in taken or any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())


def _linears(model: nn.Module, paths: dict[int, str]) -> frozenset[str]:
    """The paths of linear layers. A weight that several layers share is none: an adapter of PEFT sits on one of them."""
    modules = [module for _, module in model.named_modules(remove_duplicate=False)]
    owners = collections.Counter(paths[id(module.weight)] for module in modules if is_linear(module))
    return frozenset(path for path, count in owners.items() if count == 1)


def _experts(decoder: nn.Module, paths: dict[int, str]) -> frozenset[str]:
    """The paths of the stacks [E, O, I] of experts in transformers' interface."""
    return frozenset(paths[id(module._parameters[name])] for module in decoder.modules() for name in bridge_experts.stacks(module))


def _base(model: Any) -> Any:
    """The module that yields hidden states. Some classes name another prefix than they have."""
    named = [getattr(model, name, None) for name in (model.base_model_prefix, "model")]
    if not (modules := [module for module in named if isinstance(module, nn.Module)]):
        raise ValueError(f"{type(model).__name__} has no base model that yields hidden states")
    return modules[0]


def text_part(config: Any) -> str | None:
    """The field of a config of transformers that holds that of its language model; None where it is that itself."""
    inner = config.get_text_config(decoder=True)
    return None if inner is config else next(name for name in type(config).sub_configs if getattr(config, name, None) is inner)


def has_media(model: Any) -> bool:
    """Whether a model has parts beside its language model, which a config of their own describes."""
    return model.config.get_text_config(decoder=True) is not model.config


def _decoder(model: Any, base: nn.Module) -> nn.Module:
    """The language model inside a base that has other parts, too; else the base."""
    inside = model.get_decoder() if has_media(model) and hasattr(model, "get_decoder") else base
    return inside if any(module is inside for module in base.modules()) else base


def _build(kind: str, text: str, dtype: torch.dtype, alone: bool, device: torch.device) -> Any:
    """The model of transformers in evaluation mode."""
    bridge_attention.register()
    bridge_experts.register()
    config = hf_config(kind, text)
    config._experts_implementation = bridge_experts.NAME
    options = {} if alone else {"attn_implementation": bridge_attention.NAME}
    with torch.device("meta"):
        model = plain_model.auto_class(config).from_config(config, dtype=dtype, **options)
    model.tie_weights()
    _fill_buffers(model, device)
    return model.eval()


def _fill_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers, as transformers does after it has read the weights. Errors: ValueError for one that nothing computes."""
    fresh = []
    for module in model.modules():
        module._is_hf_initialized = False
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                unset = torch.nan if buffer.is_floating_point() else 0
                module._buffers[name] = torch.full(buffer.shape, unset, dtype=buffer.dtype)
                fresh.append((module, name))
    with torch.no_grad():
        model.initialize_weights()
    for module, name in fresh:
        if module._buffers[name].isnan().any() and name in module._non_persistent_buffers_set:
            raise ValueError(f"the buffer {name} of {type(module).__name__} is computed nowhere")
        value = module._buffers[name]
        module._buffers[name] = (value.where(~value.isnan(), 0) if value.is_floating_point() else value).to(device)  # only files hold it


def _layers(base: nn.Module, count: int | None) -> nn.ModuleList:
    """The list of decoder layers: the outermost that holds most of the weights beside it, of as many as the config says if there is one."""
    lists = [(name, module) for name, module in base.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    full = [(name, module) for name, module in lists if 2 * _count(module) >= _count(base.get_submodule(name.rpartition(".")[0]))]
    if not full:
        raise ValueError(f"{type(base).__name__} has no list of layers")
    return min(full, key=lambda pair: (len(pair[1]) != count, pair[0].count(".")))[1]


def _count(module: nn.Module) -> int:
    """Numbers in a module, embeddings left out."""
    inside = [leaf for part in module.modules() if not isinstance(part, nn.Embedding) for leaf in part.parameters(recurse=False)]
    return sum(leaf.numel() for leaf in {id(leaf): leaf for leaf in inside}.values())


def _home(name: str) -> str:
    """The module that holds the layers, with a dot behind it: `model.` of `model.layers`."""
    holder, dot, _ = name.rpartition(".")
    return holder + dot


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and the buffers that files hold, by key, each tensor once."""
    seen = set()
    for name, child in module.named_modules():
        own = [*child._parameters.items(), *((key, buffer) for key, buffer in _held(child) if buffer.ndim < 2)]
        for key, tensor in own:
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{name}.{key}".lstrip("."), tensor


def _held(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers of a module that files hold."""
    return [(key, leaf) for key, leaf in module._buffers.items() if leaf is not None and key not in module._non_persistent_buffers_set]


def _constants(model: nn.Module) -> dict[str, Tensor]:
    """The matrices among the buffers of files: the config decides them, and a decay of weights would change them."""
    return {f"{name}.{key}": leaf for name, child in model.named_modules() for key, leaf in _held(child) if leaf.ndim > 1}


def _paths(tensors: dict[str, Tensor], renames: dict[str, str], home: str) -> dict[str, str]:
    """{path: key}. What stands beside or inside a module with a weight is named behind a line: a leaf `q_proj` cannot hold another."""
    owners = {key.removesuffix(".weight") for key in tensors if key.endswith(".weight") and not key.split(".")[-2].isdigit()}
    paths: dict[str, str] = {}
    for key in tensors:
        owner, _, last = key.rpartition(".")
        name = owner if owner in owners and last == "weight" else key
        for held in sorted((held for held in owners if name.startswith(f"{held}.")), key=len, reverse=True):
            name = f"{name[: len(held)]}_{name[len(held) + 1 :]}"
        path = _renamed(name, renames, home)
        if path in paths:
            raise ValueError(f"{key} and {paths[path]} would both be the leaf {path}")
        paths[path] = key
    for path in paths:
        parts = path.split(".")
        if within := [inside for size in range(1, len(parts)) if (inside := ".".join(parts[:size])) in paths]:
            raise ValueError(f"{paths[path]} would stand inside the leaf {within[0]}")
    return paths


def _renamed(name: str, renames: dict[str, str], home: str) -> str:
    for old, new in renames.items():
        if name == old or name.startswith((f"{old}.", f"{old}_")):
            return new + name[len(old) :]
    first, dot, rest = name.removeprefix(home).partition(".")
    return f"{first}_block.{rest}" if dot and first in (HEAD, EMBEDDING) else first + dot + rest  # those are leaves


def is_linear(module: nn.Module) -> bool:
    """Whether a module is y = x W^T + b, of whatever class."""
    return isinstance(module, nn.Linear) and _is_product(type(module))


@functools.cache
def _is_product(kind: type[nn.Linear]) -> bool:
    """Whether the forward of a class of linear layers is that of its base, by what it makes of some numbers."""
    if kind.forward is nn.Linear.forward:
        return True
    x, w, b = torch.tensor([[0.5, -2.0, 3.0]]), torch.tensor([[1.0, 2.0, -1.0], [0.25, 1.0, 4.0]]), torch.tensor([0.5, -0.75])
    sample = object.__new__(kind)
    sample.__dict__.update(nn.Linear(1, 1, device="meta").__dict__)
    sample.__dict__["_parameters"] = {"weight": w, "bias": b}
    try:
        y = kind.forward(sample, x)
        return isinstance(y, Tensor) and torch.equal(y, x @ w.T + b)
    except Exception:  # whatever its own code raises without what its constructor makes
        return False


def _kept_wide(model: Any, keys: dict[str, str], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """{path: float32} of the leaves that transformers keeps in float32 in a model of lower precision."""
    if dtype not in (torch.float16, torch.bfloat16):
        return {}
    names = set(model._keep_in_fp32_modules_strict or ()) | (set(model._keep_in_fp32_modules or ()) if dtype is torch.float16 else set())
    rules = [re.compile(rf"(^|\.){name}($|\.)") for name in names]
    return {path: torch.float32 for path, key in keys.items() if any(rule.search(key) for rule in rules)}
