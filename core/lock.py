"""Lock of a folder for one process: a file that records host, number and start time of its holder.

The holder also keeps the file locked by the system (flock) while it lives, where the system has such locks. That decides which process
takes over after a holder was killed, and shows a holder in another container of this machine. A holder on another machine cannot be
checked from here: the folder is refused, and the message says which file to delete.
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
    """The folder is in use by another process."""


class Lock:
    """Lock of a folder, acquired on construction; call `release` when done. Raises Busy, which names the holder, while it is taken."""

    def __init__(self, folder: Path):
        self.path, self.handle = Path(folder) / NAME, None
        for _ in range(TRIES):
            if self._take():
                return
        raise Busy(f"{folder} is wanted by several processes at once: try again")

    def _take(self) -> bool:
        """Whether this process now holds the lock; False where the file was replaced in between."""
        # Not truncated: until the lock is had, what the file says is its holder's.
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        try:
            free = _flock(handle)
            # Its holder may have deleted it since it was opened, and a lock on a deleted file keeps nobody out.
            if not _same(handle, self.path):
                return False
            holder = _holder(handle)
            if not free and (holder is None or process.ended(holder)):
                time.sleep(0.02)  # its holder is writing it at this moment
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
        """Delete the lock file and release the system's lock."""
        if self.handle is not None:
            with contextlib.suppress(OSError):
                # Deleted while it is still locked: later it may be the file of the next holder.
                if _same(self.handle, self.path):
                    self.path.unlink()
            os.close(self.handle)
            self.handle = None


def check(folder: Path) -> None:
    """Raise Busy while another process holds the folder; writes nothing."""
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
    """Whether the system grants its lock, or has no locks."""
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
    """The process that the file records; None where the file is empty or damaged, as after a crash."""
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        values = json.loads(os.read(handle, 4096))
        holder = process.Process(**{name: values[name] for name in process.Process._fields})
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    texts = all(isinstance(text, str) for text in holder._replace(pid=""))
    return holder if texts and type(holder.pid) is int and 0 < holder.pid < 2**31 else None


def _left(holder: process.Process | None, free: bool) -> bool:
    """Whether the lock is free: it has no holder, or its holder ended without releasing it."""
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
