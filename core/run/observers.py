"""Observers of a run: what is told of its steps, evaluations, samples and health, and what its files and its screen are made of.

A tracker is an observer: a subclass of `Observer` with the methods that it wants, or a function `track(event, record)`.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

from treetune.core import records
from treetune.core.records import JsonRecord as Record
from treetune.core.run.health import Event

LOG = logging.getLogger("treetune")


class Observer(Protocol):
    """What is told of a run; a method that a subclass leaves out does nothing. Only the first rank has observers.

    essential: an error in it ends the run, as in the files of a run; after an error in any other the run goes on without that one.
    silent: it takes lines and shows them to nobody.
    """

    essential: bool = False
    silent: bool = False

    def start(self, total_steps: int, step: int, about: Mapping[str, str]) -> None:
        """The run begins, or goes on after `step`. about: model, data, step size and so on, in words."""

    def step(self, record: Record) -> None:
        """The numbers of a finished step, one step late: the keys are those of metrics.jsonl."""

    def evaluation(self, record: Record) -> None:
        """The numbers of an evaluation, each with the prefix eval/."""

    def samples(self, answers: Sequence[dict[str, Any]]) -> None:
        """Answers of the policy: to the sample prompt, or the completions of one prompt with their rewards. Keys as in samples.jsonl."""

    def health(self, event: Event) -> None:
        """A health rule fired, for the first time in this run."""

    def saved(self, path: Path, step: int | None) -> None:
        """A folder is written and whole: the checkpoint of a step, or what was trained (None)."""

    def message(self, text: str, *, warning: bool = False) -> None:
        """A line for people."""

    def debug(self, text: str) -> None:
        """A line for those who look for a fault."""

    def activity(self, name: str | None) -> None:
        """Something that takes a while begins; None: it has ended."""

    def end(self, stopped: str | None, history: Sequence[Record]) -> None:
        """The steps have ended. stopped: the reason where it was before the last step, an error among them."""

    def summary(self, rows: Mapping[str, str], history: Sequence[Record]) -> None:
        """What was trained is saved: where it is, what it reached and how to try it, in words."""


class MetricsFile(Observer):
    """metrics.jsonl: one JSON object for each step and each evaluation."""

    essential = True

    def __init__(self, path: Path):
        self.path = path

    def step(self, record: Record) -> None:
        """Append the record."""
        records.append(self.path, record)

    def evaluation(self, record: Record) -> None:
        """Append the record."""
        records.append(self.path, record)


class SamplesFile(Observer):
    """samples.jsonl: one JSON object for each sampled answer; completions with rewards only where asked for."""

    essential = True

    def __init__(self, path: Path, *, completions: bool = True):
        self.path, self.completions = path, completions

    def samples(self, answers: Sequence[dict[str, Any]]) -> None:
        """Append the answers."""
        for answer in answers:
            if self.completions or "rewards" not in answer:
                records.append(self.path, answer)


Track = Callable[[str, dict[str, Any]], object]  # (event, record)


class Function(Observer):
    """A function track(event, record) as an observer: event is start, step, evaluation, samples, health, end or summary."""

    def __init__(self, track: Track):
        self.track = track

    def start(self, total_steps: int, step: int, about: Mapping[str, str]) -> None:
        """track("start", {total_steps, step, about})."""
        self.track("start", {"total_steps": total_steps, "step": step, "about": dict(about)})

    def step(self, record: Record) -> None:
        """track("step", record)."""
        self.track("step", record)

    def evaluation(self, record: Record) -> None:
        """track("evaluation", record)."""
        self.track("evaluation", record)

    def samples(self, answers: Sequence[dict[str, Any]]) -> None:
        """track("samples", answer), one by one."""
        for answer in answers:
            self.track("samples", answer)

    def health(self, event: Event) -> None:
        """track("health", {rule, seen, fix})."""
        self.track("health", event._asdict())

    def end(self, stopped: str | None, history: Sequence[Record]) -> None:
        """track("end", {stopped})."""
        self.track("end", {"stopped": stopped})

    def summary(self, rows: Mapping[str, str], history: Sequence[Record]) -> None:
        """track("summary", rows)."""
        self.track("summary", dict(rows))


class Guarded(Observer):
    """A user's observer: where it fails, the run goes on without it, and `warn` is told once."""

    def __init__(self, observer: Observer, name: str, warn: Callable[[str], None]):
        self.observer, self.name, self.warn, self.failed = observer, name, warn, False

    def tell(self, event: str, *values: Any, **named: Any) -> None:
        """Call a method of the observer, unless it has failed before."""
        method = getattr(self.observer, event, None)
        if self.failed or method is None:
            return
        try:
            method(*map(_copy, values), **named)
        # A tracker talks to networks and disks of its own, whose errors nobody can list, and some packages leave with SystemExit; hours of
        # training must not end with them.
        except (Exception, SystemExit) as error:
            self.failed = True
            reason = " ".join(str(error).split())
            self.warn(f"observer {self.name} failed at {event} ({type(error).__name__}: {reason}); the run goes on without it")


