"""The folder of a sweep: which of its runs is where, and which are to be done. Imports no torch."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from treetune.core import drafts
from treetune.core.run import compared, journal, runs
from treetune.core.run.lines import clock
from treetune.core.run.runs import PastRun

NAME, PAGE, FORMAT = "sweep.json", "sweep.html", 1
RUNS = Path("runs")
Values = Mapping[str, str]


class Sweep(NamedTuple):
    """The folder of a sweep, what all its runs share (a digest), and the values of each run by the name of its folder."""

    root: Path
    shared: str
    points: dict[str, dict[str, str]]

    def name_of(self, values: Values) -> str | None:
        """The folder of the run with these values."""
        return next((name for name, known in self.points.items() if known == dict(values)), None)


def digest(command: str, shared: Sequence[str], config: str | None) -> str:
    """A digest of what all runs share: the command, its arguments, and what its config file holds."""
    content = Path(config).read_bytes() if config is not None and Path(config).is_file() else b""
    return hashlib.sha256(json.dumps([command, *shared]).encode("utf-8", "backslashreplace") + content).hexdigest()


def begin(output_dir: str | None, shared: str, several: Sequence[Values]) -> Sweep:
    """The sweep in a folder, with a folder for each run; those that it has already keep theirs.

    Errors: ValueError for a folder that is none of a sweep, and for a sweep whose runs share something else.
    """
    root = Path(output_dir) if output_dir is not None else _next()
    old = _read(root)
    if old is not None and old.shared != shared:
        fix = "name another --output-dir, or give the options that it began with"
        raise ValueError(f"the sweep in {root} began with other options than these, or with another config file: {fix}")
    points = dict(old.points) if old is not None else {}
    sweep = Sweep(root, shared, points)
    for values in several:
        if sweep.name_of(values) is None:
            points[f"{len(points) + 1:03d}"] = dict(values)
    root.mkdir(parents=True, exist_ok=True)
    drafts.write(root / NAME, json.dumps({"made_by": "treetune", "format": FORMAT, "shared": shared, "runs": points}, indent=1) + "\n")
    return sweep


def _next() -> Path:
    """The next free runs/sweep-NNN, which this process makes."""
    RUNS.mkdir(exist_ok=True)
    number = 1
    while True:
        root = RUNS / f"sweep-{number:03d}"
        try:
            root.mkdir()
        except FileExistsError:
            number += 1
        else:
            return root


def _read(root: Path) -> Sweep | None:
    """The sweep of a folder; None where there is nothing yet."""
    if os.path.lexists(root) and not root.is_dir():
        raise ValueError(f"{root} is a file; expected a folder for a sweep")
    if not root.is_dir() or not any(root.iterdir()):
        return None
    try:
        values: Any = json.loads((root / NAME).read_text(encoding="utf-8"))
        points = {str(name): {str(key): str(text) for key, text in one.items()} for name, one in values["runs"].items()}
        return Sweep(root, str(values["shared"]), points)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{root} holds files and no sweep (no {NAME} that can be read): name another --output-dir") from error


def is_done(run: PastRun) -> bool:
    """Whether nothing of a run is left to do: it came to its end, or stopped by a rule of its own."""
    return run.state == journal.FINISHED or run.state == journal.STOPPED and run.reason != "interrupted"


def past(sweep: Sweep) -> dict[str, PastRun]:
    """The runs that have begun, by the name of their folder."""
    return {name: runs.read(sweep.root / name) for name in sweep.points if runs.is_run(sweep.root / name)}


def columns(sweep: Sweep) -> list[str]:
    """The names above a table of runs."""
    return ["run", *_options(sweep), "state", "best", "at step", "steps", "time"]


def _options(sweep: Sweep) -> list[str]:
    return list(dict.fromkeys(option for values in sweep.points.values() for option in values))


def rows(sweep: Sweep) -> list[list[str]]:
    """A row for each run, the best first, those without a value last."""
    past_runs, options = past(sweep), _options(sweep)
    out = []
    for name in sorted(sweep.points, key=lambda name: -past_runs[name].merit() if name in past_runs else float("inf")):
        chosen = [sweep.points[name].get(option, "-") for option in options]
        if name not in past_runs:
            out.append([name, *chosen, "not begun", "-", "-", "-", "-"])
            continue
        one, best = past_runs[name], past_runs[name].best()
        value = ("-", "-") if best is None else (f"{best.metric} {best.value:.4g}", str(best.step))
        out.append([name, *chosen, one.state, *value, f"{one.step}/{one.status.total_steps or '?'}", clock(one.seconds)])
    return out


def write_page(sweep: Sweep) -> Path:
    """Write sweep.html: the table, the options that differ, and the curves of the best runs."""
    several = sorted(past(sweep).items(), key=lambda item: -item[1].merit())
    swept = {option: [sweep.points[name].get(option, "-") for name, _ in several] for option in _options(sweep)}
    title = f"sweep {sweep.root.name.removeprefix('sweep').strip('-_')}".strip()
    compared.write(sweep.root / PAGE, [run for _, run in several], title=title, swept=swept)
    return sweep.root / PAGE
