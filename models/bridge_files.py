"""Weights of a bridged model from and to files, in the layouts that transformers reads and writes: it stacks experts, and unstacks them."""

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treetune.core.param import Param
from treetune.models import hf_weights, plain_model, quantised
from treetune.models.bridge_skeleton import HEAD, HEAD_BIAS, Skeleton
from treetune.models.quantised import Keep


def read(
    root: Path,
    skeleton: Skeleton,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    beside: Sequence[str] = (),
    keep: Keep = quantised.AS_READ,
) -> dict[str, Any]:
    """{path: leaf} of a folder of safetensors; where it has the keys `beside`, of another head, without the language head.

    Raises ValueError for tensors that are missing, unexpected or of another shape.
    """
    # What a quantised leaf is made from; transformers reads all of them in one dtype.
    model, seen = _loaded(root, skeleton, torch.float32 if keep.chosen else dtype)
    heads = _heads(skeleton) if beside else set()
    for name, problem in (
        ("missing_keys", "lacks"),
        ("unexpected_keys", "has besides those of its model"),
        ("mismatched_keys", "has in another shape"),
    ):
        keys = {key if isinstance(key, str) else key[0] for key in seen.get(name, ())} - set(beside)
        keys -= {*skeleton.constants, *heads} if name == "missing_keys" else set()
        if keys:
            raise ValueError(f"{root}: the file {problem} {len(keys)} tensors, the first is {min(keys)}; config.json is of another model")
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    if odd := [key for key, value in skeleton.constants.items() if not torch.allclose(tensors[key].to(value), value)]:
        raise ValueError(f"{root}: {odd[0]} is not the table that config.json implies")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    left_out = heads | ({skeleton.keys[HEAD]} if tied else set())
    del model
    kept = ((path, tensors.pop(key).detach().to(device)) for path, key in skeleton.keys.items() if key not in left_out)
    return {path: keep(path, leaf if path in keep.chosen else leaf.to(skeleton.wide.get(path, dtype))) for path, leaf in kept}


def _heads(skeleton: Skeleton) -> set[str]:
    """The keys of the language head: its bias may be called by several."""
    names = skeleton.model.named_parameters(remove_duplicate=False)
    biases = {key for key, leaf in names if leaf is skeleton.head.bias}
    return biases | {skeleton.keys[path] for path in (HEAD, HEAD_BIAS) if path in skeleton.keys}


def one_by_one(root: Path, skeleton: Skeleton) -> bool:
    """Whether the files of a folder have the leaves under the keys of the model, so that each can be read by itself."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    if skeleton.constants or get_checkpoint_conversion_mapping(skeleton.model.config.model_type) is not None:
        return False
    keys, own = hf_weights.checked_keys(root), set(skeleton.keys.values())
    return own - {skeleton.keys[HEAD]} <= keys <= own


def read_each(
    root: Path, skeleton: Skeleton, leaves: dict[str, Param], device: torch.device | str, keep: Keep, *, unread: Iterable[str] = ()
) -> dict[str, Any]:
    """{path: leaf} of such a folder, each kept as soon as it is read. unread: keys of others that the folder may have."""
    paths = {skeleton.keys[path]: path for path in leaves}
    wanted = {skeleton.keys[path]: leaf for path, leaf in keep.wide(leaves).items()}

    def store(key: str, tensor: Tensor) -> Any:
        return keep(paths[key], tensor)

    kept = hf_weights.read_tensors(root, wanted, unread={skeleton.keys[HEAD], *unread}, device=device, keep=store)
    return {paths[key]: leaf for key, leaf in kept.items()}


def _loaded(root: Path, skeleton: Skeleton, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """transformers' model of a folder, and the keys that did not fit."""
    with plain_model.without_bars(), plain_model.without_warnings():
        try:
            loaded: Any = type(skeleton.model).from_pretrained(
                root, config=copy.deepcopy(skeleton.model.config), dtype=dtype, use_safetensors=True, local_files_only=True,
                trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
        except RuntimeError as error:  # of a conversion of older layouts, or of experts of other shapes
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{root}: transformers does not read the files ({reason}); config.json is of another model") from error
    return loaded


def saved(skeleton: Skeleton, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leaves by key in the layout of saved files."""
    from transformers.core_model_loading import revert_weight_conversion

    return {key: leaf.contiguous() for key, leaf in revert_weight_conversion(skeleton.model, leaves).items()}
