"""The console of a command: a progress bar and lines on a terminal, plain lines elsewhere, nothing on ranks above 0."""

import _thread
import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from treetune.cli import bar, counter
from treetune.core import masking
from treetune.core.records import JsonRecord as Record
from treetune.core.run import health, lines
from treetune.core.run.observers import Observer

if TYPE_CHECKING:
    from treetune.core.data import passages

PASTED = ("continue with", "try it")  # rows of a summary that are commands
PLAIN = lines.Metrics()
STYLES = {"on": "black on green", "bad": "black on red", "half": "black on yellow", "off": "dim"}  # by label of a piece
UNFOLDED = 1000  # columns of a file or a pipe: its lines are searched, so no cell of a table is folded
PATIENCE_S = 10  # before a screen without a bar says what it waits for


class Screen(Observer):
    """The console of a command, and the observer of a run.

    quiet: for ranks above 0. every: steps between plain lines. level: debug, info, or warning and error, which leave out what is below.
    """

    essential = True

    def __init__(self, *, quiet: bool = False, every: int = 1, metrics: lines.Metrics = PLAIN, level: str = "info"):
        self.metrics, self.level = metrics, level
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        if not self.console.is_terminal and "COLUMNS" not in os.environ:
            self.console.width = UNFOLDED
        self.every = every
        self.bar: bar.Bar | None = None
        self.live: Live | None = None
        self.total, self.first, self.seconds, self.printed = 0, 0, 0.0, 0
        self.activities: list[contextlib.ExitStack] = []

    def line(self, text: str, style: str = "") -> None:
        """Print one line of plain text."""
        self.console.print(Text(masking.escape_controls(masking.mask_secrets(text))), style=style)

    @property
    def colours(self) -> bool:
        """Whether colours can be seen: on a terminal that has them, unless NO_COLOR says not to use them."""
        return self.console.color_system is not None and not self.console.no_color

    def passage(self, pieces: "passages.Pieces") -> None:
        """Print the pieces of a passage: in colours, or with marks where there are none."""
        from treetune.core.data import passages  # imports torch

        styled = ((masking.escape_controls("".join(texts)), STYLES[label]) for label, texts in passages.join_runs(pieces))
        self.console.print(Text.assemble(*styled) if self.colours else Text(masking.escape_controls(passages.mark(pieces))))

    def stream(self, text: str) -> None:
        """Print a piece of a text that goes on."""
        self.console.print(Text(masking.escape_controls(text)), end="")

    def warn(self, text: str) -> None:
        """Print a warning in one line."""
        self.line(f"! {text}", "yellow")

    def table(self, title: str, rows: Mapping[str, str]) -> None:
        """Print two columns of names and values."""
        table = Table(title=title, show_header=False, title_justify="left", box=None, pad_edge=False)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column()
        for name, value in rows.items():
            table.add_row(name, Text(masking.escape_controls(masking.mask_secrets(value))))
        self.console.print(table)

    def grid(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table with a line of names above; what is long wraps inside its column."""
        table = Table(box=None, pad_edge=False, header_style="cyan")
        for name in columns:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*(Text(masking.escape_controls(masking.mask_secrets(cell))) for cell in row))
        self.console.print(table, soft_wrap=False)

    @property
    def talks(self) -> bool:
        """Whether more than warnings and errors of a run are shown."""
        return self.level in ("debug", "info")

    @property
    def width(self) -> int:
        """Columns of the terminal."""
        return self.console.width

    @property
    def blocks(self) -> bool:
        """Whether the terminal can show characters beyond ASCII."""
        return not self.console.options.ascii_only

    def counting(self, unit: str) -> contextlib.AbstractContextManager[counter.Count]:
        """A counter while it lasts; yields the function to call with how many more are done."""
        if self.console.is_terminal:
            return counter.on_terminal(self.console, unit)
        return contextlib.nullcontext(counter.by_lines(self.line, unit))

    def start(self, total_steps: int, step: int, about: Mapping[str, str]) -> None:
        """Show the bar of a run of `total_steps` steps, of which `step` are done."""
        self.total, self.first, self.seconds = total_steps, step, 0.0
        if about and self.talks:
            self.table("", about)
        if self.console.is_terminal and self.talks:
            self.bar = bar.Bar(total_steps, step)
            self.live = self._draw(self.bar, transient=False)
            self.live.start()

    def _draw(self, renderable: bar.Bar | bar.Activity, *, transient: bool) -> Live:
        return Live(renderable, console=self.console, refresh_per_second=8, transient=transient)

    @contextlib.contextmanager
    def busy(self, activity: str) -> Iterator[None]:
        """Show an activity and its time while it lasts, under the bar or alone; without a terminal, a line if it takes long."""
        if self.console.quiet or not self.talks:
            yield
        elif not self.console.is_terminal:
            timer = threading.Timer(PATIENCE_S, self.line, (f"{activity} ...",))
            timer.daemon = True
            timer.start()
            try:
                yield
            finally:
                timer.cancel()
        elif self.bar is not None:
            self.bar.activity = bar.Activity(activity)
            try:
                yield
            finally:
                self.bar.activity = None
        else:
            self.live = self._draw(bar.Activity(activity), transient=True)
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

    def activity(self, name: str | None) -> None:
        """Show an activity until the next call with None."""
        if name is None:
            self.activities.pop().close()
            return
        stack = contextlib.ExitStack()
        stack.enter_context(self.busy(name))
        self.activities.append(stack)

    def message(self, text: str, *, warning: bool = False) -> None:
        """Print one line, in colour if it is a warning."""
        if warning and self.level != "error":
            self.warn(text)
        elif not warning and self.talks:
            self.line(text)

    def debug(self, text: str) -> None:
        """Print a line for those who look for a fault."""
        if self.level == "debug":
            self.line(text, "dim")

    def health(self, event: health.Event) -> None:
        """Warn of what a health rule saw, with the fix."""
        self.message(f"{event.seen}: {event.fix}", warning=True)

    def step(self, record: Record) -> None:
        """Show the metrics of a step."""
        step = int(record["step"])
        self.seconds += record["step_seconds"]
        eta_s = self.seconds / max(step - self.first, 1) * (self.total - step)
        items = lines.step_items(record, self.metrics)
        if self.bar is not None:
            self.bar.done, self.bar.eta_s, self.bar.items = step, eta_s, items
            name = "reward" if health.sampled(record) else "train/loss"
            if name in record:
                self.bar.trace(name.removeprefix("train/"), step, record[name])
        elif self.talks and (step % self.every == 0 or step == self.total):
            self.line("  ".join([f"step {step:>4}/{self.total}", *items, f"eta {lines.clock(eta_s)}"]))

    def evaluation(self, record: Record) -> None:
        """Print the metric that evaluations compare, and the method's own."""
        self.seconds += record["eval/seconds"]
        if self.bar is not None and (value := record.get(f"eval/{self.metrics.goal}")) is not None:
            self.bar.trace(f"held out {self.metrics.goal}", record["step"], value)
        if self.talks:
            self.line(lines.evaluation(record, self.metrics), "bold")

    def samples(self, answers: Sequence[dict[str, Any]]) -> None:
        """Print the answer to the sample prompt or to the first held-out one, or the best completions of a step's first prompt."""
        step = int(answers[0]["step"])
        if not self.talks:
            return
        if "row" in answers[0]:
            self.line(lines.answer(answers[0], len(answers)), "dim")
            return
        if "rewards" not in answers[0]:
            self.line(f"sample answer {'before' if step == 0 else 'after'} training", "bold")
            self.line(f"  prompt: {answers[0]['prompt']}\n  answer: {answers[0]['answer'].strip() or '(blank)'}\n")
        if "rewards" not in answers[0] or step % self.every or step == self.printed:
            return
        self.printed = step
        for answer in answers[: self.metrics.completions]:
            self.line(lines.completion(answer), "dim")

    def end(self, stopped: str | None, history: Sequence[Record]) -> None:
        """Take the bar away."""
        self.stop()

    def summary(self, rows: Mapping[str, str], history: Sequence[Record]) -> None:
        """Print what the run reached; commands to paste stand on lines of their own, which no column breaks."""
        if not self.talks:
            return
        self.table("", {name: text for name, text in rows.items() if name not in PASTED})
        for name in [name for name in PASTED if name in rows]:
            self.line(f"{name}  {rows[name]}")

    def stop(self) -> None:
        """Take the bar away."""
        if self.bar is not None and self.live is not None:
            self.live.stop()
            self.bar = self.live = None
