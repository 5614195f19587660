"""C = sum of x^T x / max(x)^2 of the inputs x [T, I] of linear layers over micro-batches, divided by the number of these.

That is how PEFT measures them for CorDA. A layer of I inputs takes I^2 numbers, so that the layers of large models are measured in turns.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from treetune.core import tree
from treetune.core.lora import Lora
from treetune.models import Model, families
from treetune.ops import lora_linear

AT_ONCE = 2**32  # bytes of the covariances that one pass over the rows measures


def measure(model: Model, batches: Iterable[tuple[dict, Any]], paths: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """(path, C [I, I]) of each linear layer, in float32 or float64 as the model computes; `batches` of (batch, plan) are read each turn.

    Errors: ValueError for inputs that are not finite, and for those that are all 0.
    """
    dtype, leaves = torch.promote_types(model.cfg.dtype, torch.float32), dict(tree.items(model.params))
    for turn in _turns({path: leaves[path].shape[-1] for path in paths}, AT_ONCE // dtype.itemsize):
        seen = {path: lora_linear.unseen(size, dtype, leaves[path].device) for path, size in turn.items()}
        probe = tree.from_items((f"{path}.{name}", leaf) for path, one in seen.items() for name, leaf in one.items())
        with torch.no_grad():
            for batch, plan in batches:
                families.MODELS[model.family].forward(model.params, batch, plan, model.cfg, lora=Lora(probe, 1.0))
        for path in turn:
            yield path, _mean(path, seen.pop(path))


def _turns(sizes: dict[str, int], most: int) -> Iterator[dict[str, int]]:
    turn: dict[str, int] = {}
    for path, size in sizes.items():
        if turn and sum(other**2 for other in turn.values()) + size**2 > most:
            yield turn
            turn = {}
        turn[path] = size
    yield turn


def _mean(path: str, seen: dict[str, Tensor]) -> Tensor:
    mean = seen[lora_linear.SQUARES] / seen[lora_linear.CALLS]
    if not mean.isfinite().all() or not mean.diagonal().any():
        raise ValueError(f"the inputs of {path} are not finite, or all 0, on the rows of lora_init_rows: choose another lora_init")
    return mean
