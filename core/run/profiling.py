"""A profile of some steps of a run: where their time and their memory go. Files of the run folder, for a browser and for reading."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch.profiler import ProfilerActivity, profile

from treetune.core import drafts
from treetune.core.run.source import Source
from treetune.core.state import TrainState

TRACE, TABLE, MEMORY = "profile_trace.json", "profile_ops.txt", "profile_memory.pickle"
ROWS = 40  # of the table
ALLOCATIONS = 200_000  # that the snapshot of CUDA's memory keeps


class Span(NamedTuple):
    """The first and the last step of a profile."""

    first: int
    last: int


def span(steps: Sequence[int], start: int) -> Span | None:
    """What the options mean: one number is how many steps after `start`, several are steps, of which the lowest and the highest count."""
    if not steps:
        return None
    return Span(start + 1, start + steps[0]) if len(steps) == 1 else Span(min(steps), max(steps))


class Watched:
    """A source that says before(index) ahead of each step, and after(index, seconds) how long it took to give it; else the one inside."""

    def __init__(self, source: Source, before: Callable[[int], None], after: Callable[[int, float], None] = lambda index, seconds: None):
        self.source, self._before, self._after = source, before, after

    def next(self, state: TrainState, index: int) -> tuple[list[Any], dict[str, Any]]:
        """The micro-batches of a step and metrics about them."""
        self._before(index)
        start = time.perf_counter()
        step_batch = self.source.next(state, index)
        self._after(index, time.perf_counter() - start)
        return cast(Any, step_batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


class Profile:
    """The profile of all that happens from the first step of a span to the end of its last; has a lifetime: it runs, or not."""

    def __init__(self, root: Path, steps: Span, device: torch.device, say: Callable[[str], None]):
        self.root, self.steps, self.device, self.say = root, steps, device, say
        self.running: profile | None = None
        self.begun, self.seen = 0.0, steps.first

    def before(self, index: int) -> None:
        """A step begins: start or end the profile if it is time."""
        if self.running is not None and index > self.steps.last:
            self.end()
        elif self.running is None and index == self.steps.first:
            self._start()
        self.seen = index

    def _start(self) -> None:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS)
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        self.running, self.begun = profile(activities=kinds, profile_memory=True), time.perf_counter()
        self.running.__enter__()

    def end(self) -> None:
        """Write what there is, of a run that ended earlier, too."""
        running, self.running = self.running, None
        if running is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - self.begun
        running.__exit__(None, None, None)
        _write(self.root / TRACE, lambda path: running.export_chrome_trace(str(path)))
        steps = f"steps {self.steps.first} to {min(self.steps.last, self.seen)}"
        drafts.write(self.root / TABLE, f"{steps} on {self.device.type}: {seconds:.3f} s\n\n{self._table(running)}\n")
        names = [TRACE, TABLE]
        if self.device.type == "cuda":
            _write(self.root / MEMORY, lambda path: torch.cuda.memory._dump_snapshot(str(path)))
            torch.cuda.memory._record_memory_history(enabled=None)
            names.append(MEMORY)
        self.say(f"profile of {steps}: {', '.join(names)} in {self.root}")

    def _table(self, running: profile) -> str:
        """The operations that took the most time, and those that took the most memory."""
        place = "cuda" if self.device.type == "cuda" else "cpu"
        averages = running.key_averages()
        by_time, by_memory = (averages.table(sort_by=f"self_{place}_{what}", row_limit=ROWS) for what in ("time_total", "memory_usage"))
        return f"by time\n{by_time}\n\nby memory\n{by_memory}"


def _write(path: Path, save: Callable[[Path], object]) -> None:
    """Write a file under a draft's name, and rename it when it is whole."""
    draft = drafts.name(path)
    try:
        save(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
