import importlib.util
import json
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from treetune.core.data import order
from treetune.core.rollout import group, prompt_order

spec = importlib.util.spec_from_file_location("feed_scene", Path(__file__).with_name("feed_scene.py"))
scene = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scene)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "options",
    [
        {"prompts": 4},
        {"prompts": 4, "steps": 2, "iterations": 2} | scene.ALL,
        {"prompts": 6, "steps": 3, "chunk": 2} | scene.ALL,
        {"prompts": 6, "iterations": 2, "replay_size": 4, "reroll_from": 1, "epochs_shuffle": False},
        {"prompts": 12, "steps": 2, "seed": 7} | scene.ALL,
    ],
)
def test_a_stream_goes_on_exactly_from_every_position(options):
    whole, lines, states = scene.make(10, **options), [], []
    for step in range(14):
        states.append(json.dumps(whole.state()))
        lines.append(scene.line(whole.next(step, step)))
    assert len(set(lines)) == 14
    for position, state in enumerate(states):
        again = scene.make(10, **options)
        again.load(json.loads(state))
        assert [scene.line(again.next(step, step)) for step in range(position, 14)] == lines[position:]
    whole.close()


def test_the_seed_changes_the_stream():
    first = [scene.line(scene.make(10, prompts=4, **more).next(0, 0)) for more in ({}, {"seed": 1})]
    assert len(set(first)) == 2


@pytest.mark.parametrize("n, size", [(7, 3), (10, 4), (5, 5), (2, 1), (3, 5)])
def test_every_epoch_has_every_prompt(n, size):
    sequence = [index for epoch in range(40) for index in order.permutation(n, 3, epoch, prompt_order.PROMPTS)]
    deck, stream, drawn, numbers = prompt_order.PromptOrder(n, seed=3), prompt_order.PromptCursor(), Counter(), []
    for _ in range(12):
        draws, stream = prompt_order.draw(stream, deck, size)
        drawn.update(one.index for one in draws)
        numbers += [one.number for one in draws]
        assert len({one.index for one in draws}) == min(size, n)
    # What was drawn or waits to be is what was taken of all epochs, each of which has every prompt once.
    assert drawn + Counter(stream.deferred) == Counter(sequence[: stream.taken])
    assert stream.taken >= 12 * size and len(stream.deferred) < n
    assert numbers == list(range(12 * size))


def test_an_order_that_is_not_shuffled_is_that_of_the_data():
    sampler = scene.Recorder()
    made = scene.make(5, sampler=sampler, prompts=2, epochs_shuffle=False)
    for step in range(5):
        made.next(0, step)
    assert sampler.rows == [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]] and made.progress == 2 and made.epoch == 2


def test_a_prompt_that_would_come_twice_in_a_batch_comes_first_in_the_next():
    sampler = scene.Recorder()
    made = scene.make(4, sampler=sampler, prompts=3, epochs_shuffle=False)
    for step in range(4):
        made.next(0, step)
    assert sampler.rows == [[0, 1, 2], [3, 0, 1], [2, 3, 0], [1, 2, 3]]
    deck = prompt_order.PromptOrder(4, shuffle=False)
    draws, after = prompt_order.draw(prompt_order.PromptCursor(), deck, 2, avoid=[0, 2])
    assert [one.index for one in draws] == [1, 3] and after.deferred == (0, 2)
    assert [one.index for one in prompt_order.draw(after, deck, 3)[0]] == [0, 2, 1]


def test_fewer_prompts_than_a_generation_needs():
    said, sampler = [], scene.Recorder()
    made = scene.make(3, sampler=sampler, prompts=7, epochs_shuffle=False, say=said.append)
    groups, _ = made.next(0, 0)
    assert len(groups) == 7 and sampler.rows == [[0, 1, 2, 0, 1, 2, 0]] and len(set(sampler.numbers)) == 7
    assert len(said) == 1 and said[0].startswith("3 prompts for generations of 7")


