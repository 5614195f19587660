"""How many of what are done, while a command works: a counter on a terminal, elsewhere a line from time to time."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

PATIENCE_S, SHARE = 10, 0.1  # before the first line, and of the time so far before another


class Count(Protocol):
    """Told that `more` are done, and that `expected` more will come."""

    def __call__(self, more: int, expected: int = 0) -> None:
        """Count."""


def by_lines(say: Callable[[str], None], unit: str, clock: Callable[[], float] = time.monotonic) -> Count:
    """A count that says a line after PATIENCE_S seconds, then ever more rarely: a log of hours stays short."""
    begun = said = clock()
    done = total = 0

    def count(more: int, expected: int = 0) -> None:
        nonlocal said, done, total
        done, total, now = done + more, total + expected, clock()
        if more and now - said >= max(PATIENCE_S, SHARE * (now - begun)):
            said = now
            say(f"{done}{f' of {total}' if total else ''} {unit}")

    return count


@contextlib.contextmanager
def on_terminal(console: Console, unit: str) -> Iterator[Count]:
    """A count that stands under the printed lines while it lasts."""
    columns = [SpinnerColumn(), TextColumn("{task.completed:.0f}{task.fields[of]}"), TextColumn(unit), TimeElapsedColumn()]
    total = 0
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None, of="")

        def count(more: int, expected: int = 0) -> None:
            nonlocal total
            total += expected
            progress.update(task, advance=more, of=f" of {total}" if total else "")

        yield count
