"""What would make a run fit: changes of its options, alone or two at a time, the fastest first."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from treetune.cli import memory_ladder
from treetune.cli.planning import estimate
from treetune.cli.planning.estimate import Estimate, Place, Run
from treetune.core.config import table
from treetune.models import memory

SHOWN = 3
TRIED = 4  # changes that are counted, of those that formulas say would fit
NEAR, TIGHT = 1.1, 0.92  # of the room: by formulas, as counting decides; above the second fragments may not fit


class Change(NamedTuple):
    """Options that change, as flags, what it costs in words, and the run on its devices with it."""

    flags: str
    cost: str
    values: dict[str, Any]
    place: Place


class Advice(NamedTuple):
    """A change that makes the run fit, and what the run would take with it."""

    change: Change
    estimate: Estimate


def advise(run: Run, place: Place) -> list[Advice]:
    """Changes that fit, the fastest first: single ones, or pairs of them where no single one is enough."""
    single = list(_changes(run, place))
    fitting = _fitting(run, place, single)
    if not fitting:
        fitting = _fitting(run, place, [both for pair in itertools.combinations(single, 2) if (both := _both(*pair)) is not None])
    return sorted(fitting, key=lambda one: one.estimate.step / one.estimate.tokens)[:SHOWN]


def _fitting(run: Run, place: Place, changes: list[Change]) -> list[Advice]:
    """Those that fit by a count, of those that formulas say are near."""
    base, room = _formula(run, place), place.device.room
    real = estimate.estimate(run, estimate.counted(run, place.device), place).peak
    out = []
    guesses = [(real * _formula(changed(run, one.values), one.place) / base, one) for one in changes]
    for _, one in [pair for pair in guesses if pair[0] < NEAR * room][:TRIED]:
        other = changed(run, one.values)
        taken = estimate.estimate(other, estimate.counted(other, one.place.device), one.place)
        if taken.peak <= TIGHT * room:
            out.append(Advice(one, taken))
    return out


def _formula(run: Run, place: Place) -> float:
    """The peak by the formulas of `models.memory`, of a share of what is held where it is shared."""
    model, setup = run.shapes(place.device), estimate.setup(run, place)
    optimizer = run.config.optim.optimizer
    setup = setup._replace(state_bytes=memory_ladder.state_bytes(optimizer), paged=optimizer.startswith("paged_"))
    of_run = memory.table(model.abstract, model.cfg, setup)
    shared = of_run.held * (1 - 1 / place.parts) if place.sharding == "full" else 0
    return max(1.0, of_run.peak - shared)


def changed(run: Run, values: dict[str, Any]) -> Run:
    """The run with other values of options."""
    config = run.config
    for field in dataclasses.fields(config):
        group = cast(Any, getattr(config, field.name))
        own = {name: value for name, value in values.items() if name in getattr(group, "__dataclass_fields__", ())}
        if own:
            config = dataclasses.replace(config, **{field.name: dataclasses.replace(group, **own)})
    return run._replace(config=config)


def _changes(run: Run, place: Place) -> Iterator[Change]:
    values, device = table.flatten(run.config), "cuda" if place.device.gpu else "cpu"
    for flags, cost, new in memory_ladder.changes(values, device):
        yield Change(flags, cost, new, place)
    if place.device.gpu:
        for ranks in (2, 4, 8):
            if ranks > place.ranks or place.sharding != "full":
                more = place._replace(ranks=max(ranks, place.ranks), sharding="full", copies=1)
                yield Change(f"--nproc {more.ranks} --sharding full", "each holds a part of what trains", {}, more)


def _both(one: Change, other: Change) -> Change | None:
    """Two changes as one; None where they are of the same option."""
    if one.values.keys() & other.values.keys() or (one.place != other.place and not (one.values or other.values)):
        return None
    place = one.place if not one.values else other.place
    return Change(f"{one.flags} {other.flags}", f"{one.cost}; {other.cost}", one.values | other.values, place)
