"""What happens to a run beside its numbers: status.json (where it stands, how it ended, its health) and run.log (its lines, with times).

Both are read by `treetune runs` and `treetune doctor`, also when the process that wrote them is gone. Imports no torch.
"""

import contextlib
import json
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from treetune.core import drafts, durable, masking
from treetune.core.records import JsonRecord
from treetune.core.run.health import Event
from treetune.core.run.observers import Observer

STATUS, LOG = "status.json", "run.log"
RUNNING, SAVING, FINISHED, STOPPED, FAILED = "running", "saving", "finished", "stopped", "failed"
FAILURE = "failed"  # begins what `Observer.end` is told of a run that an error ended
LEVELS = DEBUG, INFO, WARNING, ERROR = "debug", "info", "warning", "error"


class Seen(NamedTuple):
    """A health rule that fired: after which step, and what it said."""

    step: int
    rule: str
    seen: str
    fix: str


class Status(NamedTuple):
    """status.json: where a run stands. started, ended: seconds since 1970. goal: the metric of evaluations that the best checkpoint has."""

    method: str = ""
    goal: str = "loss"
    state: str = RUNNING
    total_steps: int | None = None
    started: float | None = None
    ended: float | None = None
    reason: str = ""
    advice: tuple[str, ...] = ()
    health: tuple[Seen, ...] = ()


def read(root: Path) -> Status | None:
    """The status of a run folder; None where there is none that can be read, as of versions before."""
    try:
        values = json.loads((root / STATUS).read_text(encoding="utf-8"))
        health = tuple(Seen(**{name: one[name] for name in Seen._fields}) for one in values.get("health", ()))
        known = {name: value for name, value in values.items() if name in Status._fields}
        return Status(**known)._replace(health=health, advice=tuple(values.get("advice", ())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def write(root: Path, status: Status) -> None:
    """Write status.json in one piece."""
    values = status._asdict() | {"health": [one._asdict() for one in status.health]}
    drafts.write(root / STATUS, json.dumps(values, indent=1) + "\n")


class Journal(Observer):
    """status.json and run.log of a run. Lines that come before the folder is the run's are kept until it starts."""

    essential = silent = True

    def __init__(self, root: Path, *, method: str, goal: str, level: str = INFO):
        self.root, self.level = root, LEVELS.index(level)
        self.status = Status(method, goal)
        self.at = 0
        self.waiting: list[bytes] | None = []

    def start(self, total_steps: int, step: int, about: Mapping[str, str]) -> None:
        """The folder is the run's: write what has been said so far, and that it runs."""
        before = read(self.root) if step else None
        earlier = tuple(one for one in before.health if one.step <= step) if before is not None else ()
        started = before.started if before is not None and before.started is not None else time.time()
        self.status = self.status._replace(total_steps=total_steps, started=started, health=earlier)
        self.at, waiting, self.waiting = step, self.waiting or [], None
        for line in waiting:
            self._append(line)
        for name, text in about.items():
            self._line(INFO, f"{name}: {text}")
        self._write()

    def step(self, record: JsonRecord) -> None:
        """Keep the number of the step, and log its numbers for those who look for a fault."""
        self.at = int(record["step"])
        self.evaluation(record)

    def evaluation(self, record: JsonRecord) -> None:
        """Log its numbers for those who look for a fault."""
        self._line(DEBUG, "  ".join(f"{name} {value:.6g}" for name, value in record.items()))

    def debug(self, text: str) -> None:
        """Log a line for those who look for a fault."""
        self._line(DEBUG, text)

    def health(self, event: Event) -> None:
        """Keep what a health rule saw."""
        self.status = self.status._replace(health=(*self.status.health, Seen(self.at, *event)))
        self._line(WARNING, f"{event.seen}: {event.fix}")
        self._write()

    def message(self, text: str, *, warning: bool = False) -> None:
        """Log a line."""
        self._line(WARNING if warning else INFO, text)

    def activity(self, name: str | None) -> None:
        """Log what takes a while."""
        if name is not None:
            self._line(DEBUG, f"{name} ...")

    def end(self, stopped: str | None, history: Sequence[JsonRecord]) -> None:
        """Write how the steps ended; of an error, log where it arose."""
        failed = stopped is not None and stopped.startswith(FAILURE)
        reason = masking.one_line((stopped or "").removeprefix(FAILURE).removeprefix(": "))
        if failed and (error := sys.exc_info()[1]) is not None:
            reason = reason or type(error).__name__
            self._line(ERROR, f"{type(error).__name__}: {error}")
            self._line(ERROR, "".join(traceback.format_exception(error)))
        self.status = self.status._replace(state=FAILED if failed else SAVING, reason=reason, ended=time.time())
        self._write()

    def advise(self, lines: Sequence[str]) -> None:
        """Keep what to try where the run could not go on."""
        self.status = self.status._replace(advice=tuple(lines))
        self._write()

    def summary(self, rows: Mapping[str, str], history: Sequence[JsonRecord]) -> None:
        """Write that all is saved."""
        state = STOPPED if self.status.reason else FINISHED
        self.status = self.status._replace(state=state, ended=time.time())
        for name, text in rows.items():
            self._line(INFO, f"{name}: {text}")
        self._write()

    def _write(self) -> None:
        if self.waiting is None:
            with contextlib.suppress(OSError):  # a full disk is told where records or checkpoints are lost, not where words about them are
                write(self.root, self.status)

    def _line(self, level: str, text: str) -> None:
        """Log a text, each of its lines with the time and how serious it is, unless that is less than what is logged."""
        if LEVELS.index(level) < self.level:
            return
        clock = time.strftime("%Y-%m-%d %H:%M:%S")
        for part in masking.escape_controls(masking.mask_secrets(text)).splitlines():
            line = f"{clock} {level:7} {part}".encode("utf-8", "backslashreplace")
            if self.waiting is None:
                self._append(line)
            else:
                self.waiting.append(line)

    def _append(self, line: bytes) -> None:
        with contextlib.suppress(OSError):
            durable.append_line(self.root / LOG, line)


def log(root: Path, *levels: str) -> list[str]:
    """The lines of a run's log that are of these levels, all without any; without their times."""
    try:
        lines = (root / LOG).read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    parsed = [line[20:].partition(" ") for line in lines if len(line) > 28]
    return [text.lstrip() for level, _, text in parsed if not levels or level in levels]
