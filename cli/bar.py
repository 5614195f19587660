"""Progress on a terminal, under the printed lines: a bar with times, metrics or the current activity, and curves where there is room."""

import time
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from treetune.core.run import sparks
from treetune.core.run.lines import clock

SHORTEST, LONGEST = 6, 60  # of the bar, in columns
CURVES_WIDE, CURVES_HIGH = 60, 12  # columns and lines of a terminal with room for curves
CURVE = 24  # columns of a curve
POINTS = 480  # of a curve at most: of more, neighbours are put together
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


class Trace:
    """The curve of a metric while it grows; drawn many times a second, so it keeps few points however long the run is."""

    def __init__(self, name: str):
        self.name, self.each, self.waiting = name, 1, []
        self.points: list[tuple[float, float]] = []

    def add(self, step: float, value: float) -> None:
        """Add a point."""
        self.waiting.append((step, value))
        if len(self.waiting) == self.each:
            self.points.append(_middle(self.waiting))
            self.waiting = []
        if len(self.points) > POINTS:
            self.points = [_middle(self.points[i : i + 2]) for i in range(0, len(self.points), 2)]
            self.each *= 2

    def draw(self, *, plain: bool) -> str:
        """Name, curve and last value."""
        return f"{self.name} {sparks.draw(self.points, CURVE, plain=plain)} {self.points[-1][1]:.4g}"


def _middle(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(step for step, _ in points) / len(points), sum(value for _, value in points) / len(points)


class Bar:
    """The progress of a run; has a lifetime: rich draws it from another thread until the run ends."""

    def __init__(self, total: int, done: int):
        self.total, self.done, self.start = total, done, time.monotonic()
        self.traces: dict[str, Trace] = {}
        self.eta_s: float | None = None
        self.items: Sequence[str] = ()
        self.activity: Activity | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._bar(options.max_width - 1)
        yield self.activity or Text(fit(self.items, options.max_width - ECHO), style="dim", no_wrap=True, overflow="crop")
        shown = [trace for trace in list(self.traces.values()) if len(trace.points) > 1]
        if shown and options.max_width >= CURVES_WIDE and console.height >= CURVES_HIGH:
            drawn = [trace.draw(plain=options.ascii_only) for trace in shown]
            yield Text(fit(drawn, options.max_width - ECHO), style="dim", no_wrap=True, overflow="crop")

    def trace(self, name: str, step: float, value: float) -> None:
        """Add a point to the curve of a name."""
        self.traces.setdefault(name, Trace(name)).add(step, value)

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