def test_passes_train_on_the_same_groups_and_steps_divide_them():
    made = scene.make(20, prompts=6, steps=3, iterations=2)
    steps = [made.next(0, step)[0] for step in range(6)]
    passes = [[one for step in steps[i : i + 3] for one in step] for i in (0, 3)]
    assert [len(step) for step in steps] == [2] * 6
    by_number = [{one.number: one for one in some} for some in passes]
    assert set(by_number[0]) == set(by_number[1]) and len(by_number[0]) == 6
    assert all(by_number[0][number] is by_number[1][number] for number in by_number[0])
    assert [one.number for one in passes[0]] != [one.number for one in passes[1]]
    assert not set(by_number[0]) & {one.number for one in made.next(6, 6)[0]}


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_scoring_in_chunks_changes_nothing(chunk):
    sampler, options = scene.Recorder(), {"prompts": 6, "steps": 2} | scene.ALL
    whole, parts = scene.make(10, **options), scene.make(10, sampler=sampler, chunk=chunk, **options)
    for step in range(8):
        assert scene.line(whole.next(step, step)) == scene.line(parts.next(step, step))
    assert max(map(len, sampler.rows)) == chunk
    parts.close()


def test_statistics_of_a_batch_are_those_of_the_whole_generation():
    # Rewards [1,0,0,1 | 1,1,1,0] scaled by the batch; in parts the groups would be +-.8658754 and .4999, -1.4997.
    made = {0: [1.0, 0, 0, 1], 1: [1.0, 1, 1, 0]}
    options = {"scorer": lambda groups: np.array([made[one.prompt.row] for one in groups])[..., None], "advantages": scene.batch_scaled}
    groups, _ = scene.make(2, prompts=2, chunk=1, **options).next(0, 0)
    found = {one.prompt.row: one.advantage for one in groups}
    np.testing.assert_allclose(found[0], np.array([1, -1, -1, 1]) * 0.965905, atol=1e-6)
    np.testing.assert_allclose(found[1], [0.482953, 0.482953, 0.482953, -1.448858], atol=1e-6)


def test_chunks_are_scored_while_the_next_are_sampled():
    scored = threading.Event()

    def sampler(policy, prompts, numbers):
        if numbers[0] > 0:
            assert scored.wait(5), "nothing was scored before the second chunk was sampled"
        return scene.sample(policy, prompts, numbers)

    def scorer(groups):
        scored.set()
        return scene.score(groups)

    assert len(scene.make(4, sampler=sampler, scorer=scorer, prompts=4, chunk=2).next(0, 0)[0]) == 4


@pytest.mark.parametrize("where", ["sampler", "score", "relogp", "advantage"])
@pytest.mark.parametrize("chunk", [0, 2])
def test_an_error_leaves_the_feed_as_it_was(where, chunk):
    options = {"prompts": 4, "steps": 2, "chunk": chunk} | scene.ALL
    whole = scene.make(10, **options)
    lines = [scene.line(whole.next(step, step)) for step in range(10)]

    def breaking(call, at):
        calls = iter(range(1000))

        def broken(*args):
            if next(calls) in at:
                raise OSError("gone")
            return call(*args)

        return broken

    at, plain = {0, 3, 4}, {"sampler": scene.sample, "scorer": scene.score, "relogged": scene.relogp, "advantages": scene.advantage}
    name = {"sampler": "sampler", "score": "scorer", "relogp": "relogged", "advantage": "advantages"}[where]
    made, found, errors = scene.make(10, **plain | {name: breaking(plain[name], at)}, **options), [], 0
    while len(found) < 10:
        before = json.dumps(made.state())
        try:
            found.append(scene.line(made.next(len(found), len(found))))
        except OSError:
            errors += 1
            assert json.dumps(made.state()) == before
    # a thread that scores may or may not have begun with the second chunk when the first one fails
    assert found == lines and (errors == 3 or (errors == 2 and chunk))


