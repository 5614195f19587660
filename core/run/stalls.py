"""A run whose ranks wait for one another for ever: after a limit of seconds all ranks write their stacks, one names who hangs, all end.

Every rank has a thread that looks at its heart (`core.heartbeat`). A rank that holds the interpreter, so that the thread cannot look, is
ended by the timer of faulthandler, and is known by its silence.
"""

import contextlib
import faulthandler
import json
import os
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

from treetune.core import heartbeat
from treetune.core.run import journal

FOLDER = "stacks"
GRACE = 10.0  # seconds in which ranks tell where they are
INSTALLED = ("<frozen", *{sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
DISTRIBUTED = "torch.distributed"


class Place(NamedTuple):
    """Where the main thread of a rank is. waits: for other ranks, as far as its stack shows. own: in code of the user."""

    text: str
    waits: bool
    own: bool = False


def place_of(frame: FrameType | None, *, device: str = "cpu") -> Place:
    """The place of a thread by its innermost frame, or by the innermost of the user's own code where that is what runs.

    On CUDA collectives are waited for anywhere in torch, so that only code of others counts as hanging.
    """
    if frame is None:
        return Place("no Python code", False)
    frames = list(_outwards(frame))
    own = next((one for one in frames if not _ours(one) and not one.f_code.co_filename.startswith(INSTALLED)), None)
    waits = any(_module(one).startswith(DISTRIBUTED) for one in frames) or (device != "cpu" and own is None)
    shown = frames[0] if own is None or waits else own
    return Place(
        f"{Path(shown.f_code.co_filename).name} line {shown.f_lineno} ({shown.f_code.co_name})", waits, own is not None and not waits
    )


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _module(frame: FrameType) -> str:
    return frame.f_globals.get("__name__") or ""


def _ours(frame: FrameType) -> bool:
    """Whether a frame is of treetune, also of its command, or of torch."""
    return _module(frame).split(".")[0] in ("torch", "treetune", "__main__")


def told(places: Mapping[int, Place], world: int, silence: float, stacks: Path) -> str:
    """What has come to a halt, from the places of the ranks that have told theirs."""
    mute = [rank for rank in range(world) if rank not in places]
    # A message that is under way is waited for in code of torch that has no Python frame: code of the user's is what hangs beside it.
    hang = [rank for rank, place in sorted(places.items()) if place.own] or [
        rank for rank, place in sorted(places.items()) if not place.waits
    ]
    if mute:
        words = f"{_named(mute)} {'does' if len(mute) == 1 else 'do'} not answer"
    elif hang and len(hang) < world:
        words = "; ".join(f"rank {rank} hangs in {places[rank].text}" for rank in hang[:3])
    elif hang:
        words = "no rank goes on: " + "; ".join(f"rank {rank} is in {places[rank].text}" for rank in hang[:3])
    else:
        words = "all ranks wait for one another: they disagree about what comes next"
    return f"nothing has happened for {silence:.0f} s, {words}; the stacks of the ranks are in {stacks}"


def _named(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


class Watch:
    """Looks at the heart of this rank until it is closed. say(text): how the one rank that tells the user does it."""

    def __init__(self, rank: int, world: int, limit: float, root: Path, *, device: str, say: Callable[[str], None]):
        self.rank, self.world, self.limit, self.root, self.device, self.say = rank, world, limit, root, device, say
        self.store, self.closed, self.file = _own_store(), threading.Event(), None
        self.main = threading.main_thread().ident
        self.thread = threading.Thread(target=self._look, name="stalls", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        heartbeat.beat()
        self.thread.start()

    def close(self) -> None:
        """Look no more."""
        self.closed.set()
        self.thread.join()
        if self.file is not None:
            faulthandler.cancel_dump_traceback_later()
            self.file.close()
            with contextlib.suppress(OSError):
                if not self._path().stat().st_size:
                    self._path().unlink()
                    self._path().parent.rmdir()

    def _path(self) -> Path:
        return self.root / FOLDER / f"rank-{self.rank}.txt"

    def _look(self) -> None:
        pause = min(self.limit / 10, 5.0)
        while not self.closed.wait(pause):
            self._arm()
            if (silence := heartbeat.silence()) > self.limit:
                self._stop(silence)

    def _arm(self) -> None:
        """Have the stacks written, and the process ended, where this thread does not come back in time."""
        with contextlib.suppress(OSError):
            if self.file is None:
                self._path().parent.mkdir(exist_ok=True)
                self.file = self._path().open("w")
            faulthandler.dump_traceback_later(self.limit + 2 * GRACE, exit=True, file=self.file)

    def _stop(self, silence: float) -> None:
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):
            if self.file is not None:
                faulthandler.dump_traceback(file=self.file, all_threads=True)
                self.file.flush()
        with contextlib.suppress(Exception):  # the store is gone with the process that held it: its end is what was waited for
            places = self._ask()
            if self.store.add("stall/told", 1) == 1:
                self.say(told(places, self.world, silence, self.root / FOLDER))
            time.sleep(min(self.limit, 2.0))  # the others ask the store for the same
        os._exit(1)

    def _ask(self) -> dict[int, Place]:
        """Tell where this rank is, and the places of those that do so within the time of grace."""
        own = place_of(sys._current_frames().get(self.main or 0), device=self.device)
        self.store.set(f"stall/{self.rank}", json.dumps(own))
        until, places = time.monotonic() + GRACE, {self.rank: own}
        while len(places) < self.world and time.monotonic() < until:
            for rank in range(self.world):
                if rank not in places and self.store.check([f"stall/{rank}"]):
                    places[rank] = Place(*json.loads(self.store.get(f"stall/{rank}")))
            time.sleep(0.1)
        return places


def _own_store() -> Any:
    """The store of the processes by a connection of its own: that of the main thread may be waiting for an answer."""
    store = torch.distributed.distributed_c10d._get_default_store()
    clone = getattr(store, "clone", None)  # older ones have none
    return store if clone is None else clone()


@contextlib.contextmanager
def watched(rank: int, world: int, limit: float, root: Path, *, device: str) -> Iterator[None]:
    """Inside, a run of several ranks ends after `limit` seconds in which it did nothing."""
    if world == 1:
        yield
        return

    def say(text: str) -> None:
        print(f"treetune: error: {text}", file=sys.stderr, flush=True)
        if (status := journal.read(root)) is not None:
            journal.write(root, status._replace(state=journal.FAILED, reason=text, ended=time.time()))

    watch = Watch(rank, world, limit, root, device=device, say=say)
    watch.start()
    try:
        yield
    finally:
        watch.close()
