"""The feed on several ranks is that of one process: each samples its share, and all have the same groups, metrics and state."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from treetune.core.rollout import prompt_order, rank_feeds

spec = importlib.util.spec_from_file_location("feed_scene", Path(__file__).with_name("feed_scene.py"))
scene = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scene)

STEPS = 9
CASES = [
    (10, {"prompts": 4}),  # a pass ends within steps
    (3, {"prompts": 4}),  # fewer prompts than a step takes
    (13, {"prompts": 8, "steps": 2, "iterations": 2} | scene.ALL),
    (11, {"prompts": 4, "seed": 5, "prefetch_depth": 2} | scene.ALL),
    (10, {"prompts": 8, "chunk": 1, "steps": 2, "prefetch_depth": 1} | scene.ALL),
    (9, {"prompts": 4, "epochs_shuffle": False, "replay_size": 4, "reroll_from": 1, "iterations": 2}),
]


def lines(made, steps, moves: bool = True) -> list[str]:
    """Steps of a policy that moves with each of them, or never."""
    found = [scene.line(made.next(step * moves, step)) for step in steps]
    made.close()
    return found


def several(world: int, n: int, options: dict, *, state=None, steps=range(STEPS), moves=True) -> list:
    """(lines of the steps, state after them) of each rank."""

    def run(rank, gather):
        made = scene.make(n, rank=rank, world=world, more={"gather": gather, "snapshot": lambda policy: policy}, **options)
        if state is not None:
            made.load(json.loads(state))
        return lines(made, steps, moves), json.dumps(made.state())

    return scene.on_ranks(world, run)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("n, options", CASES)
def test_ranks_have_what_one_process_has(n, options, world):
    alone = scene.make(n, more={"snapshot": lambda policy: policy}, **options)
    expected = lines(alone, range(STEPS)), json.dumps(alone.state())
    assert several(world, n, options) == [expected] * world


@pytest.mark.sampled(4)
@pytest.mark.parametrize("n, options", CASES)
@pytest.mark.parametrize("before, after", [(2, 1), (1, 4), (4, 2)])
def test_a_run_goes_on_exactly_on_another_number_of_ranks(n, options, before, after):
    moves = "prefetch_depth" not in options  # what was sampled ahead is sampled again from the weights of the checkpoint
    whole = several(1, n, options, moves=moves)[0][0]
    for cut in (1, 4):
        first = several(before, n, options, steps=range(cut), moves=moves)
        again = several(after, n, options, state=first[0][1], steps=range(cut, STEPS), moves=moves)
        assert first[0][0] + again[-1][0] == whole


def test_each_rank_samples_its_share_and_none_less_often_than_another():
    asked = [[] for _ in range(4)]
    samplers = [
        lambda policy, prompts, numbers, own=own: own.append(list(numbers)) or scene.sample(policy, prompts, numbers) for own in asked
    ]
    options = {"prompts": 4, "dynamic": True}

    def run(rank, gather):
        made = scene.make(23, sampler=samplers[rank], rank=rank, world=4, more={"gather": gather}, **options)
        return lines(made, range(STEPS))

    scene.on_ranks(4, run)
    assert all([len(numbers) for numbers in own] == [1] * len(asked[0]) for own in asked) and len(asked[0]) > STEPS
    # A round of a refill has fewer prompts than ranks: those without one sample the first of it, which counts once.
    rounds = [[numbers[0] for numbers in call] for call in zip(*asked, strict=True)]
    assert any(len(set(numbers)) < 4 for numbers in rounds)
    assert sorted({number for numbers in rounds for number in numbers}) == list(range(max(map(max, rounds)) + 1))


def test_old_log_probs_are_computed_once_for_each_group():
    asked = [[] for _ in range(2)]

    def relogged(rank):
        return lambda policy, groups: asked[rank].append([one.number for one in groups]) or scene.relogp(policy, groups)

    def run(rank, gather):
        made = scene.make(9, relogged=relogged(rank), prompts=4, rank=rank, world=2, more={"gather": gather})
        return [one.old_logp for one in made.next(3, 3)[0]]

    found = scene.on_ranks(2, run)
    assert [len(numbers) for own in asked for numbers in own] == [2, 2] and sorted(asked[0][0] + asked[1][0]) == [0, 1, 2, 3]
    assert all((np.concatenate(old) == 3.5).all() for rank in found for old in rank)


def _of_ranks(n: int, world: int, *, part: int = 0) -> list[dict]:
    """What an earlier version kept for each of its ranks, which drew their own positions: two steps of a generation of two each."""
    deck, states = prompt_order.PromptOrder(n, seed=3), []
    for rank in range(world):
        taken = 4 + rank  # one has come farther
        indices = [prompt_order.at(deck, i * world + rank) for i in range(taken)]
        made = scene.make(n, prompts=4, steps=2, seed=3, replay_size=2)
        state = json.loads(json.dumps(made.state()))
        state["of"] |= {"rank": rank, "world": world}
        groups = [[index, _packed(index, i * world + rank)] for i, index in enumerate(indices[:4])]
        state |= {"generation": 1, "part": part, "batch": groups if part else [], "flight": [[[indices[3], 3 * world + rank]]]}
        state["stream"] = {"drawn": 4, "taken": taken, "deferred": indices[4:], "failed": [indices[0]]}
        states.append(state)
    return states


def _packed(index: int, number: int) -> dict:
    from treetune.core.rollout import group

    one = group.Group(scene.prompts(index + 1)[-1], number, tuple(scene.sample(0, None, [number]).completions[0]), 0)
    packed = group.to_json(one._replace(rewards=scene.score([one])[0], advantage=scene.advantage(scene.score([one]))[0]))
    del packed["prompt"]
    return packed


def test_what_earlier_versions_kept_for_each_rank_goes_on_as_one():
    states = _of_ranks(30, 2, part=1)
    merged = rank_feeds.merged(states, deck := prompt_order.PromptOrder(30, seed=3))
    assert merged["stream"]["taken"] == 10 and merged["stream"]["drawn"] == 8 and len(merged["stream"]["failed"]) == 2
    # The second rank had taken a position more, which waits, as does the one that the first had not come to.
    assert sorted(merged["stream"]["deferred"]) == sorted(prompt_order.at(deck, position) for position in (8, 9))
    assert merged["flight"] == [[*states[0]["flight"][0], *states[1]["flight"][0]]]
    made = scene.make(30, prompts=8, steps=2, seed=3, replay_size=2)
    made.load(states)
    given = {one.number for one in made.next(0, 1)[0]}
    from treetune.core.rollout import feed_state

    left = [[state["batch"][i][1]["number"] for i in feed_state.mixed(4, 3, 1, 0, rank)[2:]] for rank, state in enumerate(states)]
    assert given == {number for numbers in left for number in numbers}
    following = [one.number for step in (2, 3) for one in made.next(0, step)[0]]
    assert {6, 7} < set(following) and min(following) == 6 and len(set(following)) == 8


def test_the_state_of_one_earlier_rank_goes_on_as_it_was():
    whole = scene.make(10, prompts=4, **scene.ALL)
    first = lines(whole, range(3))
    state = json.loads(json.dumps(whole.state()))
    state["of"] |= {"rank": 0, "world": 1}
    again = scene.make(10, prompts=4, **scene.ALL)
    again.load([state])
    assert first + lines(again, range(3, STEPS)) == lines(scene.make(10, prompts=4, **scene.ALL), range(STEPS))


def test_states_of_different_runs_are_refused():
    states = _of_ranks(30, 2)
    states[1]["of"]["seed"] = 4
    with pytest.raises(ValueError, match="2 ranks of different runs"):
        scene.make(30, prompts=8, steps=2, seed=3).load(states)
