"""What a tracker is given: the run, its options, its numbers. The standard library only, as the process of a tracker imports this."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol


class TrackedRun(NamedTuple):
    """The run that a tracker follows.

    id: of the run in the tracker; None where the tracker has yet to give one. key: of the run folder, which no other has. continued:
    whether the tracker knows the run already. name: of the run folder. folder: its path. step: the last one that the tracker may keep, -1
    for none. pid: the process that trains. config: option -> value, without secrets. about: what the run is, in words.
    """

    id: str | None
    key: str
    continued: bool
    name: str
    folder: str
    step: int
    pid: int
    config: dict[str, Any]
    about: dict[str, str]


class Answers(NamedTuple):
    """Answers to held-out prompts as a table. columns: their names. rows: numbers and texts, None where nothing is known."""

    columns: list[str]
    rows: list[list[str | int | None]]

    def markdown(self) -> str:
        """The table as Markdown."""
        head = f"| {' | '.join(self.columns)} |\n|{'---|' * len(self.columns)}"
        return "\n".join([head, *(f"| {' | '.join(map(_cell, row))} |" for row in self.rows)])


def _cell(value: str | int | None) -> str:
    text = "" if value is None else str(value)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("\r", "").replace("\n", "<br>")


class Tracker(Protocol):
    """A run that is open in a tracker. id: its name there. place: where it can be seen, or how it gets there, for people."""

    id: str
    place: str

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of a step, or of the evaluation at it, under the names of metrics.jsonl."""

    def answers(self, step: int, table: Answers) -> None:
        """The answers of the evaluation at a step, beside what they are compared with."""

    def facts(self, values: Mapping[str, str | float]) -> None:
        """What is known of the whole run, such as its best evaluation."""

    def copy(self, path: str, name: str) -> None:
        """A folder that the run has saved, to be kept by the tracker."""

    def finish(self, stopped: str | None) -> None:
        """The run has ended, and why if it was before the last step: write or send what is left."""


Open = Callable[..., Tracker]  # (run, **options)


def flat(values: Mapping[str, Any], longest: int = 6000) -> dict[str, str | float | bool]:
    """Options as trackers take them: lists and mappings as texts, and what is not set left out."""
    plain = {name: value for name, value in values.items() if value is not None and value != []}
    return {name: value if isinstance(value, bool | int | float) else _text(value)[:longest] for name, value in plain.items()}


def _text(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(one, str | int | float) for one in value):
        return " ".join(map(str, value))
    return str(value)


def ended_well(stopped: str | None) -> bool:
    """Whether a run ended as it should, or was asked to end before its last step."""
    return stopped is None or not re.match(r"failed|killed", stopped)
