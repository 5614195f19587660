"""What a person sees: a progress bar and lines on a terminal, plain lines elsewhere, nothing on ranks above 0."""

import _thread
import contextlib
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from treetune.cli import bar
from treetune.cli.bar import clock as clock
from treetune.core import masking, observe

try:
    import resource
except ImportError:  # Windows
    resource = None

PATIENCE_S = 10  # before a screen without a bar says what it waits for


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the allocator on CUDA, of the process on CPU (GiB); nan where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


class Screen:
    """The console of a run; `quiet` is for ranks above 0, `shown` are metrics to show besides the usual ones."""

    def __init__(self, *, quiet: bool = False, every: int = 1, shown: tuple[str, ...] = ()):
        self.shown = shown
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self.every, self.bar, self.live = every, None, None

    def line(self, text: str, style: str = "") -> None:
        """One line of plain text."""
        self.console.print(Text(masking.escape_controls(masking.mask_secrets(text))), style=style)

    @property
    def colours(self) -> bool:
        """Whether colours can be seen: on a terminal that has them, unless NO_COLOR says not to use them."""
        return self.console.color_system is not None and not self.console.no_color

    def text(self, text: Text | str) -> None:
        """A text of its own styles, or plain."""
        self.console.print(text if isinstance(text, Text) else Text(masking.escape_controls(text)))

    def stream(self, text: str) -> None:
        """A piece of a text that goes on."""
        self.console.print(Text(masking.escape_controls(text)), end="")

    def warn(self, text: str) -> None:
        """One line that should be noticed."""
        self.line(f"! {text}", "yellow")

    def table(self, title: str, rows: dict[str, str]) -> None:
        """Two columns of names and values."""
        table = Table(title=title, show_header=False, title_justify="left", box=None, pad_edge=False)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column()
        for name, value in rows.items():
            table.add_row(name, Text(masking.escape_controls(masking.mask_secrets(value))))
        self.console.print(table)

    @contextlib.contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int], None]]:
        """A counter on a terminal: yields a function that is told how many more are done."""
        if not self.console.is_terminal:
            yield lambda more: None
            return
        columns = [SpinnerColumn(), TextColumn("{task.completed:.0f}"), TextColumn(what), TimeElapsedColumn()]
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda more: bar.advance(task, more)

    def start(self, total: int, done: int) -> None:
        """Show the bar of a run of `total` steps, of which `done` are behind us."""
        self.total = total
        if self.console.is_terminal:
            self.bar = bar.Bar(total, done)
            self.live = self._drawn(self.bar, transient=False)
            self.live.start()

    def _drawn(self, what: Any, *, transient: bool) -> Live:
        return Live(what, console=self.console, refresh_per_second=8, transient=transient)

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """While something takes long: what it is and for how long, under the bar or alone; elsewhere a line after a while."""
        if self.console.quiet:
            yield
        elif not self.console.is_terminal:
            timer = threading.Timer(PATIENCE_S, self.line, (f"{what} ...",))
            timer.daemon = True
            timer.start()
            try:
                yield
            finally:
                timer.cancel()
        elif self.bar is not None:
            self.bar.activity = bar.Activity(what)
            try:
                yield
            finally:
                self.bar.activity = None
        else:
            self.live = self._drawn(bar.Activity(what), transient=True)
            try:
                with self.live:
                    yield
            finally:
                self.live = None

    def interrupt(self, text: str) -> None:
        """A warning from a signal handler, which may have come in the middle of a print."""
        if self.console.quiet:
            return
        if self.live is None:
            os.write(2, f"! {text}\n".encode())
        else:  # from a thread, which waits for the print to end; a bare one, since `threading` may be in the middle of something, too
            _thread.start_new_thread(self.warn, (text,))

    def step(self, record: dict, eta_s: float) -> None:
        """The metrics of one finished step; a loss around 0 of sampled completions would say nothing."""
        loss = [] if observe.sampled(record) else [f"loss {record['train/loss']:.4f}"]
        rates = [f"lr {record['learning_rate']:.1e}", f"{record['supervised_tokens_per_second']:.0f} tok/s"]
        items = [*loss, *self._own(record), f"grad {record['grad_norm']:.2f}", *rates]
        items += [] if math.isnan(record["memory_gib"]) else [f"{record['memory_gib']:.1f} GiB"]
        if self.bar is not None:
            self.bar.done, self.bar.eta_s, self.bar.items = record["step"], eta_s, items
        elif record["step"] % self.every == 0 or record["step"] == self.total:
            self.line("  ".join([f"step {record['step']:>4}/{self.total}", *items, f"eta {clock(eta_s)}"]))

    def wants(self, step: int) -> bool:
        """Whether what belongs to this step is worth lines."""
        return step % self.every == 0

    def own(self, record: dict, prefix: str = "") -> str:
        """The method's own numbers of a record, each followed by two spaces."""
        return "".join(f"{item}  " for item in self._own(record, prefix))

    def _own(self, record: dict, prefix: str = "") -> list[str]:
        return [f"{key.split('/')[-1]} {record[prefix + key]:.3f}" for key in self.shown if prefix + key in record]

    def stop(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.live.stop()
            self.bar = self.live = None
