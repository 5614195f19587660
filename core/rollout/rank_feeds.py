"""States that feeds of earlier versions left, one for each rank, which drew and dealt by itself, as the state of one feed of all ranks.

W ranks; rank r had taken the positions r, r + W, ... of the order of prompts.
"""

from collections.abc import Iterable, Sequence
from itertools import chain, zip_longest
from typing import Any

from treetune.core.rollout import feed_state, prompt_order

NONE = object()


def merged(states: Sequence[dict], order: prompt_order.PromptOrder) -> dict:
    """One state of those of all ranks, as JSON values: what is left of a generation is dealt to the same steps.

    Errors: ValueError for states of different runs.
    """
    runs = [{name: value for name, value in state["of"].items() if name not in ("rank", "world")} for state in states]
    if not states or any(run != runs[0] for run in runs):
        raise ValueError(f"the checkpoint holds rollouts of {len(states)} ranks of different runs: expected those of one")
    if len(states) == 1:
        return states[0]
    return {
        "of": runs[0] | {"prompts": runs[0]["prompts"] * len(states)},
        "stream": _cursor([state["stream"] for state in states], order),
        "flight": [_in_turn(requests) for requests in zip_longest(*(state["flight"] for state in states), fillvalue=[])],
        "overflow": _in_turn([state["overflow"] for state in states]),
        "stored": _in_turn([state["stored"] for state in states]),
        "batch": _batch(states, runs[0]),
        "metrics": states[0]["metrics"],
        "generation": states[0]["generation"],
        "part": states[0]["part"],
    }


def _cursor(cursors: Sequence[dict], order: prompt_order.PromptOrder) -> dict:
    """Where the rank stands that has come farthest; what the others had not taken by then waits to be drawn."""
    world, taken = len(cursors), max(cursor["taken"] for cursor in cursors)
    open_positions = sorted(i * world + rank for rank, cursor in enumerate(cursors) for i in range(cursor["taken"], taken))
    return {
        "drawn": max(cursor["drawn"] for cursor in cursors) * world,
        "taken": taken * world,
        "deferred": [*_in_turn([cursor["deferred"] for cursor in cursors]), *(prompt_order.at(order, at) for at in open_positions)],
        "failed": list(dict.fromkeys(_in_turn([cursor["failed"] for cursor in cursors]))),
    }


def _batch(states: Sequence[dict], run: dict) -> list:
    """The groups of the generation, so placed that each step of this pass is dealt those that the ranks would have been dealt."""
    batches, passed = [state["batch"] for state in states], states[0]["part"] // run["steps"]
    if not batches[0]:
        return []
    orders = [feed_state.mixed(len(batch), run["seed"], states[0]["generation"], passed, rank) for rank, batch in enumerate(batches)]
    dealt = _in_turn([[batch[i] for i in order] for batch, order in zip(batches, orders, strict=True)])
    placed: list[Any] = [None] * len(dealt)
    for place, group in zip(feed_state.mixed(len(dealt), run["seed"], states[0]["generation"], passed), dealt, strict=True):
        placed[place] = group
    return placed


def _in_turn(rows: Sequence[Iterable]) -> list:
    """The first of each row, then the second of each, and so on."""
    return [value for value in chain(*zip_longest(*rows, fillvalue=NONE)) if value is not NONE]
