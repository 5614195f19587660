import gc
import importlib.util
import json
import threading
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from treetune.core.rollout import group, prefetch

spec = importlib.util.spec_from_file_location("feed_scene", Path(__file__).with_name("feed_scene.py"))
scene = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scene)


def running() -> int:
    return sum(one.name == "prefetch" for one in threading.enumerate())


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    before = running()
    yield
    if running() > before:  # a feed that nobody closed: it goes with what holds it
        gc.collect()
    scene.wait(lambda: running() <= before)


class Gate:
    """A sampler that waits before each call until it is let through."""

    def __init__(self):
        self.permits, self.asked, self.seen = threading.Semaphore(0), [], []

    def __call__(self, policy, prompts, numbers):
        self.asked += numbers
        self.seen.append(policy)
        assert self.permits.acquire(timeout=10)
        return scene.sample(policy, prompts, numbers)


def test_calls_are_made_in_order_and_once():
    made = []
    ahead = prefetch.Prefetch(lambda *args: made.append(args) or sum(args))
    for key in (3, 1, 2, 1):
        ahead.put(key, key, 10)
    assert [ahead.get(key) for key in (1, 2, 3, 3)] == [11, 12, 13, 13] and made == [(3, 10), (1, 10), (2, 10)]
    assert 2 in ahead and 4 not in ahead
    ahead.keep([2])
    assert 2 in ahead and 1 not in ahead
    ahead.put(1, 5)
    assert ahead.get(1) == 5


def test_an_error_comes_out_as_it_was_and_the_call_can_be_made_again():
    error, calls = TimeoutError("no answer"), []

    def call(value):
        calls.append(value)
        if len(calls) == 2:
            raise error
        return value

    ahead = prefetch.Prefetch(call)
    for value in (1, 2, 3):
        ahead.put(value, value)
    with pytest.raises(TimeoutError) as caught:
        ahead.get(2)
    assert caught.value is error and ahead.get(1) == 1 and ahead.get(3) == 3 and 2 not in ahead
    ahead.put(2, 2)
    assert ahead.get(2) == 2 and calls == [1, 2, 3, 2]
    ahead.close()  # the error, which the call holds, holds this frame


def test_what_is_forgotten_before_it_began_is_not_made():
    gate, made = threading.Event(), []
    ahead = prefetch.Prefetch(lambda key: made.append(key) or gate.wait(10))
    for key in range(4):
        ahead.put(key, key)
    scene.wait(lambda: made == [0])
    ahead.keep([0, 3])
    gate.set()
    assert ahead.get(3) and made == [0, 3]


@pytest.mark.parametrize("how", ["close", "drop"])
def test_it_ends_at_once_and_begins_nothing_more(how):
    gate, made = threading.Event(), []
    ahead, before = prefetch.Prefetch(lambda key: made.append(key) or gate.wait(60)), running()
    for key in range(3):
        ahead.put(key, key)
    scene.wait(lambda: made == [0])
    if how == "close":
        ahead.close()
        with pytest.raises(ValueError, match="closed"):
            ahead.put(9, 9)
        ahead.close()
    else:
        del ahead
        gc.collect()
    assert running() == before  # nobody waited for the thread: it is still at work
    gate.set()
    scene.wait(lambda: running() < before)
    assert made == [0]


def test_the_next_generation_is_sampled_while_this_one_trains():
    gate = Gate()
    made = scene.make(40, sampler=gate, prompts=3, steps=3, prefetch_depth=2, more={"snapshot": lambda policy: policy})
    gate.permits.release()
    first = [made.next(step, step)[0] for step in range(3)]
    assert sorted(one.number for step in first for one in step) == [0, 1, 2]
    scene.wait(lambda: gate.asked == [0, 1, 2, 3, 4, 5])  # asked for while nobody waits
    gate.permits.release()
    scene.wait(lambda: gate.asked == list(range(9)))
    groups, metrics = made.next(3, 3)
    assert {one.version for one in groups} == {0} and metrics["rollout/staleness_mean"] == metrics["rollout/staleness_max"] == 3
    for _ in range(4):
        gate.permits.release()
    versions = {step: made.next(step, step)[0][0].version for step in range(4, 12)}
    assert versions == {4: 0, 5: 0, 6: 0, 7: 0, 8: 0, 9: 3, 10: 3, 11: 3}  # two generations behind, no more
    assert gate.seen == [0, 0, 0, 3, 6, 9][: len(gate.seen)]
    gate.permits.release(9)
    made.close()


def test_without_a_snapshot_the_sampler_gets_no_policy():
    seen = []

    def sampler(policy, prompts, numbers):
        seen.append(policy)
        return scene.sample(policy, prompts, numbers)

    made = scene.make(10, sampler=sampler, prompts=2, prefetch_depth=1)
    made.next(5, 5)
    made.close()
    assert set(seen) == {None}


@pytest.mark.parametrize("options", [{}, {"chunk": 2}, {"chunk": 3, "steps": 2, "iterations": 2}])
@pytest.mark.parametrize("depth", [1, 3])
def test_prompts_and_numbers_are_those_of_the_synchronous_feed(depth, options):
    plain, ahead = scene.make(10, prompts=4, **options), scene.make(10, prompts=4, prefetch_depth=depth, **options)
    for step in range(9):
        rows = [[(one.number, one.prompt.row) for one in made.next(0, step)[0]] for made in (plain, ahead)]
        assert rows[0] == rows[1]
    ahead.close()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("cut", [0, 1, 4, 7])
