"""Runs that are there: what each is, where it stands and what it reached, from the files of its folder. Imports no torch."""

import json
import math
import os
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from treetune.core import lock, records
from treetune.core.data import yamltext
from treetune.core.records import JsonRecord
from treetune.core.run import journal, marker

DEEPEST = 4  # folders below the one that is searched
CRASHED = "crashed"  # the process has ended and left no word
UNKNOWN = "?"  # the value of an option in a run whose config cannot be read
PLACES = ("output_dir", "resume", "overwrite")  # options that say where a run is, not what it is


class Best(NamedTuple):
    """The best value of a metric, and its step."""

    metric: str
    value: float
    step: int


class PastRun(NamedTuple):
    """A run as its folder tells.

    config: options by name; none where it cannot be read. state: running, finished, stopped, failed or crashed; reason: of the last
    three. damage: what of the folder cannot be read.
    """

    root: Path
    method: str
    config: dict[str, Any]
    history: list[JsonRecord]
    status: journal.Status
    state: str
    reason: str
    goal: str
    damage: tuple[str, ...] = ()

    @property
    def steps(self) -> list[JsonRecord]:
        """The records of steps."""
        return [record for record in self.history if "train/loss" in record]

    @property
    def step(self) -> int:
        """The last step that is recorded."""
        return max((int(record["step"]) for record in self.history), default=0)

    @property
    def seconds(self) -> float:
        """Time of steps and evaluations."""
        times = (record.get("step_seconds", 0.0) + record.get("eval/seconds", 0.0) for record in self.history)
        return sum(time for time in times if math.isfinite(time))

    @property
    def model(self) -> str:
        """The name of the model that the run started from, without the folders before it."""
        return Path(str(self.config.get("model") or self.config.get("from_config") or "")).name

    def series(self, metric: str) -> list[tuple[float, float]]:
        """(step, value) of a metric, in order."""
        return [(record["step"], record[metric]) for record in self.history if metric in record]

    def best(self, metric: str | None = None) -> Best | None:
        """The best value of a metric; of the one that its best checkpoint follows, if none is named, else of the training loss."""
        names = [metric] if metric is not None else [f"eval/{self.goal}", self.goal, "train/loss"]
        for name in names:
            points = [(step, value) for step, value in self.series(name) if math.isfinite(value)]
            if points:
                step, value = (min if falls(name) else max)(points, key=lambda point: point[1])
                return Best(name, value, int(step))
        return None

    def merit(self, metric: str | None = None) -> float:
        """How good the best value is: more is better; -inf where there is none."""
        best = self.best(metric)
        return -math.inf if best is None else -best.value if falls(best.metric) else best.value


def falls(metric: str) -> bool:
    """Whether less of a metric is better: losses, distances, lengths of gradients."""
    return metric.endswith(("loss", "perplexity", "nll", "kl", "grad_norm", "step_seconds", "memory_gib"))


def is_run(root: Path) -> bool:
    """Whether a folder is that of a run, of any version."""
    try:
        return root.is_dir() and (marker.marked(root) or marker.read(root) is not None)
    except (ValueError, OSError):
        return True  # of a later version


def find(folder: Path) -> Iterator[Path]:
    """The runs in a folder, itself or below it, in order of their names; links to folders are not followed."""
    yield from _below(folder, DEEPEST)


def _below(folder: Path, depth: int) -> Iterator[Path]:
    if is_run(folder):
        yield folder
    elif depth:
        with os.scandir(folder) as entries:
            inner = sorted(one.name for one in entries if one.is_dir(follow_symlinks=False) and not one.name.startswith("."))
        for name in inner:
            yield from _below(folder / name, depth - 1)


def read(root: Path) -> PastRun:
    """The run of a folder. Errors: ValueError where it is none."""
    if not is_run(root):
        raise ValueError(f"{root} is no run: {'it has no ' + marker.NAME if root.is_dir() else 'there is no such folder'}")
    metrics = records.read(root / "metrics.jsonl", numbers=True)
    status, goal = journal.read(root), _goal(root)
    state, reason = _state(root, status)
    unread = status is None and (root / journal.STATUS).exists()
    numbered = re.fullmatch(r"([a-z_]+)-\d{3,}", root.name)
    status = status or journal.Status(numbered[1] if numbered else "", goal or "loss")
    options, damage = config(root)
    damage += [f"{root / journal.STATUS} holds no status"] if unread else []
    damage += [records.describe(root / "metrics.jsonl", metrics.broken)] if metrics.broken else []
    return PastRun(root, status.method, options, metrics.records, status, state, reason, goal or status.goal, tuple(damage))


def config(root: Path) -> tuple[dict[str, Any], list[str]]:
    """The options in the config.yaml of a run, and what is wrong with it: then there are none."""
    try:
        return {name: _plain(value) for name, value in yamltext.load(str(root / "config.yaml")).items()}, []
    except (OSError, ValueError) as error:
        return {}, [f"{error}: its options are not known"]


def _plain(written: yamltext.Written) -> Any:
    """A value of a config as Python has it."""
    value = written.value
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if written.plain and isinstance(value, str) and yamltext.NUMBER.fullmatch(value):
        return float(value)  # 1e-4, which YAML takes for a text
    return written.text if isinstance(value, yamltext.Reading) else value


def _goal(root: Path) -> str:
    """The metric that best.json names."""
    try:
        names = json.loads((root / "best.json").read_bytes())
        return next((name.removeprefix("eval_") for name in names if name.startswith("eval_")), "")
    except (OSError, ValueError, TypeError, RecursionError):
        return ""


def _state(root: Path, status: journal.Status | None) -> tuple[str, str]:
    """Where a run stands, and why it ended."""
    try:
        lock.check(root)
    except lock.Busy as error:
        return journal.RUNNING, str(error).partition(": ")[0]
    if status is None:  # of a version before
        saved = any((root / name).is_dir() for name in marker.RESULTS)
        return (journal.FINISHED, "") if saved else (CRASHED, "")
    if status.state in (journal.RUNNING, journal.SAVING):
        what = "while it saved what was trained" if status.state == journal.SAVING else "between two steps"
        return CRASHED, f"its process ended {what}, without a word"
    return status.state, status.reason


def differences(runs: Sequence[PastRun], shared: Container[str] | None = None) -> dict[str, list[Any]]:
    """{option: its value in each run} of the options that are not the same in all runs of which they are known; UNKNOWN in others.

    shared: the options to compare, as of runs of several methods those that all have; a config leaves out what is not given.
    """
    given = dict.fromkeys(name for run in runs for name in run.config if name not in PLACES)
    names = [name for name in given if shared is None or name in shared]
    values: dict[str, list[Any]] = {"method": [run.method or UNKNOWN for run in runs]}
    values |= {name: [run.config.get(name) if run.config else UNKNOWN for run in runs] for name in names}
    return {name: several for name, several in values.items() if len(_distinct(several)) > 1}


def _distinct(values: Sequence[Any]) -> list[Any]:
    """The known values, each once; lists among them have no hash."""
    known = [value for value in values if value != UNKNOWN]
    return [value for i, value in enumerate(known) if value not in known[:i]]


def names(runs: Sequence[PastRun]) -> list[str]:
    """A short name for each run: of its folder, or the path where two would have the same."""
    short = [run.root.resolve().name for run in runs]
    return [name if short.count(name) == 1 else str(run.root) for name, run in zip(short, runs, strict=True)]


def shown(value: Any) -> str:
    """The value of an option, for people."""
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {shown(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return " ".join(shown(one) for one in value) or "-"
    return f"{value:g}" if isinstance(value, float) else str(value)