def _takes_lines(one: Observer | Guarded) -> bool:
    observer = one.observer if isinstance(one, Guarded) else one
    return not getattr(observer, "silent", False) and getattr(type(observer), "message", Observer.message) is not Observer.message


def _copy(value: Any) -> Any:
    """A record, or a list of records, that a user's observer may change without others seeing it."""
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return [_copy(one) for one in value]
    return dict(value) if isinstance(value, Mapping) else value


class Observers(Observer):
    """Several observers as one, in order. A user's (`Guarded`) cannot end the run; the files of the run can, where the disk is full."""

    def __init__(self, observers: Sequence[Observer | Guarded] = ()):
        self.observers = tuple(observers)

    def add(self, *observers: Observer) -> None:
        """Put observers before the others: the files of a run have a record before anybody acts on it."""
        self.observers = (*observers, *self.observers)

    def append(self, *observers: Observer | Guarded) -> None:
        """Put observers behind the others."""
        self.observers = (*self.observers, *observers)

    def tell(self, event: str, *values: Any, **named: Any) -> None:
        """Call a method of each observer that has it."""
        for observer in self.observers:
            if isinstance(observer, Guarded | Observers):
                observer.tell(event, *values, **named)
            elif (method := getattr(observer, event, None)) is not None:
                method(*values, **named)

    def start(self, total_steps: int, step: int, about: Mapping[str, str]) -> None:
        """Tell all that the run begins."""
        self.tell("start", total_steps, step, about)

    def step(self, record: Record) -> None:
        """Tell all of a step."""
        self.tell("step", record)

    def evaluation(self, record: Record) -> None:
        """Tell all of an evaluation."""
        self.tell("evaluation", record)

    def samples(self, answers: Sequence[dict[str, Any]]) -> None:
        """Tell all of answers."""
        self.tell("samples", answers)

    def health(self, event: Event) -> None:
        """Tell all of a health rule."""
        self.tell("health", event)

    def saved(self, path: Path, step: int | None) -> None:
        """Tell all of a folder that is written."""
        self.tell("saved", path, step)

    def message(self, text: str, *, warning: bool = False) -> None:
        """Tell all a line."""
        self.tell("message", text, warning=warning)

    def warn(self, text: str) -> None:
        """Tell all a line that should be noticed; of a run whose observers take no lines it goes to `logging`."""
        self.tell("message", text, warning=True)
        if self.observers and not any(map(_takes_lines, self.observers)):
            LOG.warning(text)

    def debug(self, text: str) -> None:
        """Tell all a line for those who look for a fault."""
        self.tell("debug", text)

    def activity(self, name: str | None) -> None:
        """Tell all what takes a while."""
        self.tell("activity", name)

    @contextmanager
    def busy(self, name: str) -> Iterator[None]:
        """Inside, something takes a while."""
        self.tell("activity", name)
        try:
            yield
        finally:
            self.tell("activity", None)

    def end(self, stopped: str | None, history: Sequence[Record]) -> None:
        """Tell all that the steps have ended."""
        self.tell("end", stopped, history)

    def summary(self, rows: Mapping[str, str], history: Sequence[Record]) -> None:
        """Tell all what was saved."""
        self.tell("summary", rows, history)


def of(value: Any, name: str, warn: Callable[[str], None]) -> Observer | Guarded:
    """An observer from an object with some of the methods, a class of such objects, or a function track(event, record).

    Errors: ValueError for anything else.
    """
    events = ("start", "step", "evaluation", "samples", "health", "saved", "message", "activity", "end", "summary")
    if isinstance(value, type) or isinstance(value, partial) and isinstance(value.func, type):
        value = _instance(value, name)
    if getattr(value, "essential", False):
        return cast(Observer, value)
    if any(callable(getattr(value, event, None)) for event in events):
        return Guarded(cast(Observer, value), name, warn)
    if not callable(value):
        raise ValueError(f"observer {name} is {value!r:.60}; expected a function track(event, record), or an object with one of {events}")
    return Guarded(Function(value), name, warn)


def _instance(kind: Callable[[], Any], name: str) -> Any:
    try:
        return kind()
    # The constructor of a tracker may log in to a service, and raises errors of its own.
    except Exception as error:
        raise ValueError(f"observer {name} cannot be made: {type(error).__name__}: {error}") from error
