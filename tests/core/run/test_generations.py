"""The numbers of a run on sampled completions: steps, prompts of each, what the feed is told; and rewards of held-out prompts."""

import math

import numpy as np
import pytest
import torch

from treetune.core.data.prompts import Prompt
from treetune.core.rollout import server, stats, trial
from treetune.core.rollout.group import Completion, Sampled
from treetune.core.rollout.rewards import Rewards
from treetune.core.run import evaluation, generations
from treetune.core.run.ranks import Ranks
from treetune.core.run.rollouts import Sizes

PLAIN = generations.Settings(num_generations=4, max_completion_length=16, micro_batch_size=2, gradient_accumulation_steps=3)


def prompt(i: int) -> Prompt:
    return Prompt(np.array([i + 1], np.int32), f"  {i}?", None, {}, i)


def completion(*tokens: int) -> Completion:
    size = len(tokens)
    return Completion(np.array(tokens, np.int32), np.zeros(size, np.float32), np.ones(size, bool), size < 3, " ".join(map(str, tokens)))


def sample(policy, prompts, numbers) -> Sampled:
    """The second completion is one token longer, and of the length limit of 3 where the number is odd."""
    return Sampled([[completion(number), completion(*([number] * (2 + number % 2)))] for number in numbers], 7)


def score(groups) -> np.ndarray:
    """How long a completion is, and nothing of those that were cut off."""
    return np.array([[[len(one.tokens), 1.0 if one.stopped else math.nan] for one in group.completions] for group in groups])


NAMES, WEIGHTS = ("size", "whole"), [1.0, 0.5]
REWARDS = Rewards(NAMES, WEIGHTS, [], score, lambda groups: stats.metrics(groups, NAMES, WEIGHTS))


def test_steps_are_those_of_whole_generations_or_as_many_as_are_asked_for():
    assert generations.sizes(PLAIN, 60, 1) == Sizes(10, 2, 6, 60)
    assert generations.sizes(PLAIN, 60, 2) == Sizes(5, 2, 12, 60)
    more = PLAIN._replace(num_epochs=2, steps_per_generation=4, num_iterations=3)
    assert generations.sizes(more, 60, 1) == Sizes(5 * 12, 2, 6, 180) and more.steps == 12
    assert generations.sizes(PLAIN, 1, 1).total_steps == 1 and generations.sizes(PLAIN._replace(max_steps=3), 60, 1).total_steps == 3


def test_the_feed_is_told_what_the_options_say():
    told = generations.feed_settings(PLAIN._replace(steps_per_generation=5, seed=9, shuffle=False), 100, Ranks(1, 2, None))
    assert (told.prompts, told.steps, told.seed, told.epochs_shuffle, told.rank, told.world) == (60, 5, 9, False, 1, 2)
    assert told.reroll_from is None and told.prefetch_depth == told.chunk == told.replay_size == 0
    ahead = PLAIN._replace(async_prefetch=True, prefetch_depth=2, streaming_partial_batch=True, streaming_min_groups=3)
    told = generations.feed_settings(ahead._replace(reroll_start_fraction=0.5, replay_buffer_size=8), 100, Ranks(0, 1, None))
    assert (told.prefetch_depth, told.chunk, told.reroll_from, told.replay_size) == (2, 3, 50, 8)
    assert generations.feed_settings(ahead._replace(reroll_start_fraction=0.0), 100, Ranks(0, 1, None)).reroll_from == 1


def test_evaluation_has_the_rewards_of_all_prompts_and_more():
    evaluate = evaluation.of_prompts([prompt(i) for i in range(4)], sample, REWARDS, lambda state: {"more": torch.tensor(2.0)})
    metrics = {name: float(value) for name, value in evaluate(None).items()}
    assert metrics["rewards/size/mean"] == pytest.approx((4 * 1 + 2 * 2 + 2 * 3) / 8) and metrics["rewards/whole/mean"] == 1
    assert metrics["more"] == 2 and not any(name.startswith("frac") for name in metrics)
    assert evaluation.of_prompts([], sample, REWARDS) is None


def test_a_trial_tells_the_best_completions_and_what_to_change():
    done = trial.run(sample, None, [prompt(0), prompt(1)], score)
    assert trial.question(done.groups[1]) == "1?" and done.speed().startswith("7 tokens in ")
    assert trial.best(done.groups[1], NAMES, WEIGHTS, 2) == ["[size 3, cut off] 1 1 1", "[size 1, whole 1] 1"]
    record = trial.records(done.groups[1], NAMES)[1]
    assert record == {"prompt": "  1?", "answer": "1 1 1", "rewards": {"size": 3, "whole": None}, "tokens": 3, "stopped": False, "row": 1}
    assert trial.advice(REWARDS.measure(done.groups)) == []
    worse = {"completions/clipped_ratio": 0.9, "frac_reward_zero_std": 1}
    assert [line.split(":")[0][:4] for line in trial.advice(worse)] == ["most", "ever"]


def test_a_server_without_cuda_has_no_graphs_and_no_share_of_device_memory():
    options = server.ServerOptions("m", 80, gpu_memory_utilization=0.5)
    assert server.on_device(options, cuda=True) == options
    plain, whole = options._replace(gpu_memory_utilization=None, enforce_eager=True), "--no-enable-chunked-prefill"
    assert server.on_device(options, cuda=False) == plain._replace(extra=(whole,))
    asked = ("--enable-chunked-prefill",)
    assert server.on_device(options._replace(extra=asked), cuda=False) == plain._replace(extra=asked)
    with pytest.raises(ValueError, match="max_model_len must be at least 1, got 0"):
        server.check(options._replace(max_model_len=0))
    assert server.url("::1", 81) == "http://[::1]:81" and server.url("h", 81) == "http://h:81"
