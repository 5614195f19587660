"""A model as its files will hold it: tensors by key that are made one leaf after another while they are written."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treetune.core import tree
from treetune.core.param import Param
from treetune.models import MODELS, Model, expert_files, hf_keys


class Late(NamedTuple):
    """A leaf that is made when it is written: its shape, its dtype, and what makes it, a collective where ranks have parts of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


class Files(NamedTuple):
    """sizes: {key: shape and dtype} of the tensors in the order of `tensors()`, which makes them; None where only these tell."""

    sizes: Mapping[str, Param] | None
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]


def tensor_of(leaf: Any) -> Tensor:
    """The tensor of a leaf, detached."""
    return (leaf.make() if isinstance(leaf, Late) else leaf).detach()


def tied(model: Model) -> bool:
    """Whether the head is the embedding: also where a tied model has a head of its own with the same numbers."""
    ends = model.params.get("lm_head"), model.params["embed_tokens"]
    return ends[0] is None or (model.cfg.tied and torch.equal(*map(tensor_of, ends)))


def of(model: Model, parts: expert_files.Parts, *, tied: bool, stacked: bool = False) -> Files:
    """The tensors of a model. parts: keys of those that are written in parts; stacked: in one all the same."""
    leaves = {path: leaf for path, leaf in tree.items(model.params) if not (tied and path == "lm_head")}
    if not stacked and (convert := getattr(MODELS[model.family], "to_files", None)) is not None:
        # transformers' conversions take all tensors at once.
        return Files(None, lambda: iter(convert(model.cfg, dict(_joined(model.family, leaves))).items()))
    split = {} if stacked else parts

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for key, leaf in _joined(model.family, leaves):
            pieces = expert_files.cut(leaf, split[key]) if key in split else {key: leaf}
            yield from ((name, rows.contiguous()) for name, rows in pieces.items())

    whole = hf_keys.sizes(model.family, {path: Param(tuple(leaf.shape), leaf.dtype) for path, leaf in leaves.items()})
    names = {key: split.get(key, (key,)) for key in whole}
    sizes = {name: expert_files.part(whole[key], len(each)) if key in split else whole[key] for key, each in names.items() for name in each}
    return Files(sizes, tensors)


def follow(model: Model, *, tied: bool) -> None:
    """Take part in making every leaf, where another rank writes them."""
    leaves = {path: leaf for path, leaf in tree.items(model.params) if not (tied and path == "lm_head")}
    for paths in hf_keys.groups(model.family, leaves).values():
        for path in paths:
            tensor_of(leaves[path])


def _joined(family: str, leaves: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of each group of leaves that share one."""
    for paths in hf_keys.groups(family, leaves).values():
        for key, leaf in hf_keys.join(family, {path: tensor_of(leaves[path]) for path in paths}).items():
            yield key, leaf.contiguous()
