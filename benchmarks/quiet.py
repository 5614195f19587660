"""A quiet machine for a benchmark: how busy others keep it, and runs that wait until they do not."""

import json
import os
import time
from pathlib import Path
from typing import NamedTuple

import harness

IDLE_CORES, PATIENCE_S, TRIES = 0.1, 600, 4


class Mark(NamedTuple):
    """A moment: seconds of the clock, and core seconds that other processes, the host's other guests included, have computed so far."""

    time: float
    others: float


def mark() -> Mark:
    """This moment. Linux only."""
    busy = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    computed = (sum(busy) - busy[3] - busy[4]) / os.sysconf("SC_CLK_TCK")  # without idling and waiting for a disk
    return Mark(time.perf_counter(), computed - sum(os.times()[:4]))


def busy_cores(start: Mark, end: Mark) -> float:
    """How many cores other processes kept busy between two moments."""
    return (end.others - start.others) / (end.time - start.time)


def wait_for_quiet() -> None:
    """Return once the machine is quiet, or PATIENCE_S have passed."""
    end = time.monotonic() + PATIENCE_S
    busy = IDLE_CORES + 1
    while busy > IDLE_CORES and time.monotonic() < end:
        start = mark()
        time.sleep(5)
        busy = busy_cores(start, mark())


def undisturbed(script: str, arguments: list[str]) -> dict:
    """A run in a process of its own, the quietest of up to TRIES: a second job beside it slows steps down several times."""
    runs = []
    while len(runs) < TRIES and all(run["others_busy_cores"] > IDLE_CORES for run in runs):
        wait_for_quiet()
        runs.append(harness.child(script, *arguments))
        print(f"{' '.join(arguments[:4])}: {json.dumps(runs[-1])}", flush=True)
    return min(runs, key=lambda run: run["others_busy_cores"])
