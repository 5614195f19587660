"""Assignment of documents to micro-batches, steps and ranks: pure functions of (lengths, options, seed, epoch).

Nothing is drawn and nothing advances but a `PlanCursor`, so a run that resumes from one sees exactly the documents it would have seen.
A plan depends neither on the number of ranks nor on gradient accumulation; both only say how many of its micro-batches a step takes.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from treetune.core.data import order, pack


class PlanCursor(NamedTuple):
    """Position of a run: the epoch, and the number of micro-batches of its plan that all ranks together have taken."""

    epoch: int = 0
    index: int = 0


START = PlanCursor()


def appearances(weights: Sequence[float], *, seed: int = 0, epoch: int = 0) -> list[int]:
    """Indices of the documents of an epoch, in order, each repeated: weight w gives floor(w) times, and once more with
    probability w - floor(w).

    Which documents appear once more is drawn anew each epoch, by systematic sampling: documents of equal weight together get the
    expected number of appearances, to within one. The same arguments always give the same indices.
    Errors: ValueError for a weight that is negative or not finite, and when all are 0.
    """
    values = np.asarray(weights, dtype=np.float64)
    bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if len(bad) or not values.any():
        problem = f"document {bad[0]} has weight {values[bad[0]]}" if len(bad) else "all weights are 0"
        raise ValueError(f"{problem}: expected finite numbers from 0 up, not all of them 0")
    whole = np.floor(values)
    drawn = np.array(order.permutation(len(values), seed, epoch, order.REPEATS), dtype=np.int64)
    drawn = drawn[np.argsort(values[drawn], kind="stable")]
    # The small number is for sums of fractions that miss a whole number by rounding: the expected count must not lose a document.
    reached = np.concatenate([[0.0], np.cumsum((values - whole)[drawn])]) + order.uniform(seed, epoch, order.REPEATS)
    counts = whole.astype(np.int64)
    counts[drawn] += np.diff(np.floor(reached + 1e-9)).astype(np.int64)
    return np.repeat(np.arange(len(values)), counts).tolist()


def document_weights(counts: Sequence[int], weights: Sequence[float]) -> list[float] | None:
    """The weight of each document, for data sets of `counts` documents with these weights; None when every weight is 1."""
    if all(weight == 1 for weight in weights):
        return None
    return [float(weight) for count, weight in zip(counts, weights, strict=True) for _ in range(count)]


def epoch_plan(
    lengths: Sequence[int],
    *,
    weights: Sequence[float] | None = None,
    epoch: int = 0,
    budget: int | None = None,
    rows: int | None = None,
    shuffle: bool = True,
    seed: int = 0,
    window: int = pack.WINDOW,
) -> list[list[int]]:
    """The micro-batches of an epoch, each a list of document indices; every document is in exactly one.

    weights: how often each document appears in an epoch (`appearances`), instead of once.
    budget: pack whole documents into micro-batches of that many tokens; rows: that many documents per micro-batch instead.
    shuffle: another order each epoch; else the documents' own order (packing still reorders inside a window).
    Errors: ValueError unless exactly one of budget and rows is given, and when a document is longer than the budget.
    """
    if (budget is None) == (rows is None):
        raise ValueError(f"budget is {budget} and rows is {rows}: give exactly one, tokens or documents per micro-batch")
    if weights is not None:
        chosen = appearances(weights, seed=seed, epoch=epoch)
        sizes = [lengths[i] for i in chosen]
        plan = epoch_plan(sizes, epoch=epoch, budget=budget, rows=rows, shuffle=shuffle, seed=seed, window=window)
        return [[chosen[i] for i in group] for group in plan]
    # A prime factor: seeds and epochs in use do not meet in one key.
    key = seed * 1_000_003 + epoch if shuffle else None
    if rows is not None:
        return pack.group_rows(lengths, rows, seed=key)
    assert budget is not None
    groups = pack.pack(lengths, budget, seed=key, window=window)
    if key is None:
        return sorted(groups, key=min)
    # Best-fit decreasing opens its groups from the longest documents down; in that order a run would see long ones first.
    return [groups[i] for i in order.permutation(len(groups), key, order.BATCHES)]


def next_step(
    plan: Sequence[list[int]], cursor: PlanCursor, *, accum: int = 1, world: int = 1, rank: int = 0
) -> tuple[list[list[int]], PlanCursor]:
    """(this rank's micro-batches of the step at `cursor`, the cursor after the step).

    A step takes accum * world micro-batches of the plan, dealt to the ranks in turn; the last of an epoch takes what is left.
    All ranks get the same number: where the plan runs out, a rank gets an empty one ([], which `pack.collate` accepts).
    """
    step_groups = plan[cursor.index : cursor.index + accum * world]
    assert step_groups, f"cursor {cursor} lies past a plan of {len(plan)} micro-batches"
    rank_groups = list(step_groups[rank::world])
    rank_groups += [[]] * (-(-len(step_groups) // world) - len(rank_groups))
    index = cursor.index + len(step_groups)
    return rank_groups, PlanCursor(cursor.epoch, index) if index < len(plan) else PlanCursor(cursor.epoch + 1, 0)


def epoch_steps(
    lengths: Sequence[int],
    *,
    cursor: PlanCursor = START,
    epochs: int | None = None,
    accum: int = 1,
    world: int = 1,
    rank: int = 0,
    **options,
) -> Iterator[tuple[list[list[int]], PlanCursor]]:
    """(micro-batches, cursor after them) step by step, from `cursor` to the end of `epochs` epochs, or for ever.

    options: those of epoch_plan. Keep the cursor of the last step done: starting from it continues the same stream.
    """
    while epochs is None or cursor.epoch < epochs:
        epoch, plan = cursor.epoch, epoch_plan(lengths, epoch=cursor.epoch, **options)
        while cursor.epoch == epoch:
            micro_batches, cursor = next_step(plan, cursor, accum=accum, world=world, rank=rank)
            yield micro_batches, cursor


def steps_per_epoch(lengths: Sequence[int], *, accum: int = 1, world: int = 1, **options) -> int:
    """Optimiser steps of one epoch. options: those of epoch_plan."""
    return -(-len(epoch_plan(lengths, **options)) // (accum * world))


def plan_fingerprint(lengths: Sequence[int], **options) -> str:
    """A fingerprint of the documents' lengths and of the options of epoch_plan: a cursor is good only for the plan it was made on."""
    return hashlib.sha256(json.dumps([list(map(int, lengths)), sorted(options.items())]).encode()).hexdigest()[:16]
