"""Checks with readable messages: a batch that keeps its contract, a tree whose numbers are finite."""

from typing import Any

import torch
from torch import Tensor

from treetune.core import quant, shard, tree
from treetune.core.state import AXES, Batch, Params


def batch(stream: Batch) -> None:
    """Raise ValueError unless every key has a declared axis, axes agree in length, and bounds and rows are in range."""
    sizes: dict[str, tuple[str, int]] = {}
    for key, value in stream.items():
        if key not in AXES:
            raise ValueError(f"batch key {key!r} has no axis; declare it in core.state.AXES")
        if (axis := AXES[key]) == "":
            continue
        first, size = sizes.setdefault(axis, (key, value.shape[0]))
        if value.shape[0] != size:
            raise ValueError(f"batch key {key!r} has {value.shape[0]} entries on axis {axis}, but {first!r} has {size}")
    _bounds(stream)


def _bounds(stream: Batch) -> None:
    cu, total = stream["cu_docs"], stream["tokens"].shape[0]
    if cu[0] != 0 or cu[-1] != total or (cu.diff() < 0).any():
        raise ValueError(f"cu_docs must rise from 0 to the {total} tokens of the stream, got {cu.tolist()}")
    logit_index, segment_ids = stream["at"], stream["seq"]
    if logit_index.numel() and (logit_index.min() < 0 or logit_index.max() >= total):
        raise ValueError(f"at must name rows 0 to {total - 1} of the stream, got {int(logit_index.min())} to {int(logit_index.max())}")
    if (segment_ids.diff() < 0).any() or not torch.equal(
        torch.bincount(segment_ids, minlength=len(stream["seq_lens"])), stream["seq_lens"]
    ):
        raise ValueError("seq must be sorted and agree with seq_lens")


def not_finite(params: Params) -> list[str]:
    """Paths of the leaves with a nan or an inf: a collective where leaves are sharded."""
    bad, mesh = {}, None
    for path, leaf in tree.items(params):  # a leaf at a time: layers may be made when they are asked for
        mesh = mesh or shard.mesh_of(leaf)
        bad[path] = not all(_is_finite(shard.local(part)) for part in _parts(leaf)) or _nan_codes(leaf)
    flags = list(bad.values())
    if mesh is not None:
        flags = (
            shard.all_reduce(torch.tensor(flags, dtype=torch.int32, device=mesh.device_type), "max", mesh, mesh.mesh_dim_names or ())
            .bool()
            .tolist()
        )
    return [path for path, is_bad in zip(bad, flags, strict=True) if is_bad]


def _is_finite(part: Tensor) -> bool:
    """By the smallest and the largest number, which are nan where any is: nothing of the size of the leaf is made."""
    return not part.numel() or not part.is_floating_point() or all(bool(torch.isfinite(side)) for side in part.aminmax())


def _nan_codes(leaf: Any) -> bool:
    """Whether a leaf in fp8 has codes that are no number: no e4m3 is an infinity, and one byte of each sign is a nan."""
    return quant.quantised(leaf) and leaf.kind == "fp8" and bool((shard.local(leaf.codes).view(torch.uint8) & 127 == 127).any())


def _parts(leaf: Any) -> list[Tensor]:
    """The leaf, or the tensors of a quantised one that may hold a nan or an inf."""
    return [part for part in leaf.parts() if part.dtype == torch.float32] if quant.quantised(leaf) else [leaf]


@torch.no_grad()
def finite(params: Params) -> Tensor:
    """Whether all numbers of a tree are finite: a 0-d bool on the tree's device; of a sharded tree, this rank's part.

    No leaf is copied, and nothing is read by the host.
    """
    parts = [shard.local(part) for leaf in tree.leaves(params) for part in _parts(leaf)]
    sides = [torch.aminmax(part) for part in parts if part.numel() and part.is_floating_point()]
    if not sides:
        return torch.tensor(True)
    return torch.stack([torch.isfinite(side.min) & torch.isfinite(side.max) for side in sides]).all()


def no_shared_storage(one: Params, other: Params) -> None:
    """Raise ValueError when two trees alias: an optimiser updates in place, so a reference or average must be a clone."""
    # By storage and not by address: a view into a leaf changes with it, wherever it begins.
    owners = {part.untyped_storage().data_ptr(): path for path, leaf in tree.items(one) for part in _parts(leaf)}
    for path, part in ((path, part) for path, leaf in tree.items(other) for part in _parts(leaf)):
        if (owner := owners.get(part.untyped_storage().data_ptr())) is not None and part.numel():
            raise ValueError(f"{path} shares memory with {owner}; clone it, because updates happen in place")
