"""The process of one tracker: its package is imported and called here, where it can hang, print, crash or start what it likes.

Started as `python -m treetune.core.trackers.tracker_process` with a socket as standard input (`core.rollout.wire`). Each message has
"limit_s" and one of "open", "numbers", "answers", "facts", "copy", "finish" with the arguments of that call; the answer is {}, {"error"},
or of "open" {"id", "place"}. A channel that closes means that the trainer is gone. The standard library only, besides what the tracker
imports.
"""

import contextlib
import faulthandler
import importlib
import os
import signal
import socket
import sys
from typing import Any, TextIO

from treetune.core.rollout import descendants, wire, worker
from treetune.core.trackers.tracked_run import Answers, TrackedRun, Tracker

GRACE_S = 5.0  # beyond the limit that the trainer keeps
LEFT_S = 60.0  # to write what is left where the trainer is gone


def main() -> None:
    """Answers messages until the run has ended."""
    channel = wire.standard_input()
    descendants.adopt()
    # Ctrl-C is for the trainer, which tells its trackers how the run ended.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(os.devnull, "w") as nowhere:
        tracker = _serve(channel, nowhere)
        if tracker is not None:
            faulthandler.dump_traceback_later(LEFT_S, exit=True, file=nowhere)
            tracker.finish("killed")


def _serve(channel: socket.socket, nowhere: TextIO) -> Tracker | None:
    """Answer messages; the tracker where the trainer is gone without having ended its run."""
    tracker: Tracker | None = None
    # A trainer that is killed leaves an answer unread, which is an error here.
    with contextlib.suppress(ConnectionError):
        while (message := wire.receive(channel)) is not None:
            # A thread of C that needs no lock of the interpreter: it also ends a package that holds that lock for ever.
            faulthandler.dump_traceback_later(message.pop("limit_s") + GRACE_S, exit=True, file=nowhere)
            ((name, given),) = message.items()
            tracker, answer = _call(tracker, name, given)
            faulthandler.cancel_dump_traceback_later()
            wire.send(channel, answer)
            if name == "finish":
                return None
    return tracker


def _call(tracker: Tracker | None, name: str, given: dict[str, Any]) -> tuple[Tracker | None, dict[str, Any]]:
    try:
        if name == "open":
            tracker = _open(**given)
            return tracker, {"id": tracker.id, "place": tracker.place}
        if "step" in given:
            given["step"] = int(given["step"])
        if name == "answers":
            given["table"] = Answers(*given["table"])
        getattr(tracker, name)(**given)
    except BaseException as error:  # what a foreign package raises, SystemExit included, costs the tracker and nothing else
        return tracker, {"error": worker.described(error)}
    return tracker, {}


def _open(module: str, run: dict[str, Any], options: dict[str, Any], path: list[str]) -> Tracker:
    """The run, open in the tracker of a module. path: where the trainer finds modules, and so this process, too."""
    sys.path[:] = path
    return importlib.import_module(module).open_run(TrackedRun(**run), **options)


if __name__ == "__main__":
    main()