@pytest.mark.parametrize("options", [{}, {"steps": 2, "iterations": 2}, {"chunk": 3} | scene.ALL, {"steps": 2} | scene.ALL])
def test_no_prompt_is_lost_or_doubled_by_a_kill(cut, options):
    """The state is written, training goes on and is killed; what is resumed trains on what an uninterrupted run trains on."""
    options = {"prompts": 4, "prefetch_depth": 2} | options

    def run(made, steps):
        return [scene.line(made.next(0, step)) for step in steps]

    whole = scene.make(10, **options)
    expected = run(whole, range(12))
    first = scene.make(10, **options)
    got = run(first, range(cut))
    state = json.dumps(first.state())
    run(first, range(cut, cut + 2))
    del first
    again = scene.make(10, **options)
    again.load(json.loads(state))
    got += run(again, range(cut, 12))
    assert got == expected and Counter(got) == Counter(expected)
    numbers = Counter(one["number"] for line in dict.fromkeys(got) for one in json.loads(line)[0])
    if "dynamic" not in options:
        assert set(numbers) == set(range(len(numbers))) and len(set(numbers.values())) == 1


def test_prompts_in_flight_are_part_of_the_state_and_survive_a_change_of_depth():
    options = {"prompts": 4, "epochs_shuffle": False}
    made = scene.make(20, prefetch_depth=2, **options)
    made.next(0, 0)
    state = json.loads(json.dumps(made.state()))
    assert state["flight"] == [[[i, i] for i in range(4, 8)], [[i, i] for i in range(8, 12)]]
    made.close()
    plain = scene.make(20, **options)
    plain.load(state)
    assert [sorted(one.number for one in plain.next(0, step)[0]) for step in range(1, 5)] == [list(range(i, i + 4)) for i in (4, 8, 12, 16)]


def test_an_error_in_the_thread_surfaces_and_loses_no_prompt():
    error, calls = ConnectionError("the server is gone"), []

    def sampler(policy, prompts, numbers):
        calls.append(numbers)
        if len(calls) in (2, 3):
            raise error
        return scene.sample(policy, prompts, numbers)

    made, trained, errors = scene.make(30, sampler=sampler, prompts=3, prefetch_depth=1), [], 0
    while len(trained) < 18:
        before = json.dumps(made.state())
        try:
            trained += [one.number for one in made.next(0, 0)[0]]
        except ConnectionError as caught:
            errors += 1
            assert caught is error and json.dumps(made.state()) == before
    made.close()
    assert sorted(trained) == list(range(18)) and errors == 2


def test_an_error_of_the_score_wastes_no_samples():
    calls, broken = [], iter([True])

    def sampler(policy, prompts, numbers):
        calls.extend(numbers)
        return scene.sample(policy, prompts, numbers)

    def scorer(groups):
        if next(broken, False):
            raise OSError("a worker died")
        return scene.score(groups)

    made = scene.make(30, sampler=sampler, scorer=scorer, prompts=3, prefetch_depth=1)
    with pytest.raises(OSError, match="a worker died"):
        made.next(0, 0)
    assert sorted(one.number for one in made.next(0, 0)[0]) == [0, 1, 2]
    scene.wait(lambda: len(calls) == 6)
    made.close()
    assert calls == list(range(6))


def test_a_feed_closes_while_its_sampler_hangs():
    gate = Gate()
    made = scene.make(10, sampler=gate, prompts=2, prefetch_depth=1)
    gate.permits.release()
    made.next(0, 0)
    scene.wait(lambda: len(gate.asked) == 4)
    before = running()
    made.close()
    assert running() == before  # nobody waited for the sampler: it still hangs
    gate.permits.release()


def test_ids_sampled_in_the_thread_are_the_ids_trained_on():
    written = {}

    def sampler(policy, prompts, numbers):
        found = scene.sample(policy, prompts, numbers)
        for prompt, number, some in zip(prompts, numbers, found.completions, strict=True):
            written[number] = scene.fingerprint(group.Group(prompt, number, tuple(some), 0))
        return found

    made = scene.make(10, sampler=sampler, prompts=4, prefetch_depth=1, chunk=2, **scene.ALL)
    seen = [one for step in range(8) for one in made.next(step, step)[0]]
    made.close()
    assert len(seen) == 32 and all(scene.fingerprint(one) == written[one.number] for one in seen)
    assert all(np.isfinite(one.advantage).all() for one in seen)


def test_samples_that_were_trained_on_are_let_go():
    alive = []

    def sampler(policy, prompts, numbers):
        found = scene.sample(policy, prompts, numbers)
        alive.extend(weakref.ref(one.tokens) for some in found.completions for one in some)
        return found

    made = scene.make(30, sampler=sampler, prompts=2, prefetch_depth=1)
    for step in range(5):
        made.next(0, step)
    scene.wait(lambda: len(alive) == 6 * 2 * scene.G)
    gc.collect()
    assert sum(one() is not None for one in alive) <= 2 * 2 * scene.G  # of the generation ahead and the one just given
    made.close()


def test_an_idle_thread_keeps_no_result():
    ahead = prefetch.Prefetch(lambda: np.zeros(3))
    ahead.put(0)
    result = weakref.ref(ahead.get(0))
    ahead.keep(())
    scene.wait(lambda: result() is None)
    ahead.close()
