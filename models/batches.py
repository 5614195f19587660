"""Documents to the (Batch, Plan) that a model reads, on its device."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from treetune.core.state import Batch
from treetune.models import decoder_attention
from treetune.models.dense import Config
from treetune.ops import noise
from treetune.ops.attention import Plan

Collate = Callable[..., dict[str, Tensor]]  # (documents, budget=, pad=) -> batch, on the host
Batcher = Callable[..., Any]  # (documents, seed=None) -> micro-batch: (Batch, Plan), or a tuple of those where there are several streams
BLOCK = 128  # tokens, of which streams without a budget are multiples on CUDA


def batcher(cfg: Config, device: torch.device, collates: Sequence[Collate], *, budget: int | None = None) -> Batcher:
    """A function (documents, seed=None) -> micro-batch: one (Batch, Plan) for each of the streams that `collates` make of the documents.

    budget: tokens that a stream is padded to, on CUDA only, where fixed shapes save recompilation and fragments of memory; without one,
    a stream is padded to whole blocks there. On a CPU padding would only cost.
    """
    pad_to = None if device.type != "cuda" else budget or BLOCK

    def batches(documents: Sequence[Any], *, seed: Tensor | None = None) -> Any:
        streams = tuple(_stream(collate, documents, seed, cfg, device, pad_to) for collate in collates)
        return streams[0] if len(streams) == 1 else streams

    return batches


def _stream(
    collate: Collate, documents: Sequence[Any], seed: Tensor | None, cfg: Config, device: torch.device, pad_to: int | None
) -> tuple[dict[str, Tensor], Any]:
    batch = filled(collate, list(documents), pad_to)
    # The plan reads boundaries with .tolist(): on the host, before the batch moves, that waits for nothing.
    plan = decoder_attention.plan(batch, cfg, device=device)
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    return (batch if seed is None else batch | {"seed": seed.to(device, non_blocking=True)}), plan


def filled(collate: Collate, documents: list[Any], pad_to: int | None) -> Batch:
    """The stream of documents, padded to `pad_to` tokens, or where that is `BLOCK` to a multiple of it; None for no padding."""
    if pad_to != BLOCK:
        return collate(documents, budget=pad_to, pad=pad_to is not None)
    bare = collate(documents, budget=None, pad=False)
    tokens = bare["tokens"].shape[0]
    return bare if tokens % BLOCK == 0 else collate(documents, budget=tokens + -tokens % BLOCK, pad=True)


def seeded(collate: Batcher, seed: int, *purpose: int) -> Callable[..., Any]:
    """A function (documents, *place) -> micro-batch whose dropout and noise are drawn for this place in the run.

    So a resumed run draws what it would have drawn. purpose: what tells this randomness from other of the same seed.
    """
    return lambda documents, *place: collate(documents, seed=noise.keys(seed, *purpose, *place))


def replanned(change: Callable[[Batch], Batch], cfg: Config) -> Callable[[Batch, Plan], tuple[Batch, Plan]]:
    """A function (batch, plan) -> the changed batch, and the plan of its own documents."""

    def apply(batch: Batch, plan: Plan) -> tuple[Batch, Plan]:
        changed = change(batch)
        return changed, decoder_attention.plan(changed, cfg, device=batch["tokens"].device)

    return apply
