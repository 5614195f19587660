"""What reward functions print, copied to a log or standard error up to a limit: a gigabyte of it is told in one line, not kept."""

import os
import threading
from collections.abc import Hashable

CALL, ALL = 1 << 20, 16 << 20  # bytes that are kept of a call, and in all


class Echo:
    """Copies pipes in threads until their writers are gone. It has a lifetime: threads, and the log, until `close`."""

    def __init__(self, log: str | os.PathLike | None, *, call: int = CALL, all: int = ALL):
        self._log, self._call, self._all = log, call, all
        self._lock = threading.Lock()
        self._left = all
        self._here: dict[Hashable, int] = {}  # bytes left to the call that a writer is at
        self._threads: list[threading.Thread] = []
        if log:
            open(log, "ab").close()  # a log that cannot be written is told at once

    def pipe(self, key: Hashable) -> int:
        """The end of a new pipe that a process may write to; whoever starts it closes this end."""
        read, write = os.pipe()
        self.renew(key)
        thread = threading.Thread(target=self._copy, args=(read, key), daemon=True)
        self._threads = [copier for copier in self._threads if copier.is_alive()] + [thread]
        thread.start()
        return write

    def renew(self, key: Hashable) -> None:
        """A new call begins."""
        self._here[key] = self._call

    def close(self) -> None:
        """Waits for what ended processes have written; a process that still holds a pipe is not waited for."""
        for thread in self._threads:
            thread.join(1.0)

    def _copy(self, read: int, key: Hashable) -> None:
        with os.fdopen(read, "rb", buffering=0) as source:
            while data := source.read(1 << 16):
                with self._lock:
                    self._keep(data, key)

    def _keep(self, data: bytes, key: Hashable) -> None:
        room = min(self._left, self._here[key])
        if room <= 0:
            return
        written, self._left = data[:room], self._left - len(data[:room])
        self._here[key] -= len(written)
        if len(written) == room:
            which = f"{self._all} bytes in all" if self._left <= 0 else f"{self._call} bytes of a call"
            written += f"\n[reward functions printed more than {which}: the rest is left out]\n".encode()
        try:
            with open(self._log, "ab") if self._log else open(2, "wb", closefd=False) as out:
                out.write(written)
        except OSError:
            self._left = 0  # nowhere to write: keep reading, so that nobody blocks
