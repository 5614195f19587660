import importlib.util
import statistics
import warnings
from pathlib import Path

import numpy as np
import pytest

from treetune.core.rollout import group, stats

spec = importlib.util.spec_from_file_location("feed_scene", Path(__file__).with_name("feed_scene.py"))
scene = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scene)
NAN = float("nan")


def one(rewards, lengths=None, stopped=None) -> group.Group:
    rewards = np.array(rewards, np.float64)
    rewards = rewards[:, None] if rewards.ndim == 1 else rewards
    lengths, stopped = lengths or [1] * len(rewards), stopped or [True] * len(rewards)
    completions = [
        group.Completion(np.zeros(n, np.int32), np.zeros(n, np.float32), np.ones(n, bool), stop, "")
        for n, stop in zip(lengths, stopped, strict=True)
    ]
    return group.Group(scene.prompts(1)[0], 0, tuple(completions), 0, rewards)


def test_rewards_of_two_functions():
    groups = [one([[1, 0], [0, 2]]), one([[1, NAN], [1, 4]])]
    found = stats.metrics(groups, ["right", "long"], [1, 0.5])
    total = [1, 1, 1, 3]
    assert found["reward"] == pytest.approx(1.5) and found["reward_std"] == pytest.approx(statistics.stdev(total))
    assert found["rewards/right/mean"] == 0.75 and found["rewards/right/std"] == pytest.approx(statistics.stdev([1, 0, 1, 1]))
    assert found["rewards/long/mean"] == 2 and found["rewards/long/std"] == pytest.approx(2)
    assert found["rewards/long/unknown"] == 0.25 and "rewards/right/unknown" not in found
    assert found["frac_reward_zero_std"] == 0.5  # [1, 1] is flat, [1, 3] is not


def test_rows_that_nobody_can_judge_are_left_out():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = stats.metrics([one([1, NAN, 0, 1]), one([NAN, NAN, NAN, 1]), one([NAN] * 4)], ["f"], [2])
        nothing = stats.metrics([one([NAN, NAN])], ["f"], [1])
    assert found["reward"] == pytest.approx(1.5) and found["reward_std"] == pytest.approx(1)
    assert found["rewards/f/mean"] == pytest.approx(0.75) and found["rewards/f/unknown"] == pytest.approx(8 / 12)
    assert found["frac_reward_zero_std"] == pytest.approx(2 / 3)  # no member to compare with is no signal
    assert nothing["rewards/f/unknown"] == 1 and nothing["frac_reward_zero_std"] == 1
    assert all(np.isnan(nothing[name]) for name in ("reward", "reward_std", "rewards/f/mean", "rewards/f/std"))


def test_flatness_is_tested_on_groups_and_survives_rounding():
    half = stats.metrics([one([1, 0, 0, 1]), one([1, 1, 1, 1])], ["f"], [1])
    assert half["frac_reward_zero_std"] == 0.5
    noisy = np.full(7, np.float32(0.7)).astype(np.float64)
    found = stats.metrics([one(noisy)], ["f"], [1])
    assert found["frac_reward_zero_std"] == 1 and found["reward_std"] == 0 and found["rewards/f/std"] == 0
    weighed = stats.metrics([one([[1, 0], [1, 5]])], ["a", "b"], [1, 0])  # a function of weight 0 is no signal
    assert weighed["frac_reward_zero_std"] == 1


def test_lengths():
    found = stats.metrics([one([0, 1], [3, 5], [True, False]), one([0, 1], [2, 8], [True, True])], ["f"], [1])
    lengths = {name.removeprefix("completions/"): value for name, value in found.items() if name.startswith("completions/")}
    assert lengths == {
        "mean_length": 4.5,
        "min_length": 2,
        "max_length": 8,
        "mean_terminated_length": pytest.approx(13 / 3),
        "min_terminated_length": 2,
        "max_terminated_length": 8,
        "clipped_ratio": 0.25,
    }
    cut = stats.metrics([one([0, 1], [4, 4], [False, False])], ["f"], [1])
    assert cut["completions/clipped_ratio"] == 1 and np.isnan(cut["completions/mean_terminated_length"])


def test_groups_of_different_sizes():
    found = stats.metrics([one([1, 0, 1]), one([1])], ["f"], [1])
    assert found["reward"] == 0.75 and found["frac_reward_zero_std"] == 0.5


def test_what_cannot_be_measured_is_refused():
    for groups, names, weights in (([], ["f"], [1]), ([one([1, 0])._replace(rewards=None)], ["f"], [1])):
        with pytest.raises(ValueError, match="at least one, all of them scored"):
            stats.metrics(groups, names, weights)
    for names, weights in ((["a", "b"], [1, 1]), (["a"], [1, 1])):
        with pytest.raises(ValueError, match=r"rewards of \[1\] functions"):
            stats.metrics([one([1, 0])], names, weights)
