"""A folder in the hands of one process: a file in it that names the host, the number and the start of the holder.

The file is also locked in the sense of the system (flock) as long as its holder lives, where there is such a thing: that settles who takes
over what a process left that was killed, and shows a holder in another container of this machine. What another machine holds cannot be
checked from here: it is refused, and the message says what to delete.
"""

import contextlib
import json
import os
import time
from pathlib import Path

from treetune.core import process

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".treetune.lock"
TRIES = 100


class Busy(ValueError):
    """Another process has the folder."""


class Lock:
    """The lock of a folder, taken when it is made. Raises Busy, with the holder's host and number, while another process has it."""

    def __init__(self, folder: Path):
        self.path, self.handle = Path(folder) / NAME, None
        for _ in range(TRIES):
            if self._take():
                return
        raise Busy(f"{folder} is wanted by several processes at once: try again")

    def _take(self) -> bool:
        """Whether the lock is ours now; False where its file was replaced in between."""
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        try:
            free = _flock(handle)
            if not _same(handle, self.path):
                return False
            holder = _holder(handle)
            if not free and (holder is None or process.ended(holder)):
                time.sleep(0.02)  # it is just being written
                return False
            if not _left(holder, free):
                raise Busy(_words(self.path, holder))
            self._sign(handle)
            self.handle, handle = handle, None
            return True
        finally:
            if handle is not None:
                os.close(handle)

    def _sign(self, handle: int) -> None:
        try:
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, json.dumps(process.own()._asdict() | {"since": time.time()}).encode())
            os.fsync(handle)
        except OSError:  # a full disk
            self.path.unlink(missing_ok=True)
            raise

    def release(self) -> None:
        """Give the folder back."""
        if self.handle is not None:
            with contextlib.suppress(OSError):
                if _same(self.handle, self.path):
                    self.path.unlink()
            os.close(self.handle)
            self.handle = None


def check(folder: Path) -> None:
    """Raise Busy while another process has the folder; nothing is written."""
    path = Path(folder) / NAME
    for last in [False] * TRIES + [True]:
        try:
            handle = os.open(path, os.O_RDWR)
        except OSError:
            return
        try:
            free = _flock(handle)
            holder = _holder(handle)
        finally:
            os.close(handle)
        if _left(holder, free):
            return
        if last or free or not (holder is None or process.ended(holder)):
            raise Busy(_words(path, holder))
        time.sleep(0.02)  # it is just being written


def _flock(handle: int) -> bool:
    """Whether the system gives us its lock, or has none to give."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(handle: int) -> process.Process | None:
    """Who wrote the file; None where it is empty or damaged, as a crash may leave it."""
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        values = json.loads(os.read(handle, 4096))
        holder = process.Process(**{name: values[name] for name in process.Process._fields})
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    texts = all(isinstance(text, str) for text in holder._replace(pid=""))
    return holder if texts and type(holder.pid) is int and 0 < holder.pid < 2**31 else None


def _left(holder: process.Process | None, free: bool) -> bool:
    """Whether nobody holds the lock: there is no holder, or it has ended without giving the lock back."""
    if holder is None or not free:
        return free
    ended = process.ended(holder)
    if ended is None:  # in another container of this machine, the system's lock says what its number cannot
        return fcntl is not None and holder.boot != "" and holder.boot == process.own().boot
    return ended


def _words(path: Path, holder: process.Process | None) -> str:
    if holder is None:
        return f"{path.parent} is in use by another process: wait for it, or name another folder"
    local = holder.host == process.own().host
    fix = "wait for it, or name another folder" if local else f"if that process has ended, delete {path}"
    return f"{path.parent} is in use by process {holder.pid} on {holder.host}: {fix}"
