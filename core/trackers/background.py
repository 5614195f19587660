"""A tracker as an observer of a run: told in the background, in a process of its own.

The run never waits for a tracker: events go into a queue of a limited length, and a thread hands them over one by one. What raises, hangs
or crashes is left behind with one warning. The records of a step are told once, also where a run that was killed repeats some; what a
tracker missed (it was down, or added later) it is told from metrics.jsonl when it opens the run.
"""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from treetune.core import fields, masking, records
from treetune.core.rollout import descendants, wire
from treetune.core.run import marker
from treetune.core.run.health import Event
from treetune.core.run.observers import Observer
from treetune.core.run.recorder import Record
from treetune.core.trackers import tracker_process
from treetune.core.trackers.service import Service
from treetune.core.trackers.told import Book, Told

LONGEST = 10_000  # events that wait; at one a second, hours of a tracker that is slow
LONG = 10  # opening a run and copying a folder may take so many times as long as anything else
SHUTDOWN_S = 10.0  # for the package to leave its process, once all is told
BEST = "best.json"


class Lost(Exception):
    """The tracker raised, hangs or is gone; the message says which."""


class Background(Observer):
    """A tracker that is told of a run; `close` ends it. Lines for people wait until the run itself is here again (`_say`)."""

    def __init__(self, service: Service, root: Path, config: Mapping[str, Any], book: Book, *, timeout_s: float):
        self.service, self.root, self.config, self.book, self.timeout_s = service, root, config, book, timeout_s
        self.events: queue.Queue[dict[str, Any] | None] = queue.Queue(LONGEST)
        self.lines: queue.SimpleQueue[tuple[str, bool]] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None
        self.process: subprocess.Popen | None = None
        self.doing = ""  # the last call
        self.mark, self.told, self.left_out, self.lost = uuid.uuid4().hex, Told(), 0, False
        self.stopped: str | None = "failed"
        self.say: Callable[[str, bool], None] = lambda text, warning: None

    def start(self, total_steps: int, step: int, about: Mapping[str, str]) -> None:
        """Begin: the tracker opens the run while the run goes on."""
        self.thread = threading.Thread(target=self._run, args=(step, dict(about)), name=f"tracker {self.service.name}", daemon=True)
        self.thread.start()

    def step(self, record: Record) -> None:
        """The numbers of a step."""
        self._put({"numbers": dict(record), "kind": "step"})

    def evaluation(self, record: Record) -> None:
        """The numbers of an evaluation."""
        self._put({"numbers": dict(record), "kind": "evaluation"})

    def samples(self, answers: Sequence[dict[str, Any]]) -> None:
        """The answers to held-out prompts at an evaluation; of other samples nothing."""
        if answers and "row" in answers[0]:
            self._put(_table(answers))

    def health(self, event: Event) -> None:
        """A health rule fired."""
        self._put({"facts": {f"health/{event.rule}": f"{event.seen}: {event.fix}"}})

    def saved(self, path: Path, step: int | None) -> None:
        """A checkpoint was saved, or what was trained."""
        if ("end" if step is None else "checkpoint") in self.service.keeps:
            self._put({"copy": str(path)})

    def end(self, stopped: str | None, history: Sequence[Record]) -> None:
        """The steps have ended."""
        self.stopped = stopped
        self._say()

    def summary(self, rows: Mapping[str, str], history: Sequence[Record]) -> None:
        """What the run reached."""
        self._put({"facts": {name: masking.mask_secrets(text) for name, text in rows.items()} | _best(self.root)})

    def ask_to_end(self) -> None:
        """Tell the tracker, after all that waits, that the run has ended."""
        try:
            self.events.put_nowait(None)
        except queue.Full:
            self._kill()

    def close(self, deadline: float) -> None:
        """Wait until all is told, or until `deadline` of `time.monotonic`; what hangs is killed."""
        if self.thread is None:
            return
        self.thread.join(max(deadline - time.monotonic(), 0.0))
        if self.thread.is_alive():
            self.lost = True
            still = "has not opened the run (are its service and its key right?)" if self.doing == "open" else "has not finished"
            waiting = self.events.qsize()
            self._warn(f"{still} in time, {waiting} events were waiting; the run is complete in {self.root}")
            self._kill()
            self.thread.join(SHUTDOWN_S)
        if self.left_out:
            self._warn(f"was too slow for {self.left_out} events, which it has not been told")
        self._say()

    def _put(self, event: dict[str, Any]) -> None:
        self._say()
        if self.lost:
            return
        try:
            self.events.put_nowait(event)
        except queue.Full:
            self.left_out += 1

    def _say(self) -> None:
        """Pass on what the thread has to say, in the thread of the run."""
        while not self.lines.empty():
            self.say(*self.lines.get())

    def _warn(self, text: str) -> None:
        self.lines.put((masking.one_line(f"tracker {self.service.name} {text}"), True))

    def _run(self, step: int, about: dict[str, str]) -> None:
        """The thread: open the run, tell what was missed, then what comes."""
        try:
            with self._channel() as channel:
                self._open(channel, step, about)
                for record in self._missed(step):
                    self._tell(channel, record)
                while (event := self.events.get()) is not None:
                    self._tell(channel, event)
                self._call(channel, "finish", {"stopped": self.stopped}, LONG if self.service.keeps else 1)
                assert self.process is not None
                self.process.wait(SHUTDOWN_S)
        except subprocess.TimeoutExpired:
            pass  # all is told: what a package does on its way out concerns nobody
        except (Lost, OSError) as error:
            if not self.lost:
                self._warn(f"{error}; the run goes on without it")
            self.lost = True
        finally:
            self._kill()

    def _channel(self) -> socket.socket:
        """A socket to a new process."""
        ours, theirs = socket.socketpair()
        # What trackers print about themselves is no output of the run; with TREETUNE_TRACEBACK it is shown.
        shown = None if os.environ.get(fields.TRACEBACK) else subprocess.DEVNULL
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", tracker_process.__name__],
                stdin=theirs.fileno(),
                stdout=shown,
                stderr=shown,
                start_new_session=True,
                env=dict(os.environ) | {descendants.MARK: self.mark},
            )
        return ours

    def _open(self, channel: socket.socket, step: int, about: dict[str, str]) -> None:
        service, run_marker = self.service, marker.read(self.root)
        destination = json.dumps([masking.mask_secrets(str(service.options.get(name))) for name in service.destination])
        told, known = self.book.read(service.name), run_marker.run if run_marker is not None else uuid.uuid4().hex
        if told.destination != destination or service.id not in (None, told.id):
            told = Told()  # another run of the tracker
        if service.rewinds:
            last = min(told.step, step)
            told = told._replace(step=last, evaluation=min(told.evaluation, last), answers=min(told.answers, last))
        run = {
            "id": service.id or told.id or (known if service.made_here else None),
            "key": known,
            "continued": told.id is not None,
            "name": self.root.resolve().name,
            "folder": str(self.root),
            "step": told.step,
            "pid": os.getpid(),
            "config": dict(self.config),
            "about": {name: masking.mask_secrets(text) for name, text in about.items()},
        }
        given = {"module": service.module, "run": run, "options": service.options, "path": sys.path}
        answer = self._call(channel, "open", given, LONG)
        self._note(told._replace(id=answer["id"], destination=destination))
        self.lines.put((f"{service.name}: {answer['place']}", False))

    def _missed(self, step: int) -> Iterator[dict[str, Any]]:
        """The records up to the step where this process began which the tracker has not been told."""
        numbers = (record for record in records.read(self.root / "metrics.jsonl", numbers=True).records if record["step"] <= step)
        events = [{"numbers": record, "kind": "evaluation" if "eval/seconds" in record else "step"} for record in numbers]
        answers: dict[int, list[dict[str, Any]]] = {}
        for record in records.read(self.root / "samples.jsonl").records if self.told.answers < step else ():
            if "row" in record and record["step"] <= step:
                answers.setdefault(record["step"], []).append(record)
        # Sorted, and the answers last: packages take no step after a later one.
        yield from sorted([*events, *map(_table, answers.values())], key=_step)

    def _tell(self, channel: socket.socket, event: dict[str, Any]) -> None:
        if "numbers" in event:
            self._tell_numbers(channel, event["numbers"], event["kind"])
        elif "answers" in event:
            self._tell_once(channel, "answers", event["step"], "answers", {"table": event["answers"]})
        elif "facts" in event:
            self._call(channel, "facts", {"values": event["facts"]})
        elif os.path.isdir(event["copy"]):  # else a newer checkpoint has taken its place meanwhile
            self._call(channel, "copy", {"path": event["copy"], "name": Path(event["copy"]).name}, LONG)

    def _tell_numbers(self, channel: socket.socket, record: Record, kind: str) -> None:
        values = {name: value for name, value in record.items() if name != "step"}
        self._tell_once(channel, kind, int(record["step"]), "numbers", {"values": values})

    def _tell_once(self, channel: socket.socket, kind: str, step: int, call: str, given: dict[str, Any]) -> None:
        """Make a call about a step, unless the tracker has been told of this kind at it, or at a later one."""
        before = self.told
        if step <= getattr(before, kind):
            return
        self._note(before._replace(**{kind: step}))  # first: a step that is told twice is worse than one that a crash leaves out
        try:
            self._call(channel, call, {"step": step} | given)
        except Lost:
            self._note(before)
            raise

    def _note(self, told: Told) -> None:
        self.told = told
        self.book.write(self.service.name, told)

    def _call(self, channel: socket.socket, name: str, given: dict[str, Any], times: float = 1) -> dict[str, Any]:
        """The answer of the process to one call. Errors: Lost."""
        self.doing, limit_s = name, self.timeout_s * times
        channel.settimeout(limit_s)
        try:
            wire.send(channel, {name: given, "limit_s": limit_s})
            answer = wire.receive(channel)
        except TimeoutError:
            raise Lost(f"has not answered for {limit_s:g} s ({name})") from None
        except OSError:
            answer = None
        if answer is None:
            raise Lost(f"has ended in the middle of the run ({name})")
        if "error" in answer:
            raise Lost(f"failed ({name}): {answer['error']}")
        return answer

    def _kill(self) -> None:
        """End the process, and what it has started."""
        process = self.process
        if process is None:
            return
        descendants.kill(process.pid, self.mark)
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        process.wait()


COLUMNS = ("row", "prompt", "reference", "answer", "tokens")


def _table(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The event of the answers of an evaluation."""
    return {"answers": [COLUMNS, [[one.get(name) for name in COLUMNS] for one in answers]], "step": int(answers[0]["step"])}


def _step(event: dict[str, Any]) -> int:
    return int(event["step"] if "answers" in event else event["numbers"]["step"])


def _best(root: Path) -> dict[str, Any]:
    """best.json as facts."""
    try:
        values = json.loads((root / BEST).read_text(encoding="utf-8"))
        return {f"best/{name}": value for name, value in values.items() if isinstance(value, str | int | float)}
    except (OSError, ValueError, AttributeError):
        return {}


def close(trackers: Sequence[Background]) -> None:
    """End all trackers at once, each within its time."""
    now = time.monotonic()
    for one in trackers:
        one.ask_to_end()
    for one in trackers:
        one.close(now + one.timeout_s * (LONG if one.service.keeps else 1))
