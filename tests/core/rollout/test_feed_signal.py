import importlib.util
from pathlib import Path

import numpy as np
import pytest

from treetune.core.rollout import group

spec = importlib.util.spec_from_file_location("feed_scene", Path(__file__).with_name("feed_scene.py"))
scene = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scene)


def test_groups_without_signal_are_dropped_and_refilled_and_none_with_signal_is_lost():
    sampler = scene.Recorder()
    made, trained = scene.make(40, sampler=sampler, prompts=4, dynamic=True, max_refills=9, replay_size=0), []
    for step in range(12):
        groups, metrics = made.next(0, step)
        assert all(one.advantage.any() for one in groups) and len({one.prompt.row for one in groups}) == 4
        assert metrics["rollout/zero_advantage"] == 0
        trained += [one.number for one in groups]
    waiting = [one["number"] for _, one in made.state()["overflow"]]
    whole = {number: scene.prompts(40)[row] for row, number in zip(sum(sampler.rows, []), sampler.numbers, strict=True)}
    live = [
        number
        for number, prompt in whole.items()
        if scene.advantage(scene.score([group.Group(prompt, number, tuple(scene.sample(0, [prompt], [number]).completions[0]), 0)])).any()
    ]
    assert sorted(trained + waiting) == sorted(live) and len(sampler.numbers) > len(live)


def test_what_a_generation_has_no_room_for_is_trained_on_next():
    """All prompts have signal but the first, and a generation ahead has more than one lacks."""
    flat = iter([True, False, False, False, False, False])

    def scorer(groups):
        return np.stack([np.zeros((4, 1)) if next(flat) else np.array([[1.0], [0], [0], [1]]) for _ in groups])

    made = scene.make(20, scorer=scorer, prompts=2, dynamic=True, prefetch_depth=1)
    first, metrics = made.next(0, 0)
    assert {"rollout/sampled": 4.0, "rollout/dropped": 1.0, "rollout/refills": 1.0, "rollout/overflow": 1.0}.items() <= metrics.items()
    second, metrics = made.next(3, 3)
    assert [one["number"] for _, one in made.state()["overflow"]] == [5] and metrics["rollout/refills"] == 0
    assert sorted(one.number for one in first) == [1, 2] and sorted(one.number for one in second) == [3, 4]
    made.close()


def test_refills_end_and_the_generation_is_whole_all_the_same():
    said, sampler = [], scene.Recorder()
    options = {"scorer": lambda groups: np.ones((len(groups), 4, 1)), "dynamic": True, "max_refills": 2, "say": said.append}
    made = scene.make(50, sampler=sampler, prompts=3, **options)
    for step in range(2):
        groups, metrics = made.next(0, step)
        assert len(groups) == 3 and metrics["rollout/zero_advantage"] == 3 and metrics["rollout/refills"] == 2
        assert metrics["rollout/sampled"] == 9 and metrics["rollout/dropped"] == 6
    assert len(said) == 1 and "3 of 3 groups have no signal after 3 rounds" in said[0]
    assert len(set(sum(sampler.rows, []))) == 18


def test_failed_prompts_are_sampled_anew_in_the_last_places():
    """Rows 0 and 4 fail before version 5, rows 1 and 5 are solved: only what failed is queued, first in first out."""
    sampler = scene.Recorder()
    made = scene.make(8, sampler=sampler, prompts=4, epochs_shuffle=False, reroll_from=3, reroll_groups=1)
    queues = []
    for step in range(8):
        made.next(step, step)
        queues.append(made.state()["stream"]["failed"])
    assert sampler.rows[:3] == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]] and queues[:3] == [(0,), (0, 4), (0, 4)]
    assert sampler.rows[3:] == [[4, 5, 6, 0], [7, 0, 1, 4], [2, 3, 4, 0], [5, 6, 7, 4], [0, 1, 2, 3]]
    # Row 0 fails again at version 3 and goes to the end, behind row 4; from version 5 on both are solved, and the queue runs dry.
    assert queues[3:] == [(4, 0), (0, 4), (4,), (), ()]
    assert len(set(sampler.numbers)) == 32


@pytest.mark.parametrize(
    "rewards, queued",
    [
        ([[0, 0], [0, 0]], True),
        ([[0, np.nan], [0, np.nan]], True),
        ([[0, np.nan], [np.nan, 0]], True),
        ([[1e-7, 0], [1e-7, 0]], True),
        ([[1, 1], [1, 1]], False),
        ([[-1, 0], [-1, 0]], False),
        ([[1, 0], [0, 1]], False),
        ([[1, 0], [-1, 0]], False),
        ([[np.nan, np.nan], [np.nan, np.nan]], False),
    ],
)
def test_a_prompt_failed_if_every_function_gave_every_completion_0(rewards, queued):
    sample = lambda policy, prompts, numbers: group.Sampled([[scene.completion(np.random.default_rng(i)) for i in (0, 1)]], 0)  # noqa: E731
    made = scene.make(1, sampler=sample, scorer=lambda groups: np.array([rewards]), prompts=1, reroll_from=9)
    made.next(0, 0)
    assert made.state()["stream"]["failed"] == ((0,) if queued else ())


def test_groups_without_signal_are_replaced_by_stored_ones():
    made = scene.make(40, prompts=8, replay_size=6)
    born, replayed = {}, 0
    for step in range(10):
        before = {one[1] for one in made.state()["stored"]}
        groups, metrics = made.next(step, step)
        numbers, old = [one.number for one in groups], [one for one in groups if one.number in born]
        assert len(set(numbers)) == 8 and {one.number for one in old} <= before
        assert metrics["rollout/replayed"] == len(old) and metrics["rollout/stored"] <= 6
        for one in groups:
            assert all((logp == step + 0.5).all() for logp in one.old_logp)  # of the policy of now, whoever wrote it
            assert one.version == born.setdefault(one.number, step)
        for one in old:
            assert one.advantage.any()
        replayed += len(old)
    assert replayed >= 10


def test_refills_repeat_no_prompt_over_the_end_of_an_epoch():
    sampler = scene.Recorder()
    made = scene.make(10, sampler=sampler, scorer=lambda groups: np.ones((len(groups), 4, 1)), prompts=3, dynamic=True, max_refills=2)
    for step in range(6):
        groups, _ = made.next(0, step)
        rows = sum(sampler.rows[3 * step :], [])
        assert len(set(rows)) == len(rows) == 9 and len({one.prompt.row for one in groups}) == 3


@pytest.mark.parametrize("depth", [0, 1])
def test_refills_sample_no_more_failed_prompts_anew(depth):
    """Nothing ever has signal: of the prompts of a generation one is drawn anew, in the first round."""
    sampler, scorer = scene.Recorder(), lambda groups: np.zeros((len(groups), 4, 1))
    options = {"dynamic": True, "max_refills": 2, "epochs_shuffle": False, "reroll_from": 1, "prefetch_depth": depth}
    made, queue = scene.make(1000, sampler=sampler, scorer=scorer, prompts=3, **options), []
    for step in range(5):
        _, metrics = made.next(0, step)
        queue.append(metrics["rollout/failed_queue"])
    made.close()
    again = [sum(row < rows[0] for row in rows) for rows in sampler.rows]
    if depth:  # requests are made ahead, each a generation with its own
        assert max(again) == 1 and queue == sorted(queue)
    else:
        assert again == [0, 0, 0] + [1, 0, 0] * 4 and queue == [9, 17, 25, 33, 41]
