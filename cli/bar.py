"""Progress on a terminal: two lines under the printed ones, a bar with times, and metrics or the current activity."""

import time
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from treetune.core.run.lines import clock

SHORTEST, LONGEST = 6, 60  # of the bar, in columns
ECHO = 5  # columns at the end of the last line for what a terminal echoes there, such as ^C: it must not wrap


def fit(items: Sequence[str], width: int) -> str:
    """The first items that fit in so many columns, two spaces apart; the very first is cut if need be."""
    line = ""
    for item in items:
        longer = f"{line}  {item}" if line else item
        if cell_len(longer) > width:
            break
        line = longer
    return line or (items[0][:width] if items else "")


class Activity:
    """An activity that takes a while, with a spinner and the time since it started."""

    def __init__(self, name: str):
        self.name, self.start, self.spinner = name, time.monotonic(), Spinner("dots")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width - ECHO
        elapsed = clock(time.monotonic() - self.start)
        name = fit([self.name], width - len(elapsed) - 4)
        frame = self.spinner.render(console.get_time())
        yield Text.assemble(frame if isinstance(frame, Text) else "", " ", (name, "cyan"), "  ", elapsed, no_wrap=True, overflow="crop")


class Bar:
    """The progress of a run; has a lifetime: rich draws it from another thread until the run ends."""

    def __init__(self, total: int, done: int):
        self.total, self.done, self.start = total, done, time.monotonic()
        self.eta_s: float | None = None
        self.items: Sequence[str] = ()
        self.activity: Activity | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._bar(options.max_width - 1)
        yield self.activity or Text(fit(self.items, options.max_width - ECHO), style="dim", no_wrap=True, overflow="crop")

    def _bar(self, width: int) -> Table | Text:
        """Steps, a bar where there is room for one, the time so far and the time to come."""
        steps = f"step {self.done}/{self.total}"
        times = f"{clock(time.monotonic() - self.start)} eta {'-:--' if self.eta_s is None else clock(self.eta_s)}"
        room = width - len(steps) - len(times) - 2
        if room < SHORTEST:
            return Text(fit([steps, times], width), no_wrap=True, overflow="crop")
        size = min(room, LONGEST)
        row = Table.grid(padding=(0, 1, 0, 0))
        row.add_row(Text(steps, style="bold"), ProgressBar(total=max(self.total, 1), completed=self.done, width=size), Text(times))
        return row
