"""Where a feed stands: all that decides what it gives next, as one immutable value and as JSON in checkpoints."""

from collections.abc import Sequence
from typing import NamedTuple

from treetune.core.data import order
from treetune.core.data.prompts import Prompt
from treetune.core.rollout import group, prompt_order, replay
from treetune.core.rollout.group import Group

PARTS = 12  # purpose of the shuffle that deals a generation to its steps, beside those of `core.data.order`
KEY = 0  # stands in keys of draws where earlier versions had the number of a rank


class IndexedGroup(NamedTuple):
    """A scored group, and the index of its prompt."""

    index: int
    group: Group


Request = tuple[prompt_order.PromptDraw, ...]  # prompts that go to the sampler together


class FeedState(NamedTuple):
    """All that decides what comes next."""

    stream: prompt_order.PromptCursor = prompt_order.PromptCursor()
    flight: tuple[Request, ...] = ()  # prompts drawn and handed to the thread, in order
    overflow: tuple[IndexedGroup, ...] = ()  # groups with signal that no generation had room for yet
    stored: tuple[replay.Stored, ...] = ()
    generation: int = 0  # generations made
    part: int = 0  # of the generation: steps given
    batch: tuple[IndexedGroup, ...] = ()  # the generation, as long as steps of it are to come
    metrics: tuple[tuple[str, float], ...] = ()


def mixed(n: int, seed: int, generation: int, passed: int, rank: int = KEY) -> list[int]:
    """The order in which the n groups of a generation are dealt to steps, in one of its passes."""
    return order.permutation(n, seed, rank, generation, passed, PARTS)


def to_json(state: FeedState) -> dict:
    """The state as JSON values; prompts are named by their index."""
    lists = {name: [[one.index, _pack(one.group)] for one in getattr(state, name)] for name in ("overflow", "batch")}
    stored = [[one.score, one.number, one.index, _pack(one.group)] for one in state.stored]
    counts = {"generation": state.generation, "part": state.part, "metrics": dict(state.metrics)}
    flight = [list(map(list, request)) for request in state.flight]
    return {"stream": state.stream._asdict(), "stored": stored, **lists, **counts, "flight": flight}


def from_json(data: dict, prompts: Sequence[Prompt], *, replay_size: int) -> FeedState:
    """What `to_json` wrote, with the best replay_size of its stored groups."""
    lists = {name: tuple(IndexedGroup(i, _unpack(prompts[i], one)) for i, one in data[name]) for name in ("overflow", "batch")}
    stored = [replay.Stored(score, number, i, _unpack(prompts[i], one)) for score, number, i, one in data["stored"]]
    cursor = prompt_order.PromptCursor(**data["stream"] | {name: tuple(data["stream"][name]) for name in ("deferred", "failed")})
    return FeedState(
        cursor,
        # Tuples again, because a request is the key of its call in the thread (`prefetch`).
        tuple(tuple(prompt_order.PromptDraw(*one) for one in request) for request in data["flight"]),
        stored=replay.best(stored, replay_size),
        generation=data["generation"],
        part=data["part"],
        metrics=tuple(data["metrics"].items()),
        **lists,
    )


def _pack(one: Group) -> dict:
    """JSON values of a group without its prompt, which may have columns that are none."""
    packed = group.to_json(one)
    del packed["prompt"]
    return packed


def _unpack(prompt: Prompt, data: dict) -> Group:
    return group.from_json(data | {"prompt": prompt._asdict()})._replace(prompt=prompt)
