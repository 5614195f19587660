"""LoRA as a second tree: where the model has a weight [O, I], the adapter tree has {"A": [r, I], "B": [O, r]}.

A stack of weights [E, O, I] has a pair for each, {"A": [E, r, I], "B": [E, O, r]}.
y = x W^T + scale (x A^T) B^T. With a magnitude "M" [O] beside them, rows of W + scale B A have its length (DoRA, `ops.magnitude`).
Source: Hu et al., arXiv 2106.09685; rank-stabilised scale: Kalajdzievski, arXiv 2312.03732.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treetune.core import module_names, param, shard, tree
from treetune.core.param import Param, Params

ALL_LINEAR = "all-linear"
MAGNITUDE, SETTLED = "M", "G"  # of DoRA: what trains, and it over the norms of the rows, once these are known
PEFT_MAGNITUDE = "lora_magnitude_vector"
PEFT_LINEAR, PEFT_EMBEDDING = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")


class Lora(NamedTuple):
    """An adapter in use: its tree, its scale (never trained), and its dropout with the 0-d int64 seed of the step.

    ratios: (path, the scale of its pair over the common one), of a trained tree as `lora_use` takes it; none of one in use.
    """

    tree: Params
    scale: float
    dropout: float = 0.0
    seed: Tensor | None = None
    ratios: tuple[tuple[str, float], ...] = ()


def scale(*, rank: int, alpha: float, rslora: bool = False) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def linears(abstract: Params) -> list[str]:
    """Paths of the linear layers: what "all-linear" means (embeddings and head are excluded)."""
    return [path for path, leaf in tree.items(abstract) if leaf.op == "linear"]


def adaptable(abstract: Params) -> list[str]:
    """Paths of the leaves that an adapter may sit on."""
    return [path for path, leaf in tree.items(abstract) if leaf.op]


def match(
    abstract: Params,
    targets: str | Iterable[str],
    *,
    layers: Iterable[int] | None = None,
    module: Callable[[str], str] = str,
) -> list[str]:
    """Paths of the leaves to adapt: "all-linear", names of modules, or regexes over paths or names; optionally only in the given layers.

    module: the name of the module of transformers that owns a leaf. Raises ValueError when a target or a layer number matches nothing,
    naming the nearest names and all there are.
    """
    owners = {path: module(path) for path, _ in tree.items(abstract)}
    modules = {path: owners[path] for path in adaptable(abstract)}
    matched: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        every = target.lower() == ALL_LINEAR
        matched.update(linears(abstract) if every else module_names.match_target(target, modules, owners))
    if not matched:
        raise ValueError(
            f"{ALL_LINEAR} matches nothing: no leaf of this family says that it is a linear layer; train all weights with adapter none"
        )
    paths = [path for path in modules if path in matched]
    return paths if layers is None else _in_layers(paths, set(layers), owners)


def _in_layers(paths: list[str], wanted: set[int], every: Iterable[str]) -> list[str]:
    count = 1 + max((number for path in every if (number := module_names.layer_of(path)) is not None), default=-1)
    if outside := sorted(index for index in wanted if not 0 <= index < count):
        raise ValueError(f"layers {outside} do not exist: the model has layers 0 to {count - 1}")
    inside = [path for path in paths if (number := module_names.layer_of(path)) is None or number in wanted]
    if not inside:
        raise ValueError(f"none of the targets is in layers {sorted(wanted)}; they are {', '.join(paths[:3])}")
    return inside


def abstract(model: Params, paths: Iterable[str], *, rank: int | Mapping[str, int], dtype: torch.dtype = torch.float32) -> Params:
    """The abstract adapter tree for the leaves at `paths`: A uniform as in PEFT, B zero, so the start is the base model.

    rank: of all, or by path.
    """
    shapes = {path: leaf for path, leaf in tree.items(model)}
    pairs = []
    for path in paths:
        *stack, outputs, inputs = shapes[path].shape
        *stack_axes, out_axis, in_axis = getattr(shapes[path], "axes", ()) or (*("expert",) * len(stack), "out", "in")
        # PEFT starts an embedding's pair the other way round: A zero, B normal.
        a, b = ("zeros", "normal:1.0") if path == "embed_tokens" else ("kaiming", "zeros")
        if path == "embed_tokens":
            outputs, inputs, out_axis, in_axis = inputs, outputs, in_axis, out_axis
        r = rank if isinstance(rank, int) else rank[path]
        pairs.append((f"{path}.A", Param((*stack, r, inputs), dtype, (*stack_axes, "rank", in_axis), a)))
        pairs.append((f"{path}.B", Param((*stack, outputs, r), dtype, (*stack_axes, out_axis, "rank"), b)))
    return tree.from_items(pairs)


def init(model: Params, paths: Iterable[str], *, rank: int | Mapping[str, int], seed: int, dtype: torch.dtype = torch.float32) -> Params:
    """A fresh adapter tree for the leaves of `model` (tensors or Params) at `paths`."""
    return param.init(abstract(model, paths, rank=rank, dtype=dtype), seed=seed)


def pairs(adapter: Params) -> dict[str, tuple[Tensor, Tensor]]:
    """{path of the adapted weight: (A, B)}."""
    flat = dict(tree.items(adapter))
    return {path[:-2]: (leaf, flat[f"{path[:-2]}.B"]) for path, leaf in flat.items() if path.endswith(".A")}


def magnitudes(adapter: Params, name: str = MAGNITUDE) -> dict[str, Tensor]:
    """{path of the adapted weight: m [O]}, of those that have one."""
    return {path.removesuffix(f".{name}"): leaf for path, leaf in tree.items(adapter) if path.endswith(f".{name}")}


def check_magnitudes(paths: Iterable[str]) -> None:
    """Raise ValueError for a weight on which DoRA is not computed."""
    if odd := next((path for path in paths if not in_layer(path)), None):
        raise ValueError(f"{odd} has a magnitude: DoRA is computed on linear layers only, not on embeddings, heads, routers and experts")


def in_layer(path: str) -> bool:
    """Whether a leaf is a linear layer by its path: no embedding, head, router or stack of experts."""
    return path not in ("embed_tokens", "lm_head") and not path.endswith(".router") and ".experts." not in path


def of(pairs: Mapping[str, tuple[Tensor, Tensor]], like: Params) -> Params:
    """The tree of pairs (A, B) by path, with the magnitudes that `like` has for these paths."""
    flat = dict(tree.items(like))
    items = [(f"{path}.{name}", leaf) for path, pair in pairs.items() for name, leaf in zip("AB", pair, strict=True)]
    items += [(key, flat[key]) for path in pairs for name in (MAGNITUDE, SETTLED) if (key := f"{path}.{name}") in flat]
    return tree.from_items(items)


def delta(path: str, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The full-size update scale * B A in float32, in the orientation of the weight at `path`."""
    product = scaling * (b.float() @ a.float())
    return product.T if path == "embed_tokens" else product


