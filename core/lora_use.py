"""What of a trained adapter a model computes with: pairs under one scale, over what the adapter started from.

An adapter that starts at (A0, B0) computes W + s (B A - B0 A0), which is W at the start. As one pair of twice the rank that is
[A; A - A0] and [B - B0, B0]: exactly 0 at the start, and small changes keep their digits in bfloat16, which [A; A0] and [B, -B0] lose.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from treetune.core import lora, shard
from treetune.core.lora import Lora
from treetune.core.param import Params


def in_use(low: Lora, trained: Params, start: Params | None = None, seed: Tensor | None = None) -> Lora:
    """The adapter with its trained tree, under its common scale; without a seed there is no dropout.

    start: where pairs began, {path: {"A", "B"}}, for those whose start is no part of the model's change.
    """
    tree_ = _scaled(whole(trained, start), dict(low.ratios)) if low.ratios else whole(trained, start)
    return low._replace(tree=tree_, seed=seed, dropout=low.dropout if seed is not None else 0.0, ratios=())


def whole(trained: Params, start: Params | None) -> Params:
    """The tree of plain pairs: those with a start have twice the rank."""
    if not start:
        return trained
    begun, pairs = lora.pairs(start), lora.pairs(trained)
    return lora.of({path: _since(pair, begun[path]) if path in begun else pair for path, pair in pairs.items()}, trained)


def _since(pair: tuple[Tensor, Tensor], start: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    a, b, a0, b0 = map(shard.gather, (*pair, *start))
    return torch.cat([a, a - a0]), torch.cat([b - b0, b0], dim=1)


def _scaled(adapter: Params, ratios: Mapping[str, float]) -> Params:
    pairs = {path: (a, ratios.get(path, 1.0) * b if path in ratios else b) for path, (a, b) in lora.pairs(adapter).items()}
    return lora.of(pairs, adapter)
