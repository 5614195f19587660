"""Identity of a process as files record it: machine, boot, process number and start time, together unique."""

import hashlib
import os
import socket
from functools import cache
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")


class Process(NamedTuple):
    """One process of one machine.

    host: name of the machine. boot: identity of its last boot, "" where the system has none. space: namespace of process numbers, because
    containers count their own. pid: number of the process. start: its start time in the system's ticks, "" where the system has none.
    """

    host: str
    boot: str
    space: str
    pid: int
    start: str


def own() -> Process:
    """This process."""
    return Process(*_machine(), os.getpid(), _start(os.getpid()) or "")


@cache
def _machine() -> tuple[str, str, str]:
    boot = _read(_PROC / "sys/kernel/random/boot_id").replace("-", "")[:8]
    try:
        space = os.readlink(_PROC / "self/ns/pid")
    except OSError:
        space = ""
    return socket.gethostname(), boot, "".join(letter for letter in space if letter.isdigit())


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _start(pid: int) -> str | None:
    """Start time of a process; "" for a zombie, None where the system has none."""
    fields = _read(_PROC / str(pid) / "stat").rpartition(")")[2].split()
    if len(fields) < 20:
        return None
    return "" if fields[0] in "ZX" else fields[19]


def ended(process: Process) -> bool | None:
    """Whether a process has ended; None where this machine cannot tell, because the process ran on another or in another container."""
    host, boot, space = _machine()
    if process.host != host:
        return None
    if process.boot != boot:
        return True
    if process.space != space:
        return None
    start = _start(process.pid)
    return not _runs(process.pid) if start is None else start != process.start


def _runs(pid: int) -> bool:
    if os.name == "nt":  # there, signal 0 is Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def pid_ended(pid: int) -> bool:
    """Whether no process of this number runs on this machine; for files that record nothing but a number."""
    start = _start(pid)
    return not _runs(pid) if start is None else start == ""


def short(host: str) -> str:
    """Digest of a host's name, as it appears in the names of files."""
    return hashlib.sha256(host.encode()).hexdigest()[:8]
