"""trackers.json of a run: under which name each tracker has it, and up to which step it has been told."""

import json
import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

from treetune.core import drafts

NAME = "trackers.json"
KINDS = ("step", "evaluation")


class Told(NamedTuple):
    """What a tracker knows of a run.

    id: its name there. destination: the account and project. step, evaluation, answers: the last ones; -1 for none.
    """

    id: str | None = None
    destination: str = ""
    step: int = -1
    evaluation: int = -1
    answers: int = -1


class Book:
    """The file, which the threads of several trackers write."""

    def __init__(self, root: Path):
        self.path, self.lock = root / NAME, threading.Lock()
        self.entries = _read(self.path)

    def read(self, tracker: str) -> Told:
        """What a tracker has been told."""
        return self.entries.get(tracker, Told())

    def write(self, tracker: str, told: Told) -> None:
        """Note what a tracker has been told, for a process that goes on from here."""
        with self.lock:
            self.entries[tracker] = told
            draft = drafts.name(self.path)
            # Not flushed to the disk at every step: a machine that loses its power tells a few steps twice.
            draft.write_text(json.dumps({name: entry._asdict() for name, entry in self.entries.items()}), encoding="utf-8")
            os.replace(draft, self.path)


def _read(path: Path) -> dict[str, Told]:
    """The entries; a damaged file has none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {name: _entry(entry) for name, entry in values.items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return {}


def _entry(values: dict[str, Any]) -> Told:
    tracker_id = None if values["id"] is None else str(values["id"])
    numbers = int(values["step"]), int(values["evaluation"]), int(values.get("answers", -1))
    return Told(tracker_id, str(values["destination"]), *numbers)
