"""`treetune doctor RUN`: what is wrong with a run, and what to change. Imports no torch."""

import math
import os
from pathlib import Path

from treetune.cli.methods import METHODS
from treetune.cli.options.commands import Doctor
from treetune.cli.screen import Screen
from treetune.core.run import doctor, journal, runs
from treetune.core.run.errors import checking_input


def run(config: Doctor, given: frozenset[str]) -> int:
    """Print the findings; the exit code: 0 nothing found, 1 something."""
    screen = Screen()
    with checking_input():
        past = runs.read(Path(config.path))
    findings = doctor.diagnose(past, usual_rate=_usual(past), memory_gib=_memory_gib())
    screen.line(f"{past.root}: {past.method or 'a run'}, {past.state}, step {past.step} of {past.status.total_steps or '?'}")
    for number, one in enumerate(findings, 1):
        screen.line(f"\n{number}. {one.cause}", "bold")
        screen.line(f"   seen    {one.seen}")
        for i, text in enumerate(one.fix):
            screen.line(f"   {'' if i else 'change':7} {text}")
    if past.damage:
        screen.line("\nof the folder cannot be read:")
        for text in past.damage:
            screen.line(f"   {text}")
    if warnings := doctor.warnings(past):
        screen.line("\nthe run also warned:")
        for text in warnings:
            screen.line(f"   {text}")
    if not findings:
        begun = "" if past.steps else " (no step is recorded yet)"
        screen.line(f"nothing found{begun}" + ("; it still runs" if past.state == journal.RUNNING else ""))
    return 1 if findings else 0


def _usual(past: runs.PastRun) -> float | None:
    """The peak learning rate that the method of a run has where none is given."""
    method = METHODS.get(past.method)
    return None if method is None else method.rates[past.config.get("adapter") == "none"]


def _memory_gib() -> float | None:
    """Memory of this machine."""
    if not hasattr(os, "sysconf"):  # Windows
        return None
    return math.prod(map(os.sysconf, ("SC_PAGE_SIZE", "SC_PHYS_PAGES"))) / 2**30
