"""Several runs side by side: rows of a table, the options that differ, and a page with their curves. Imports no torch."""

import time
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from treetune.core import drafts, masking
from treetune.core.run import curves, runs
from treetune.core.run.lines import clock
from treetune.core.run.runs import PastRun

COLUMNS = ("run", "state", "best", "at step", "steps", "time", "method", "model", "started")
DRAWN = 12  # runs whose curves are drawn on a page: more lines on one sheet tell nothing


def row(run: PastRun, name: str, metric: str | None = None) -> list[str]:
    """The cells of a run in a table of `COLUMNS`."""
    best, total = run.best(metric), run.status.total_steps
    steps = f"{run.step}/{total}" if total is not None else str(run.step)
    value = ("-", "-") if best is None else (f"{best.metric} {best.value:.4g}", str(best.step))
    started = "-" if run.status.started is None else time.strftime("%m-%d %H:%M", time.localtime(run.status.started))
    return [name, run.state, *value, steps, clock(run.seconds), run.method or "-", run.model or "-", started]


def reasons(several: Sequence[PastRun], names: Sequence[str]) -> dict[str, str]:
    """Why runs ended before their last step, by name."""
    return {name: run.reason for name, run in zip(names, several, strict=True) if run.reason and run.state != "running"}


def differences(several: Sequence[PastRun], shared: Container[str] | None = None) -> dict[str, list[str]]:
    """{option: what each run has} of the options that are not the same in all, for people. shared: the options to compare."""
    differing = runs.differences(several, shared)
    return {name: [masking.mask_secrets(runs.shown(one)) for one in values] for name, values in differing.items()}


def write(
    path: Path,
    several: Sequence[PastRun],
    *,
    title: str,
    metric: str | None = None,
    charts: bool = True,
    swept: Mapping[str, Sequence[str]] | None = None,
    shared: Container[str] | None = None,
) -> None:
    """Write a page about runs: their table, what differs, and with `charts` their curves, a colour for each run.

    swept: {option: its value in each run} of a sweep, which are columns of the table. shared: the options to compare.
    """
    from treetune.core.run import page  # what shows tokens imports torch, and a list on the terminal needs none of it

    names = runs.names(several)
    best = sorted(range(len(several)), key=lambda i: -several[i].merit(metric))[:DRAWN] if charts else []
    shown = [i for i in range(len(several)) if i in best]
    colours = {i: curves.colour(place) for place, i in enumerate(shown)}
    swept = swept or {}
    table = []
    for i, one in enumerate(several):
        name, *cells = row(one, names[i], metric)
        table.append((one.state, colours.get(i, ""), [name, *(column[i] for column in swept.values()), *cells]))
    values: dict[str, Any] = {"columns": [COLUMNS[0], *swept, *COLUMNS[1:]], "state_at": 1 + len(swept), "table": table, "names": names}
    values |= {"reasons": reasons(several, names), "damage": [text for one in several for text in one.damage]}
    values["differences"] = differences(several, shared) if charts and len(several) > 1 else {}
    values["charts"] = curves.compared({names[i]: several[i].history for i in shown}) if charts else []
    values["left_out"] = len(several) - len(shown)
    path.parent.mkdir(parents=True, exist_ok=True)
    drafts.write(path, page.render("runs.jinja", name=title, **values))
