"""Rollouts of strided energy-based fine-tuning: short texts from anchors inside documents, scored against what the documents say there.

M blocks of the documents of a stream, n rollouts of each, R = M n, of G tokens; B sequences of the grown stream; D features.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from treetune.core import shard, strided
from treetune.core.data import strides
from treetune.core.state import Batch, Plan, TrainState


class BlockFeatures(Protocol):
    """Features of rollouts and of the true blocks, each read by itself."""

    def __call__(self, state: TrainState, grown: Batch, plan: Plan, layout: strided.Layout, /) -> tuple[Tensor, Tensor]:
        """[M, n, D] and [M, D]."""
        ...


class BlockScores(Protocol):
    """Scores and advantages of rollouts by their features, their tokens [M, n, G] and the true ones [M, G]."""

    def __call__(self, phi: Tensor, y: Tensor, tokens: Tensor, true: Tensor, /) -> dict[str, Tensor]:
        """[M, n] by key of the batch."""
        ...


class StridedRollouts(NamedTuple):
    """How rollouts are made and scored.

    places: where blocks are. n: rollouts from each. trained: whether steps have any; evaluations always do. sample(state, batch on the
    host, anchors) -> tokens [R, G]. plan(batch on the host): its masks, on the device.
    """

    places: strides.Places
    n: int
    trained: bool
    sample: Callable[[TrainState, Batch, strided.Anchors], Tensor]
    plan: Callable[[Batch], Plan]
    features: BlockFeatures
    score: BlockScores
    device: torch.device


def prepare(rollouts: StridedRollouts, state: TrainState, micro_batches: list, *, mesh: Any = None) -> list:
    """The micro-batches of a step with the rollouts of its weights, their advantages and their scores."""
    grown = [grow(rollouts, state, batch) for batch, _ in micro_batches]
    gains = torch.cat([batch["advantage"][strided.sequences(batch)] for batch, _ in grown])
    spread = {"advantages_std": deviation(gains, mesh)}
    return [(batch | spread, plan) for batch, plan in grown]


def deviation(x: Tensor, mesh: Any = None) -> Tensor:
    """The standard deviation of the values [R] of all ranks."""
    count, total, squares = shard.all_sum([x.new_tensor(x.shape[0]), x.sum(), x.square().sum()], mesh)
    count = count.clamp(min=1)
    return (squares / count - (total / count).square()).clamp(min=0).sqrt()


def grow(rollouts: StridedRollouts, state: TrainState, batch: Batch) -> tuple[Batch, Plan]:
    """Documents of a stream with rollouts at their anchors: geometry and masks are made on the host, the rest on the device."""
    host, device = {key: value.cpu() for key, value in batch.items()}, rollouts.device
    blocks, counts = anchors(rollouts, host)
    tokens = rollouts.sample(state, host, blocks).cpu()
    grown, layout = strided.grow(host, blocks, tokens, rollouts.n)
    plan = rollouts.plan(grown)
    grown = {key: value.to(device, non_blocking=True) for key, value in (grown | counts).items()}
    tokens, true = tokens.view(-1, rollouts.n, tokens.shape[1]).to(device), grown["tokens"][layout.truth.to(device)]
    scores = rollouts.score(*rollouts.features(state, grown, plan, layout), tokens, true)
    at, size = strided.sequences(grown), grown["seq_lens"].shape[0]
    return grown | {key: value.new_zeros(size).index_copy(0, at, value.flatten()) for key, value in scores.items()}, plan


def anchors(rollouts: StridedRollouts, host: Batch) -> tuple[strided.Anchors, Batch]:
    """Blocks of the documents that rollouts are compared with, and the numbers about them that a step reports."""
    lens, places = strided.lengths(host), rollouts.places
    prompts = torch.zeros_like(lens).scatter(0, host["doc_of_seq"], host["prompt_length"])
    blocks = strided.anchors(lens, prompt_lengths=prompts, **strides.anchor_options(places))
    blocks = strided.trained_blocks(blocks, host["cu_docs"], strided.scored(host))
    if not rollouts.trained and "seed" in host:
        blocks = blocks._replace(document=blocks.document[:0], start=blocks.start[:0])
    after = {"context_length": places.context_length, "min_completion_prefix": places.min_completion_prefix}
    offsets = strided.first(prompts, **after)[prompts > 0].double()
    count = torch.tensor(offsets.shape[0])
    mean = offsets.sum() / count.clamp(min=1)
    return blocks, {"num_blocks": torch.tensor(blocks.start.shape[0]), "num_prompts": count, "anchor_offset": mean}
