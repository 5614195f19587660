"""Generations as the source of a run: completions of prompts are sampled, scored, and dealt into the micro-batches of steps.

P prompts, G completions of each, K rewards.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from treetune.core.data import fingerprint, loader
from treetune.core.data.dataset import Dataset
from treetune.core.rollout.feed import Feed, FeedCalls, FeedSettings
from treetune.core.rollout.group import Group
from treetune.core.rollout.rewards import Rewards
from treetune.core.rollout.sampler import Sampler
from treetune.core.run import evaluation
from treetune.core.run.observers import Observers
from treetune.core.run.ranks import Ranks, every, share
from treetune.core.run.rollouts import Layout, Rollouts, Sizes
from treetune.core.run.source import Supply
from treetune.core.state import TrainState


class Settings(NamedTuple):
    """How prompts become the steps of a run; the fields have the names of their options."""

    num_generations: int
    max_completion_length: int
    micro_batch_size: int
    gradient_accumulation_steps: int = 1
    num_epochs: int = 1
    max_steps: int | None = None
    seed: int = 0
    data_seed: int | None = None
    shuffle: bool = True
    steps_per_generation: int = 1
    num_iterations: int = 1
    async_prefetch: bool = False
    prefetch_depth: int = 1
    streaming_partial_batch: bool = False
    streaming_min_groups: int = 1
    dynamic_sampling: bool = False
    replay_buffer_size: int = 0
    reroll_start_fraction: float = 1.0
    reroll_max_groups: int = 1

    @property
    def order_seed(self) -> int:
        """The seed of the order of prompts."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def prompts(self) -> int:
        """Prompts of a step that one rank trains on."""
        return self.micro_batch_size * self.gradient_accumulation_steps

    @property
    def steps(self) -> int:
        """Optimiser steps that a generation serves."""
        return self.steps_per_generation * self.num_iterations

    @property
    def ahead(self) -> int:
        """Generations that are sampled ahead."""
        return self.prefetch_depth if self.async_prefetch else 0


class Calls(NamedTuple):
    """What a run does with groups of completions.

    advantage: rewards [P, G, K] -> [P, G]. old_logprobs: as of `feed.FeedCalls`. evaluated(state) -> further metrics of an
    evaluation; None: no more than those of the rewards.
    """

    layout: Layout
    advantage: Callable[[np.ndarray], np.ndarray]
    old_logprobs: Callable[[TrainState, list[Group]], list[Group]] | None = None
    evaluated: Callable[[TrainState], dict[str, torch.Tensor]] | None = None


class Players(NamedTuple):
    """Who writes the completions of a run, and what scores them."""

    sampler: Sampler
    rewards: Rewards


def sizes(settings: Settings, prompts: int, world: int) -> Sizes:
    """Steps of the run (max_steps, or num_epochs times through the prompts) and prompts of each."""
    step, total = settings.prompts * world, settings.max_steps
    if total is None:
        count = max(1, round(settings.num_epochs * prompts / (step * settings.steps_per_generation)))
        total = count * settings.steps
    return Sizes(total, settings.micro_batch_size, step, settings.num_iterations * prompts)


def feed_settings(settings: Settings, total_steps: int, ranks: Ranks) -> FeedSettings:
    """How the feed of a rank draws and deals, in a run of so many steps."""
    fraction = settings.reroll_start_fraction
    return FeedSettings(
        prompts=settings.prompts * settings.steps_per_generation * ranks.row_ranks,
        steps=settings.steps_per_generation,
        iterations=settings.num_iterations,
        seed=settings.order_seed,
        epochs_shuffle=settings.shuffle,
        rank=ranks.row_rank,
        world=ranks.row_ranks,
        replay_size=settings.replay_buffer_size,
        reroll_from=None if fraction >= 1 else max(1, int(total_steps * fraction)),
        reroll_groups=settings.reroll_max_groups,
        dynamic=settings.dynamic_sampling,
        prefetch_depth=settings.ahead,
        chunk=settings.streaming_min_groups if settings.streaming_partial_batch else 0,
    )


def supply(data: Dataset, settings: Settings, players: Players, calls: Calls, *, ranks: Ranks, observers: Observers) -> Supply:
    """Micro-batches and evaluation of what is sampled from prompts."""
    (sampler, rewards), plan = players, sizes(settings, len(data.train), ranks.row_ranks)
    feed_calls = FeedCalls(
        sampler.train,
        rewards.score,
        lambda rewards: share(ranks, partial(calls.advantage, rewards)),  # decides what comes next, and may be the user's
        calls.old_logprobs,
        rewards.measure,
        sampler.engine.snapshot,
        partial(every, ranks),
        observers.warn,
    )
    feed = Feed(data.train, feed_calls, feed_settings(settings, plan.total_steps, ranks))
    metrics = sampler.engine.metrics
    source = Rollouts(feed, calls.layout, plan, rewards=rewards.names, metrics=metrics, observers=observers, ranks=ranks)
    evaluate = evaluation.of_prompts(data.val, sampler.evaluation, rewards, calls.evaluated, ranks=ranks)
    return Supply(
        source,
        evaluate,
        _fingerprints(data, plan.step_prompts, settings.shuffle),
        loader.plan_fingerprint([len(prompt.tokens) for prompt in data.train], step=plan.step_prompts, seed=settings.order_seed),
        sampler.engine.after_step,
        sampler.engine.start,
        _describe(data, settings, ranks.row_ranks),
        rewards.files,
        rewards.models,
    )


def _fingerprints(data: Dataset, step_prompts: int, shuffle: bool) -> dict[str, str]:
    order = fingerprint.values("prompts", step_prompts, shuffle)
    return {"train": fingerprint.documents(data.train), "held out": fingerprint.documents(data.val), "order": order}


def _describe(data: Dataset, settings: Settings, world: int) -> dict[str, str]:
    """What is sampled for a step."""
    completions = f"{settings.num_generations} completions of up to {settings.max_completion_length} tokens"
    reuse = f"; a generation serves {settings.steps} steps" if settings.steps > 1 else ""
    ranks = f"{world} rank{'s' * (world > 1)}"
    return {"data": "; ".join(data.lines), "step": f"{settings.prompts} prompts x {completions} on {ranks}{reuse}"}
