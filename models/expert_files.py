"""Experts in files: a tensor for each projection of each expert, as most folders have them, or stacked ones, as transformers 5 holds them.

E experts. A family's `HF_PARTS` is {path of a stacked leaf: keys in the older files, in the order of its rows}, with `{}` for the number
of the layer, and `{e}` for that of the expert where each has a tensor of its own. `HF_KEYS` has the key of the stacked one.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from treetune.core import tree
from treetune.core.param import Param, Params

Parts = Mapping[str, tuple[str, ...]]  # key of a stacked tensor -> keys of its parts


def keys(patterns: tuple[str, ...], layer: str, leaf: Param | Tensor) -> tuple[str, ...]:
    """The keys of the parts of a leaf, in the order of its rows."""
    names = [pattern.replace("{}", layer, 1) for pattern in patterns]
    experts = range(leaf.shape[0]) if "{e}" in names[0] else range(1)
    return tuple(name.replace("{e}", str(e)) for e in experts for name in names)


def layer_of(path: str) -> tuple[str, str]:
    """The path with `{}` for the number of its layer, and that number; "" outside of layers."""
    parts = path.split(".")
    if parts[0] != "layers":
        return path, ""
    return ".".join(["layers", "{}", *parts[2:]]), parts[1]


def parts_of(table: Parts, sizes: Params) -> dict[str, tuple[str, ...]]:
    """{path: keys of its parts} for the leaves of a model that older files have in parts."""
    found = ((path, *layer_of(path), leaf) for path, leaf in tree.items(sizes))
    return {path: keys(table[pattern], layer, leaf) for path, pattern, layer, leaf in found if pattern in table}


def part(leaf: Param, count: int) -> Param:
    """One of `count` parts of a leaf, each some consecutive rows of it."""
    rows = torch.Size(leaf.shape[:-1]).numel()
    return leaf._replace(shape=(rows // count, leaf.shape[-1]))


def cut(leaf: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The parts of a leaf by key, as views."""
    return dict(zip(names, leaf.reshape(len(names), -1, leaf.shape[-1]).unbind(), strict=True))
