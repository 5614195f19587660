"""What would make a run fit: changes of its options, alone or two at a time, the fastest first."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from treetune.cli import memory_ladder, requirements
from treetune.cli.planning import estimate
from treetune.cli.planning.estimate import Estimate, Place, Run
from treetune.core.config import table
from treetune.models import memory, tensor_rules

SHOWN = 3
RANKS, SPLITS = (2, 4, 8), (2, 4)  # devices, and of these so many for each layer
TRIED = 8  # changes that are counted, of those that formulas say would fit
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
    real = estimate.estimate(run, estimate.counted(run, place), place).peak
    out = []
    guesses = [(real * _formula(changed(run, one.values), one.place) / base, one) for one in changes]
    for _, one in [pair for pair in guesses if pair[0] < NEAR * room][:TRIED]:
        other = changed(run, one.values)
        planned = estimate.estimate(other, estimate.counted(other, one.place), one.place)
        if planned.peak <= TIGHT * room:
            out.append(Advice(one, planned))
    return out


def _formula(run: Run, place: Place) -> float:
    """The peak by the formulas of `models.memory`, of a share of what is held where it is shared."""
    model, setup = run.shapes(place.device), estimate.setup(run, place)
    optimizer = run.config.optim.optimizer
    setup = setup._replace(state_bytes=memory_ladder.state_bytes(optimizer), paged=optimizer.startswith("paged_"))
    of_run = memory.table(model.abstract, model.cfg, setup)
    rest = of_run.peak - of_run.held
    # Each rank computes its part of a layer, or of the tokens.
    return max(1.0, of_run.held / place.shares + rest / place.tensor / place.context)


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
    if place.ranks > 1:
        yield from _meshes(run, place)  # of the devices that are there
    for flags, cost, new in memory_ladder.changes(values, device):
        yield Change(flags, cost, new, place)
    if place.ranks == 1 and place.device.gpu:
        yield from _meshes(run, place)


def _meshes(run: Run, place: Place) -> Iterator[Change]:
    """Other meshes: weights split along `data`, layers along `tensor`, or both; of as many devices, and of more."""
    for ranks in dict.fromkeys(max(ranks, place.ranks) for ranks in RANKS):
        whole = Place(place.device, ranks, "full")
        yield from _mesh(run, place, whole, "--sharding full", "each holds a part of what trains")
        for tensor in (size for size in SPLITS if ranks % size == 0):
            split = Place(place.device, ranks, "full" if tensor < ranks else "none", tensor=tensor)
            shard = f"--shard tensor={tensor}" + f",data={split.parts}" * (split.parts > 1)
            yield from _mesh(run, place, split, shard, f"each computes 1/{tensor} of a layer of the same rows")


def _mesh(run: Run, place: Place, other: Place, flags: str, cost: str) -> Iterator[Change]:
    """A change to another mesh, where the run and its model go with it."""
    nodes = run.config.run.nnodes
    start = {"nproc": other.ranks // nodes, "sharding": other.sharding, "shard": (flags.removeprefix("--shard "),)}
    if other.tensor == 1:
        start |= {"shard": ()}
    if other.ranks % nodes or other.shares <= place.shares or (other.tensor > 1 and tensor_rules.refusal(run.cfg, other.tensor)):
        return
    with contextlib.suppress(ValueError):
        requirements.check(changed(run, start).config, run.method, frozenset())
        yield Change(f"--nproc {other.ranks // nodes} {flags}", cost, {}, other)


def _both(one: Change, other: Change) -> Change | None:
    """Two changes as one; None where they are of the same option."""
    if one.values.keys() & other.values.keys() or (one.place != other.place and not (one.values or other.values)):
        return None
    place = one.place if not one.values else other.place
    return Change(f"{one.flags} {other.flags}", f"{one.cost}; {other.cost}", one.values | other.values, place)
