"""What moves on a terminal: two lines under what is printed, as wide as it is; a bar with times, and metrics or what is going on."""

import time
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

SHORTEST, LONGEST = 6, 60  # of the bar, in columns
ECHO = 5  # columns at the end of the last line for what a terminal echoes there, such as ^C: it must not wrap


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def fitting(items: Sequence[str], width: int) -> str:
    """The first items that fit in so many columns, two spaces apart; the very first is cut if need be."""
    out = ""
    for item in items:
        longer = f"{out}  {item}" if out else item
        if cell_len(longer) > width:
            break
        out = longer
    return out or (items[0][:width] if items else "")


class Activity:
    """What takes a while, with a spinner and the time that it has taken."""

    def __init__(self, what: str):
        self.what, self.start, self.spinner = what, time.monotonic(), Spinner("dots")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width - ECHO
        taken = clock(time.monotonic() - self.start)
        what = fitting([self.what], width - len(taken) - 4)
        frame = self.spinner.render(console.get_time())
        yield Text.assemble(frame if isinstance(frame, Text) else "", " ", (what, "cyan"), "  ", taken, no_wrap=True, overflow="crop")


class Bar:
    """The progress of a run. A class because it lives as long as the run and is drawn by another thread."""

    def __init__(self, total: int, done: int):
        self.total, self.done, self.start = total, done, time.monotonic()
        self.eta_s: float | None = None
        self.items: Sequence[str] = ()
        self.activity: Activity | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._bar(options.max_width - 1)
        yield self.activity or Text(fitting(self.items, options.max_width - ECHO), style="dim", no_wrap=True, overflow="crop")

    def _bar(self, width: int) -> Table | Text:
        """Steps, a bar where there is room for one, the time so far and the time to come."""
        steps = f"step {self.done}/{self.total}"
        times = f"{clock(time.monotonic() - self.start)} eta {'-:--' if self.eta_s is None else clock(self.eta_s)}"
        room = width - len(steps) - len(times) - 2
        if room < SHORTEST:
            return Text(fitting([steps, times], width), no_wrap=True, overflow="crop")
        size = min(room, LONGEST)
        row = Table.grid(padding=(0, 1, 0, 0))
        row.add_row(Text(steps, style="bold"), ProgressBar(total=max(self.total, 1), completed=self.done, width=size), Text(times))
        return row