def test_what_is_trained_on_is_what_was_sampled():
    sampler = scene.Recorder()
    options = {"prompts": 4, "steps": 2, "iterations": 2} | scene.ALL
    made, seen = scene.make(10, sampler=sampler, **options), 0
    for step in range(24):
        fresh = scene.make(10, sampler=sampler, **options)
        fresh.load(json.loads(json.dumps(made.state())))
        made = fresh
        for one in made.next(step, step)[0]:
            back = group.from_json(json.loads(json.dumps(group.to_json(one))))
            assert scene.fingerprint(one) == scene.fingerprint(back) == sampler.made[one.number]
            assert one.prompt.tokens.tolist() == [one.prompt.row, one.prompt.row + 1]
            seen += 1
    assert seen == 48


def test_metrics_are_those_of_the_groups_as_sampled():
    asked = []

    def measure(groups):
        asked.append([one.number for one in groups])
        return {"reward": float(len(groups))}

    made = scene.make(40, prompts=8, steps=2, more={"measure": measure}, replay_size=4)
    for step in range(4):
        _, metrics = made.next(step, step)
        assert metrics["reward"] == 8
    assert asked == [list(range(8)), list(range(8, 16))]


def test_a_state_of_another_run_is_refused():
    state = scene.make(10, prompts=4).state()
    for n, options, name in ((11, {"prompts": 4}, "data"), (10, {"prompts": 2}, "prompts"), (10, {"prompts": 4, "seed": 2}, "seed")):
        with pytest.raises(ValueError, match=f"other values of .*{name}"):
            scene.make(n, **options).load(state)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"prompts": 0}, "prompts is 0"),
        ({"prompts": 4, "steps": 3}, "4 prompts in 3 steps"),
        ({"prompts": 4, "iterations": 0}, "iterations is 0"),
        ({"prompts": 4, "rank": 2, "world": 2}, "rank is 2 of 2"),
        ({"prompts": 4, "world": 3}, "4 prompts on 3 ranks: expected a multiple"),
        ({"prompts": 4, "prefetch_depth": -1}, "prefetch_depth is -1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        scene.make(10, **options)
    with pytest.raises(ValueError, match="there are 0 prompts"):
        scene.make(0, prompts=4)


def _completions(change):
    return lambda policy, prompts, numbers: group.Sampled(change(scene.sample(policy, prompts, numbers).completions), 0)


@pytest.mark.parametrize(
    "parts, text",
    [
        ({"sampler": _completions(lambda found: found[:1])}, r"\[4\] completions for 2 prompts"),
        ({"sampler": _completions(lambda found: [found[0], found[1][:3]])}, r"\[4, 3\] completions for 2 prompts"),
        ({"sampler": _completions(lambda found: [[], []])}, r"\[0, 0\] completions"),
        (
            {"sampler": _completions(lambda found: [[one._replace(trained=np.ones(9, bool)) for one in some] for some in found])},
            "and 9 marks of what is trained, for the prompt of row",
        ),
        ({"scorer": lambda groups: np.zeros((2, 4))}, r"rewards \(2, 4\): expected \(2, 4\) and the number"),
        ({"scorer": lambda groups: np.zeros((1, 4, 1))}, r"rewards \(1, 4, 1\)"),
        ({"advantages": lambda rewards: np.full((2, 4), np.nan)}, "expected a finite number for each completion"),
        ({"advantages": lambda rewards: np.zeros(2)}, r"advantages \(2,\)"),
    ],
)
def test_samples_and_scores_that_do_not_fit_are_refused(parts, text):
    with pytest.raises(ValueError, match=text):
        scene.make(10, prompts=2, **parts).next(0, 0)


def test_what_was_scored_before_an_error_is_scored_again():
    broken = iter([False, True])

    def scorer(groups):
        if next(broken, False):
            raise OSError("gone")
        return scene.score(groups)

    made = scene.make(12, scorer=scorer, prompts=6, chunk=2)
    with pytest.raises(OSError, match="gone"):
        made.next(0, 0)
    groups, _ = made.next(5, 5)  # another policy writes other completions under the same numbers
    made.close()
    assert all(one.version == 5 and one.rewards.tobytes() == scene.score([one])[0].tobytes() for one in groups)
