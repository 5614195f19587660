"""Processes that a process started, whatever group or session they moved to: found through /proc, ended together.

Linux only; elsewhere nothing is found, and the process group is all that ends. The standard library only, as workers import this.
"""

import ctypes
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

MARK = "TREETUNE_REWARD_WORKER"  # in the environment of a worker, and so of what it starts
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
LOOK_S = 0.25


def adopt() -> None:
    """Makes this process the parent of what its children leave behind, so that they stay its descendants."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)


def of(pid: int) -> list[int]:
    """Process ids of all descendants, children before theirs."""
    parents = _parents()
    pids = [pid]
    for process_id in pids:
        pids += [child for child, parent in parents.items() if parent == process_id]
    return pids[1:]


def marked(mark: str) -> list[int]:
    """Process ids of what lives with this MARK: what a worker left behind that has crashed is nobody's descendant any more."""
    out, wanted = [], f"{MARK}={mark}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError, ValueError):
            if wanted in path.read_bytes().split(b"\0"):
                out.append(int(path.parent.name))
    return out


def kill(pid: int, mark: str = "") -> None:
    """Ends all descendants, and others of its mark, also those that are started meanwhile."""
    # A process may start others between the look and the kill: look again until there is none.
    for _ in range(5):
        left = of(pid) + [process_id for process_id in (marked(mark) if mark else []) if process_id != pid]
        if not left:
            return
        for process_id in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process_id, signal.SIGKILL)


def end_with(parent: int) -> None:
    """Ends this process, its group and its descendants soon after `parent` is no longer its parent."""

    def watch() -> None:
        me = os.getpid()
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        kill(me)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _parents() -> dict[int, int]:
    """{process: its parent} of what lives; a zombie has ended and is left out."""
    out = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                out[int(path.parent.name)] = int(parent)
    return out