def merge(model: Params, adapter: Params, scaling: float) -> Params:
    """W + scale B A for every adapted leaf, in rows of its magnitude if it has one, each rounded once to the leaf's dtype.

    A tied model (no `lm_head` leaf) whose adapters sit on the embedding or the head only comes out untied, because the
    two matrices then differ.
    """
    adapted = pairs(adapter)
    base = dict(tree.items(model))
    tied = "lm_head" not in base
    if tied and ("lm_head" in adapted or "embed_tokens" in adapted):
        base["lm_head"] = base["embed_tokens"]
    for path in adapted:
        base[path] = merged(path, base[path], adapter, scaling).to(base[path].dtype)
    return tree.from_items(base.items())


def merged(path: str, leaf: Any, adapter: Params, scaling: float) -> Tensor:
    """W + scale B A of the leaf at `path`, in rows of its magnitude if it has one, in float32."""
    # Sum in float32 and round once: a bfloat16 product would lose updates that are small against their weight.
    a, b = pairs(adapter)[path]
    return _of_length(shard.whole(leaf, torch.float32) + delta(path, a, b, scaling), path, adapter)


def _of_length(whole: Tensor, path: str, adapter: Params) -> Tensor:
    """Rows of a merged weight, scaled as the magnitudes of the adapter say."""
    if (known := magnitudes(adapter, SETTLED).get(path)) is not None:
        return whole * known.float()[:, None]
    length = magnitudes(adapter).get(path)
    return whole if length is None else whole * (length.float() / whole.norm(dim=1))[:, None]


def to_peft(adapter: Params, hf_key: Callable[[str], str]) -> dict[str, Tensor]:
    """PEFT's tensor names for an adapter tree; `hf_key` maps a leaf path to its Hugging Face name, or that of its module."""
    named = {}
    for path, (a, b) in pairs(adapter).items():
        module = hf_key(path).removesuffix(".weight")
        names = PEFT_EMBEDDING if path == "embed_tokens" else PEFT_LINEAR
        named[f"base_model.model.{module}.{names[0]}"] = a
        named[f"base_model.model.{module}.{names[1]}"] = b
    for path, length in magnitudes(adapter).items():
        named[f"base_model.model.{hf_key(path).removesuffix('.weight')}.{PEFT_MAGNITUDE}"] = length
    return named


def from_peft(tensors: dict[str, Tensor], paths: Iterable[str], hf_key: Callable[[str], str]) -> Params:
    """The adapter tree in a PEFT file; `paths` are the leaves that could be adapted.

    Raises ValueError unless every tensor of the file is used and every A has its B, naming the first that is not.
    """
    matched, leaves = set(), []
    for path in paths:
        module = hf_key(path).removesuffix(".weight")
        names = PEFT_EMBEDDING if path == "embed_tokens" else PEFT_LINEAR
        for part, name in zip(("A", "B", MAGNITUDE), (*names, PEFT_MAGNITUDE), strict=True):
            key = f"base_model.model.{module}.{name}"
            if key in tensors:
                matched.add(key)
                leaves.append((f"{path}.{part}", tensors[key]))
    adapter = tree.from_items(leaves)
    _check_complete(set(tensors) - matched, [path for path, _ in leaves])
    return adapter


def _check_complete(unused: set[str], paths: list[str]) -> None:
    if unused:
        raise ValueError(f"the adapter file has {len(unused)} tensors that this model cannot use, the first is {min(unused)}")
    if not paths:
        raise ValueError("the adapter file holds no LoRA tensors")
    for path in (path for path in paths if path[-1] in "AB"):
        if (twin := path[:-1] + ("B" if path.endswith("A") else "A")) not in paths:
            raise ValueError(f"the adapter file has {path} but not {twin}")
