"""Adapters on modules that hold several leaves (`qkv_proj` of phi3), in the files of PEFT.

PEFT has one A for all rows of such a module, we have a pair for each of its n leaves. The pairs are an adapter of n times the rank, whose
A are stacked and whose B is block diagonal. Shapes: A [r, in], B [out, r].
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from treetune.core import lora, tree
from treetune.core.param import Params
from treetune.models import hf_keys

PREFIX, A, B, PLAIN, BASE = "base_model.model.", ".lora_A.weight", ".lora_B.weight", ".weight", ".base_layer.weight"
LENGTHS = f".{lora.PEFT_MAGNITUDE}"


def check(family: str, adapted: Sequence[str]) -> None:
    """Raise ValueError unless the leaves of each module are adapted together: PEFT has no place for an adapter on a part of its rows."""
    for key, paths in hf_keys.groups(family, adapted).items():
        if missing := [path for path in hf_keys.leaves_of(family, key) if path not in paths]:
            name = key.removesuffix(PLAIN).rpartition(".")[2]
            raise ValueError(f"{paths[0]} has an adapter and {missing[0]} has none, and both are rows of {name}: target {name}")


def join(family: str, adapter: Params) -> Params:
    """The tree with one pair, and one magnitude, for all leaves of a module, at the path of the first of them."""
    pairs, lengths, items = lora.pairs(adapter), lora.magnitudes(adapter), []
    for paths in hf_keys.groups(family, pairs).values():
        a, b = pairs[paths[0]]
        if len(paths) > 1:
            a, b = torch.cat([pairs[path][0] for path in paths]), torch.block_diag(*(pairs[path][1] for path in paths))
        items += [(f"{paths[0]}.A", a), (f"{paths[0]}.B", b)]
        if paths[0] in lengths:
            items += [(f"{paths[0]}.{lora.MAGNITUDE}", torch.cat([lengths[path] for path in paths]))]
    return tree.from_items(items)


def patterns(modules: Mapping[str, tuple[int, float]], rank: int, alpha: float) -> tuple[dict[str, int], dict[str, float]]:
    """`rank_pattern` and `alpha_pattern` of modules that have this rank and alpha each, where those of the config are others.

    The last name of a module stands for all of that name that agree, a full name for one.
    """
    named: dict[str, set[tuple[int, float]]] = {}
    for module, sizes in modules.items():
        named.setdefault(module.rpartition(".")[2], set()).add(sizes)
    rules = {(last if len(named[last := module.rpartition(".")[2]]) == 1 else module): sizes for module, sizes in modules.items()}
    return {key: r for key, (r, _) in rules.items() if r != rank}, {key: a for key, (_, a) in rules.items() if a != alpha}


def file_rank(family: str, adapter: Params) -> int:
    """The largest rank in the file of an adapter."""
    return max(a.shape[-2] for a, _ in lora.pairs(join(family, adapter)).values())


def own_key(family: str, path: str) -> str:
    """The key of a leaf with its own name in it, which is that of the file where a leaf has a tensor for itself."""
    key = hf_keys.hf_key(family, path)
    if len(hf_keys.leaves_of(family, key)) == 1:
        return key
    module, _, kind = key.rpartition(".")
    return f"{module.rpartition('.')[0]}.{path.rpartition('.')[2]}.{kind}"


def split(
    family: str, tensors: dict[str, Tensor], leaves: Mapping[str, Any], *, rank: int, rank_of: Callable[[str], int]
) -> dict[str, Tensor]:
    """The tensors of a file with those of a module of several leaves under the names of these (`own_key`).

    A B that is block diagonal at n times the rank of a leaf gives each leaf its rank back; any other gives all of them the same A.
    rank_of: the rank that the config gives a module. Raises ValueError for another number of rows.
    """
    rest = dict(tensors)
    for key, paths in hf_keys.groups(family, leaves).items():
        if len(paths) == 1:
            continue
        module, rows = PREFIX + key.removesuffix(PLAIN), [leaves[path].shape[0] for path in paths]
        owns = [PREFIX + own_key(family, path).removesuffix(PLAIN) for path in paths]
        blocks = {kind: _rows(rest.pop(module + kind), rows, module + kind) for kind in (B, PLAIN, BASE, LENGTHS) if module + kind in rest}
        if B in blocks and module + A in rest:
            every = rank_of(module.removeprefix(PREFIX))
            a = _rows(rest.pop(module + A), [every], module + A)[0]
            own = every // len(paths) if every != rank and every % len(paths) == 0 else rank
            blocks[A], blocks[B] = _own_pairs(a, blocks[B], own)
        rest |= {own + kind: block for kind, parts in blocks.items() for own, block in zip(owns, parts, strict=True)}
    return rest


def _rows(tensor: Tensor, rows: list[int], name: str) -> list[Tensor]:
    if tensor.shape[:1] != (sum(rows),):
        raise ValueError(f"the adapter file has {name} of shape {list(tensor.shape)}; the model asks for {sum(rows)} rows")
    return list(tensor.split(rows))


def _own_pairs(a: Tensor, b: list[Tensor], rank: int) -> tuple[list[Tensor], list[Tensor]]:
    n = len(b)
    if a.shape[0] == n * rank and all(block.shape[1:] == a.shape[:1] for block in b):
        diagonal = [block[:, i * rank : (i + 1) * rank] for i, block in enumerate(b)]
        if all(block.count_nonzero() == own.count_nonzero() for block, own in zip(b, diagonal, strict=True)):
            return list(a.split(rank)), diagonal
    return [a] * n, b
