"""Rollouts as a source: the micro-batches of a step are completions that the policy has just sampled, with their rewards."""

import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch

from treetune.core.data import loader
from treetune.core.data.trees import TreeDoc
from treetune.core.rollout.feed import Feed
from treetune.core.rollout.group import Group
from treetune.core.rollout.sampler import fatal_errors
from treetune.core.run.observers import Observers
from treetune.core.run.ranks import ALONE, Ranks, every
from treetune.core.run.source import MicroBatches
from treetune.core.state import TrainState

MicroBatch = tuple[dict[str, torch.Tensor], Any]  # (Batch, Plan)


class Sizes(NamedTuple):
    """Optimiser steps of the run; groups of a micro-batch; and of all ranks together, prompts of a step and of a pass over the data."""

    total_steps: int
    micro_batch_size: int
    step_prompts: int
    epoch_prompts: int


class Layout(NamedTuple):
    """How groups become micro-batches.

    document(group) -> token tree. collate(documents, step) -> (Batch, Plan), whose dropout the step seeds. silence(batch, plan) -> a batch
    of the same denominators without tokens, for micro-batches in which no completion has an advantage; None trains them as they are.
    """

    document: Callable[[Group], TreeDoc]
    collate: Callable[[list[TreeDoc], int], MicroBatch]
    silence: Callable[[dict[str, torch.Tensor], Any], MicroBatch] | None = None


class Rollouts:
    """Groups of a feed as micro-batches, dealt to ranks. Owns the feed's threads: call close() when done.

    metrics() are those of the sampler since the last step; rewards are the names of the reward functions, in order.
    """

    def __init__(
        self,
        feed: Feed,
        layout: Layout,
        sizes: Sizes,
        *,
        rewards: Sequence[str] = (),
        metrics: Callable[[], dict[str, float]] = dict,
        observers: Observers | None = None,
        ranks: Ranks = ALONE,
    ):
        self.feed, self.layout, self.sizes, self.rewards, self.ranks = feed, layout, sizes, tuple(rewards), ranks
        self.metrics, self.observers, self.index = metrics, Observers() if observers is None else observers, 0
        self.total_steps = sizes.total_steps

    @property
    def cursor(self) -> loader.PlanCursor:
        """Passes over the prompts, and steps taken."""
        return loader.PlanCursor(self.index * self.sizes.step_prompts // self.sizes.epoch_prompts, self.index)

    @property
    def epoch(self) -> int:
        """Passes over the prompts before the next step."""
        return self.cursor.epoch

    def passes(self, step: int) -> Fraction:
        """Passes over the prompts after a step."""
        return Fraction(step * self.sizes.step_prompts, self.sizes.epoch_prompts)

    def next(self, state: TrainState, step: int) -> tuple[MicroBatches, dict[str, Any]]:
        """Sample a generation where none is left, and lay out the groups of this step. Errors: RunFailed where nothing can be sampled."""
        start = time.perf_counter()
        with fatal_errors(), self.observers.busy("sampling completions and scoring them"):
            groups, numbers = self.feed.next(state, step - 1)
        metrics = {"rollout/seconds": time.perf_counter() - start} | numbers | self.metrics()
        for group in groups if self.ranks.rank == 0 else ():
            self.observers.samples(answers(group, self.rewards, step))
        self.index += 1
        return self._micro_batches(groups, step), metrics

    def _micro_batches(self, groups: list[Group], step: int) -> MicroBatches:
        """Groups without advantages stand together, so that whole micro-batches of them cost nothing."""
        silence, size = self.layout.silence, self.sizes.micro_batch_size
        ordered = groups if silence is None else sorted(groups, key=lambda group: not _has_signal(group))
        batches = []
        parts = [ordered[i : i + size] for i in range(0, len(ordered), size)]
        for part in parts[self.ranks.row_rank :: self.ranks.row_ranks]:
            batch, plan = self.layout.collate([self.layout.document(group) for group in part], step)
            signal = silence is None or any(_has_signal(group) for group in part)
            batches.append((batch, plan) if signal or silence is None else silence(batch, plan))
        return batches

    def state(self) -> dict[str, Any]:
        """The cursor, and what the feed needs to go on, the same on all ranks."""
        return {"cursor": list(self.cursor), "rollout": self.feed.state()}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from what `state` gave. Errors: ValueError for the state of other prompts or options."""
        if not (rollouts := saved.get("rollout")):
            raise ValueError("the checkpoint holds no rollouts; it is of another kind of run")
        self.feed.load(rollouts)
        self.index = saved["cursor"][-1]

    def close(self) -> None:
        """End the threads of the feed."""
        self.feed.close()


def _has_signal(group: Group) -> bool:
    assert group.advantage is not None
    return bool(group.advantage.any())


def answers(group: Group, rewards: Sequence[str], step: int) -> list[dict[str, Any]]:
    """The completions of a group as records of samples.jsonl, the highest advantage first."""
    assert group.advantage is not None
    order = np.argsort(-np.nan_to_num(group.advantage)).tolist()
    return [_answer(group, i, rewards, step) for i in order]


def _answer(group: Group, i: int, rewards: Sequence[str], step: int) -> dict[str, Any]:
    assert group.rewards is not None and group.advantage is not None
    completion = group.completions[i]
    values = {name: None if value != value else value for name, value in zip(rewards, group.rewards[i].tolist(), strict=True)}
    return {
        "step": step,
        "prompt": group.prompt.text,
        "answer": completion.text,
        "rewards": values,
        "advantage": group.advantage[i],
        "tokens": len(completion.tokens),
        "stopped": completion.stopped,
        "version": group.version,
    }


def gather_groups(ranks: Ranks, groups: Sequence[Group]) -> list[Group]:
    """The groups of all ranks, without their prompts."""
    if ranks.row_ranks == 1:
        return list(groups)
    return [group for part in every(ranks, [group._replace(prompt=None) for group in groups]) for group in part]
