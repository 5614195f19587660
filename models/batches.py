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


def batcher(cfg: Config, device: torch.device, collates: Sequence[Collate], *, budget: int | None = None) -> Batcher:
    """A function (documents, seed=None) -> micro-batch: one (Batch, Plan) for each of the streams that `collates` make of the documents.

    budget: tokens that a stream is padded to, on CUDA only, where fixed shapes save recompilation; on a CPU padding would only cost.
    """
    pad_to = budget if device.type == "cuda" else None

    def batches(documents: Sequence[Any], *, seed: Tensor | None = None) -> Any:
        streams = tuple(_stream(collate, documents, seed, cfg, device, pad_to) for collate in collates)
        return streams[0] if len(streams) == 1 else streams

    return batches


def _stream(
    collate: Collate, documents: Sequence[Any], seed: Tensor | None, cfg: Config, device: torch.device, pad_to: int | None
) -> tuple[dict[str, Tensor], Any]:
    batch = collate(list(documents), budget=pad_to, pad=pad_to is not None)
    # The plan reads boundaries with .tolist(): on the host, before the batch moves, that waits for nothing.
    plan = decoder_attention.plan(batch, cfg, device=device)
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    return (batch if seed is None else batch | {"seed": seed.to(device)}), plan


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
