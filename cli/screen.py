"""What a person sees: a progress bar and lines on a terminal, plain lines elsewhere, nothing on ranks above 0."""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from treetune.cli import terminal
from treetune.core import observe

try:
    import resource
except ImportError:  # Windows
    resource = None


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
        self.every, self.bar, self.task = every, None, None

    def line(self, text: str, style: str = "") -> None:
        """One line of plain text."""
        self.console.print(Text(terminal.safe(text)), style=style)

    @property
    def colours(self) -> bool:
        """Whether colours can be seen: on a terminal that has them, unless NO_COLOR says not to use them."""
        return self.console.color_system is not None and not self.console.no_color

    def text(self, text: Text | str) -> None:
        """A text of its own styles, or plain."""
        self.console.print(text if isinstance(text, Text) else Text(terminal.safe(text)))

    def warn(self, text: str) -> None:
        """One line that should be noticed."""
        self.line(f"! {text}", "yellow")

    def table(self, title: str, rows: dict[str, str]) -> None:
        """Two columns of names and values."""
        table = Table(title=title, show_header=False, title_justify="left", box=None, pad_edge=False)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column()
        for name, value in rows.items():
            table.add_row(name, Text(terminal.safe(value)))
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
            columns = [TextColumn("[bold]step"), MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.description}")]
            self.bar = Progress(*columns, TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(), console=self.console)
            self.task = self.bar.add_task("", total=total, completed=done)
            self.bar.start()

    def step(self, record: dict, eta_s: float) -> None:
        """The metrics of one finished step; a loss around 0 of sampled completions would say nothing."""
        loss = "" if observe.sampled(record) else f"loss {record['train/loss']:.4f}  "
        text = (
            f"{loss}{self.own(record)}grad {record['grad_norm']:.2f}  lr {record['learning_rate']:.1e}  "
            f"{record['supervised_tokens_per_second']:.0f} tok/s  {record['memory_gib']:.1f} GiB"
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=record["step"], description=text)
        elif record["step"] % self.every == 0 or record["step"] == self.total:
            self.line(f"step {record['step']:>4}/{self.total}  {text}  eta {clock(eta_s)}")

    def wants(self, step: int) -> bool:
        """Whether what belongs to this step is worth lines."""
        return step % self.every == 0

    def own(self, record: dict, prefix: str = "") -> str:
        """The method's own numbers of a record, each followed by two spaces."""
        return "".join(f"{key.split('/')[-1]} {record[prefix + key]:.3f}  " for key in self.shown if prefix + key in record)

    def stop(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
