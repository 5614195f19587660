"""Checkpoints that are written while training goes on: copied to host memory at their step, then written by a thread."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from treetune.core import ckpt, ckpt_parts, exchange
from treetune.core.state import TrainState


class Saver:
    """Saves one checkpoint after another, never two at a time. Every rank has one and calls the same methods in the same order.

    asynchronous: `begin` returns when the copies are made; else when the checkpoint is on the disk.
    """

    def __init__(self, *, asynchronous: bool = False):
        self.asynchronous = asynchronous
        self._thread: threading.Thread | None = None
        self._path: Path | None = None
        self._error: BaseException | None = None

    def begin(self, root: Path, state: TrainState, meta: dict) -> None:
        """Save a state, once the one before is written. Errors: as of `wait`."""
        self.wait()
        if not self.asynchronous:
            self._path = ckpt.save(root, state, meta)
            return
        copies, ready = ckpt_parts.on_host(ckpt_parts.own(state, exchange.rank()))
        # A daemon: a second Ctrl-C leaves at once, and the next start deletes the draft.
        what = (root, int(state.step), copies, meta, exchange.group())
        self._thread = threading.Thread(target=self._write, args=what, kwargs={"ready": ready}, daemon=True)
        self._thread.start()

    def _write(self, *what: Any, ready: Callable[[], None]) -> None:
        try:
            ready()
            self._path = ckpt.write(*what)
        except BaseException as error:  # of whatever kind: `wait` raises it where the run can end by it
            self._error = error

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise, as far as is known now."""
        return self._error is not None

    def written(self) -> Path | None:
        """The checkpoint that has been written since this was last asked."""
        if self._thread is not None and self._thread.is_alive():
            return None
        path, self._path = self._path, None
        return path

    def settle(self) -> None:
        """Return when nothing is being written any more, whatever came of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Return when the last checkpoint is on the disk. Errors: ckpt.SaveError, on all ranks, where it could not be written."""
        self.settle()
        error, self._error = self._error, None
        if error is not None:
            raise error
