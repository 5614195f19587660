"""A step of strided EBFT that is counted: its rollouts are of the longest documents, and of no particular tokens.

T tokens of the documents of a micro-batch, R rollouts of G tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch

from treetune.core import strided
from treetune.core.rollout import strided_rollouts
from treetune.core.rollout.strided_rollouts import StridedRollouts
from treetune.core.state import MicroBatch, TrainState
from treetune.core.step import Prepare
from treetune.models import memory
from treetune.models.decode_branches import CHUNK, HEAD_ROWS
from treetune.models.dense import Config

SCORES = "alignment", "diversity", "ebft_reward", "advantage", "cfm"  # of rollouts


def prepared(rollouts: StridedRollouts, micro: Any) -> tuple[Prepare, tuple[int, int, int]]:
    """What prepares a step of such micro-batches, without the sampling of its rollouts; and (T, R, G).

    Where anchors are and what is grown is decided by numbers, and known before the count.
    """
    batch = micro[0]
    blocks, counts = strided_rollouts.anchors(rollouts, batch)
    tokens = torch.zeros(blocks.start.shape[0] * rollouts.n, blocks.length, dtype=torch.int64)
    grown, layout = strided.grow(batch, blocks, tokens, rollouts.n)
    plan, size = rollouts.plan(grown), grown["seq_lens"].shape[0]

    def one(state: TrainState) -> MicroBatch:
        phi, _ = rollouts.features(state, grown, plan, layout)
        # Comparing features, which are few, looks at their numbers.
        scores = {name: phi.new_zeros(size) for name in SCORES}
        return grown | counts | scores | {"advantages_std": torch.zeros(())}, plan

    def prepare(state: TrainState, micro_batches: Sequence[Any]) -> Sequence[MicroBatch]:
        return [one(state) for _ in micro_batches]

    return prepare, (batch["tokens"].shape[0], tokens.shape[0], blocks.length)


def sampler(cfg: Config, sizes: tuple[int, int, int], *, nucleus: bool) -> int:
    """Bytes while rollouts are drawn: keys and values of documents and rollouts, scores of a few rollouts, distributions of some rows."""
    documents, rows, length = sizes
    chunk, head = min(rows, CHUNK), min(rows, HEAD_ROWS)
    scores = 3 * chunk * cfg.num_heads * (documents + length) * cfg.dtype.itemsize
    return memory.cache(cfg, 1, documents) + memory.cache(cfg, rows, length) + max(scores, memory.draws(cfg, head, nucleus))
