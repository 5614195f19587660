"""When this process last did something of its run: a forward pass, a step. `run.stalls` asks for it."""

import time

_last = [time.monotonic()]


def beat() -> None:
    """Note that the run goes on."""
    _last[0] = time.monotonic()


def silence() -> float:
    """Seconds since the last beat."""
    return time.monotonic() - _last[0]
