"""SIGINT and SIGTERM of a run: the first asks it to end after the step, a second SIGINT interrupts at once."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def caught(notify: Callable[[str], None]) -> Iterator[Callable[[], int | None]]:
    """Inside, signals are collected: yields stop() -> number of the first one, or None. Only the main thread can see them."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    received: list[int] = []

    def handler(signum: int, frame: object) -> None:
        if signum == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(signum)
        notify(f"{signal.Signals(signum).name}: saving after this step; Ctrl-C again leaves at once")

    previous = {signum: signal.signal(signum, handler) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else None
    finally:
        for signum, action in previous.items():
            signal.signal(signum, action)
