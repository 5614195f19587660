"""`treetune runs`: which runs there are, what one of them shows, and how several compare. Imports no torch."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from treetune.cli.methods import METHODS
from treetune.cli.options.commands import Runs
from treetune.cli.screen import Screen
from treetune.core.config import table
from treetune.core.run import compared, curves, journal, runs, sparks
from treetune.core.run.errors import checking_input
from treetune.core.run.lines import clock
from treetune.core.run.runs import PastRun

GIVEN = ("learning_rate", "memory_gib", "supervised_tokens_per_second")  # metrics that nobody wants the best of
NARROW, WIDE = 16, 60  # columns of a curve


def run(config: Runs, given: frozenset[str]) -> int:
    """Print, and write the page; the exit code."""
    screen = Screen()
    with checking_input():
        named = all(runs.is_run(Path(path)) for path in config.paths)
        past_runs = _sorted([runs.read(root) for path in config.paths for root in _found(Path(path))], config)
        if config.metric is not None and not any(config.metric in record for one in past_runs for record in one.history):
            raise ValueError(f"no run has the metric {config.metric}; names are those of metrics.jsonl{_having(past_runs)}")
    if not past_runs:
        screen.line(f"no runs in {' '.join(config.paths)}")
    elif named and len(past_runs) == 1:
        _show(past_runs[0], screen, config.metric)
    else:
        _list(past_runs, screen, config.metric)
        if named:
            _compare(past_runs, screen, _shared(past_runs))
    if config.html and past_runs:
        title = past_runs[0].root.name if len(past_runs) == 1 else f"{len(past_runs)} runs"
        charts = named or len(past_runs) <= compared.DRAWN
        compared.write(Path(config.html), past_runs, title=title, metric=config.metric, charts=charts, shared=_shared(past_runs))
        screen.line(f"wrote {config.html}")
    return 0


def _found(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}; name run folders, or a folder of runs")
    return runs.find(path)


def _having(past_runs: Sequence[PastRun]) -> str:
    names = dict.fromkeys(name for one in past_runs for name in curves.metrics(one.history))
    return f": {', '.join(list(names)[:8])}" if names else ""


def _sorted(past_runs: list[PastRun], config: Runs) -> list[PastRun]:
    """The runs in the order that is asked for."""
    if config.sort == "started":
        return sorted(past_runs, key=lambda one: one.status.started or 0.0)
    if config.sort == "best":
        return sorted(past_runs, key=lambda one: one.merit(config.metric))
    return past_runs


def _list(past_runs: Sequence[PastRun], screen: Screen, metric: str | None) -> None:
    names = runs.names(past_runs)
    screen.grid(compared.COLUMNS, [compared.row(one, name, metric) for one, name in zip(past_runs, names, strict=True)])
    for name, reason in compared.reasons(past_runs, names).items():
        screen.line(f"  {name}: {reason}")
    for text in (text for one in past_runs for text in one.damage):
        screen.warn(text)


def _show(one: PastRun, screen: Screen, metric: str | None) -> None:
    """What a run is, and a line with the curve of each of its metrics."""
    best, total = one.best(metric), one.status.total_steps
    rows = {"run": str(one.root), "method": one.method, "model": runs.shown(one.config.get("model"))}
    rows["state"] = one.state + (f": {one.reason}" if one.reason else "")
    rows["steps"] = f"{one.step}{'' if total is None else f' of {total}'} in {clock(one.seconds)}"
    rows |= {} if best is None else {"best": f"{best.metric} {best.value:.4g} at step {best.step}"}
    screen.table("", {name: text for name, text in rows.items() if text})
    if metrics := curves.metrics(one.history):
        screen.grid(("metric", "curve", "first", "last", "lowest", "highest"), [_curve(one, name, screen) for name in metrics])
    else:
        screen.line("no step is recorded yet" if one.state == journal.RUNNING else "no step is recorded")
    for event in one.status.health:
        screen.warn(f"step {event.step}: {event.seen}: {event.fix}")
    for text in one.damage:
        screen.warn(text)


def _room(screen: Screen, taken: int) -> int:
    """Columns that are left for a curve."""
    return min(max(screen.width - taken, NARROW), WIDE)


def _curve(one: PastRun, metric: str, screen: Screen) -> list[str]:
    points = one.series(metric)
    finite = [value for _, value in points if math.isfinite(value)]
    inside = sparks.frame(points)
    if inside is not None:  # all curves of a run have one axis of steps
        inside = inside._replace(first=one.history[0]["step"], last=max(one.step, one.history[0]["step"] + 1))
    drawn = sparks.draw(points, _room(screen, 74), inside=inside, plain=not screen.blocks)
    return [metric, drawn, *(f"{value:.4g}" for value in (points[0][1], points[-1][1], min(finite), max(finite)))]


def _shared(past_runs: Sequence[PastRun]) -> set[str] | None:
    """The options that all methods among these runs have; None where it is one method, or none that is known."""
    several = {one.method for one in past_runs} & METHODS.keys()
    return set.intersection(*(set(table.options(METHODS[name].config)) for name in several)) if len(several) > 1 else None


def _compare(past_runs: Sequence[PastRun], screen: Screen, shared: set[str] | None) -> None:
    """The options that differ, and the curves of each metric one above the other, in one frame."""
    names = runs.names(past_runs)
    screen.line("\noptions that differ", "bold")
    differing = compared.differences(past_runs, shared)
    if differing:
        screen.grid(("option", *names), [[option, *values] for option, values in differing.items()])
    else:
        screen.line("none")
    screen.line("\ncurves", "bold")
    metrics = dict.fromkeys(name for one in past_runs for name in curves.metrics(one.history))
    rows = [row for metric in metrics for row in _curves(metric, past_runs, names, screen)]
    if rows:
        screen.grid(("metric", "run", "curve", "first", "last", "best"), rows)
    else:
        screen.line("no step is recorded")


def _curves(metric: str, past_runs: Sequence[PastRun], names: Sequence[str], screen: Screen) -> Iterator[list[str]]:
    series = [one.series(metric) if metric in curves.metrics(one.history) else [] for one in past_runs]
    inside, room = sparks.frame(*series), _room(screen, 66 + max(map(len, names)))
    label = metric
    for one, name, points in zip(past_runs, names, series, strict=True):
        best = one.best(metric)
        if best is not None and points:
            drawn = sparks.draw(points, room, inside=inside, plain=not screen.blocks)
            ends = [f"{value:.4g}" for value in (points[0][1], points[-1][1])]
            yield [label, name, drawn, *ends, "" if metric in GIVEN else f"{best.value:.4g} at {best.step}"]
            label = ""
