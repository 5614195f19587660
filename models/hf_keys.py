"""Leaf paths (`layers.3.q_proj`) and the keys of transformers' files (`model.layers.3.self_attn.q_proj.weight`).

Leaves that a family gives one key share its tensor, as blocks of rows in the order of `HF_KEYS`: `qkv_proj` of phi3 holds q, k and v.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from treetune.core import quant, quant_parts, tree
from treetune.core.param import Param
from treetune.models import MODELS

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole component; the first in a name is that of the layer


def pattern(path: str) -> str:
    """A path or a key with {} for the number of its layer."""
    return NUMBER.sub("{}", path, count=1)


def hf_key(family: str, path: str) -> str:
    """The Hugging Face key of a leaf path. Raises ValueError naming the nearest leaves when the family has no such leaf."""
    number, keys = NUMBER.search(path), MODELS[family].HF_KEYS
    if pattern(path) not in keys:
        raise ValueError(f"{family} has no leaf {path!r}; the nearest are {', '.join(tree.nearest(pattern(path), keys))}")
    return keys[pattern(path)].format(*([number[0]] if number else []))


def leaves_of(family: str, key: str) -> list[str]:
    """The paths of the leaves in the tensor of a Hugging Face key, in the order of their rows; none when the family has no such key."""
    number = NUMBER.search(key)
    paths = [path for path, key_pattern in MODELS[family].HF_KEYS.items() if key_pattern == pattern(key)]
    return [path.format(*([number[0]] if number else [])) for path in paths]


def groups(family: str, paths: Iterable[str]) -> dict[str, list[str]]:
    """{key: those of the paths that share its tensor, in the order of their rows}."""
    shared: dict[str, list[str]] = {}
    for path in paths:
        shared.setdefault(hf_key(family, path), []).append(path)
    return {key: paths if len(paths) == 1 else [path for path in leaves_of(family, key) if path in paths] for key, paths in shared.items()}


def sizes(family: str, leaves: Mapping[str, Param]) -> dict[str, Param]:
    """{key: its tensor in the files} of leaves by path."""
    stored = {path: leaf._replace(shape=_swapped(leaf.shape)) if _turned(family, path) else leaf for path, leaf in leaves.items()}
    return {key: _tall([stored[path] for path in paths]) for key, paths in groups(family, leaves).items()}


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


def turn(family: str, path: str, tensor: Any) -> Any:
    """A leaf as the files have it, and back: some families keep stacks of matrices as [E, I, O] there."""
    if not _turned(family, path):
        return tensor
    # Codes cannot be turned: their scales are those of rows.
    whole: Tensor = quant.dense(tensor) if quant.quantised(tensor) else tensor
    return whole.transpose(-1, -2).contiguous()


def _turned(family: str, path: str) -> bool:
    return pattern(path) in getattr(MODELS[family], "HF_TURNED", ())


def _tall(leaves: list[Param]) -> Param:
    return leaves[0] if len(leaves) == 1 else leaves[0]._replace(shape=(sum(leaf.shape[0] for leaf in leaves), *leaves[0].shape[1:]))


def split(family: str, tensors: Mapping[str, Tensor], leaves: Mapping[str, Any]) -> dict[str, Tensor]:
    """{path: leaf} of the tensors by key; `leaves` have their shapes. A block is a copy, so that none keeps the others in memory."""
    parts: dict[str, Tensor] = {}
    for key, paths in groups(family, leaves).items():
        if key in tensors:
            parts |= blocks(family, paths, tensors[key], leaves)
    return parts


def blocks(family: str, paths: list[str], tensor: Any, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{path: leaf} of the leaves that share a tensor of the files, which may be quantised."""
    if len(paths) == 1:
        return {paths[0]: turn(family, paths[0], tensor)}
    rows = [leaves[path].shape[0] for path in paths]
    if quant.quantised(tensor):
        return dict(zip(paths, quant_parts.split(tensor, rows), strict=True))
    return {path: block.clone() for path, block in zip(paths, tensor.split(rows), strict=True)}


def join(family: str, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{key: tensor} of leaves by path."""
    shared = groups(family, leaves)
    return {
        key: turn(family, paths[0], leaves[paths[0]]) if len(paths) == 1 else torch.cat([leaves[path] for path in paths])
        for key, paths in shared.items()
    }
