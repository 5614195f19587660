import importlib.util
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from treetune.core.rollout import group, replay

spec = importlib.util.spec_from_file_location("feed_scene", Path(__file__).with_name("feed_scene.py"))
scene = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scene)


def made(number: int, rewards, advantage) -> group.Group:
    rewards = np.array(rewards, np.float64)
    completions = tuple(scene.completion(np.random.default_rng([number, i])) for i in range(len(rewards)))
    old = tuple(np.zeros(len(one.tokens), np.float32) for one in completions)
    prompt = scene.prompts(number + 1)[number]
    return group.Group(prompt, number, completions, 7, rewards.reshape(len(rewards), -1), np.array(advantage), old)


def scored(number: int, score: float) -> group.Group:
    """Rewards [1, 0] have deviation sqrt(1/2)."""
    return made(number, [1, 0], np.array([1.0, -1.0]) * score / 2 * np.sqrt(2))


def scores(stored) -> list[float]:
    return sorted(round(one.score, 9) for one in stored)


def test_the_score_is_size_of_advantages_times_deviations():
    r = np.array([1.0, 0, 0, 1])
    one = made(0, r, (r - r.mean()) / (r.std(ddof=1) + 1e-4))
    # s = 1 / sqrt(3) and |A| = 0.5 / (s + 1e-4), four times.
    assert replay.score(one) == pytest.approx(2 / (1 + 1e-4 * np.sqrt(3)), abs=1e-12)
    # Two functions: (|1| + |-1|) * (sqrt(1/2) + 2 sqrt(1/2)); one without an opinion on a row adds the deviation of the others.
    assert replay.score(made(0, [[1, 2], [0, 0]], [1.0, -1])) == pytest.approx(2 * 3 * np.sqrt(0.5))
    assert replay.score(made(0, [[1, np.nan], [0, 3], [0, 3]], [1.0, -1, 0])) == pytest.approx(2 * np.sqrt(1 / 3))


def test_a_full_buffer_keeps_the_greatest():
    stored = ()
    for number, score in enumerate([1, 3, 2, 0.5]):
        stored = replay.add(stored, [(number, scored(number, score))], 2)
    assert scores(stored) == [2, 3]
    assert scores(replay.add((), [(i, scored(i, score)) for i, score in enumerate([1, 3, 2, 0.5])], 2)) == [2, 3]


def test_an_equal_score_replaces_nothing_and_the_older_of_two_goes():
    stored = replay.add((), [(0, scored(0, 1)), (1, scored(1, 1))], 2)
    assert {one.number for one in replay.add(stored, [(2, scored(2, 1))], 2)} == {0, 1}
    assert {one.number for one in replay.add(stored, [(2, scored(2, 5))], 2)} == {1, 2}


def test_a_buffer_that_became_smaller_keeps_the_best_in_their_order():
    stored = replay.add((), [(i, scored(i, score)) for i, score in enumerate([1, 3, 2, 3])], 4)
    assert [[one.number for one in replay.best(stored, size)] for size in (0, 1, 2, 3, 9)] == [[], [3], [1, 3], [1, 2, 3], [0, 1, 2, 3]]


def test_flat_groups_are_never_stored():
    noise = np.full(7, np.float32(0.7)).astype(np.float64)
    groups = [made(0, noise, np.full(7, 5.9566e-4)), made(1, [1, 0], [0.0, 0.0]), made(2, [np.nan, 1], [0.0, 0.0])]
    assert replay.score(groups[0]) == 0
    assert replay.add((), list(enumerate(groups)), 4) == ()
    assert replay.add((), [(0, scored(0, 1))], 0) == ()


def test_stored_groups_are_as_sampled_and_carry_nothing_of_an_old_policy():
    one = scored(3, 1)
    (kept,) = replay.add((), [(3, one)], 4)
    assert kept.index == 3 and kept.group.old_logp is None and kept.group.version == 7
    assert scene.fingerprint(kept.group) == scene.fingerprint(one)
    assert [c.logp.tobytes() for c in kept.group.completions] == [c.logp.tobytes() for c in one.completions]
    back = group.from_json(json.loads(json.dumps(group.to_json(kept.group))))
    assert replay.score(back) == kept.score and scene.fingerprint(back) == scene.fingerprint(one)


def test_draws_are_in_proportion_to_scores_and_never_repeat():
    stored = replay.add((), [(i, scored(i, score)) for i, score in enumerate([1, 2, 5])], 3)
    first, pairs = Counter(), Counter()
    for key in range(4000):
        found = replay.draw(stored, 2, 0, key)
        first[found[0].number] += 1
        pairs[tuple(sorted(one.number for one in found))] += 1
    # 4000 draws: four standard errors of a share are at most 0.032.
    np.testing.assert_allclose([first[i] / 4000 for i in range(3)], [1 / 8, 2 / 8, 5 / 8], atol=0.032)
    without = {(0, 1): 1 / 8 * 2 / 7 + 2 / 8 * 1 / 6, (0, 2): 1 / 8 * 5 / 7 + 5 / 8 * 1 / 3, (1, 2): 2 / 8 * 5 / 6 + 5 / 8 * 2 / 3}
    assert set(pairs) == set(without)
    for pair, share in without.items():
        assert pairs[pair] / 4000 == pytest.approx(share, abs=0.032)


def test_a_draw_depends_on_its_key_alone_and_ends_with_the_buffer():
    stored = replay.add((), [(i, scored(i, i + 1)) for i in range(5)], 5)
    assert [one.number for one in replay.draw(stored, 3, 1, 2)] == [one.number for one in replay.draw(stored, 3, 1, 2)]
    assert len({tuple(one.number for one in replay.draw(stored, 3, 1, key)) for key in range(20)}) > 5
    assert sorted(one.number for one in replay.draw(stored, 9, 0)) == [0, 1, 2, 3, 4]
    assert replay.draw((), 2, 0) == [] and replay.draw(stored, 0, 0) == []
