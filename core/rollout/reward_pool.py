"""Rewards in worker processes: functions named by import path score groups, and one that hangs or crashes costs a row, not the run.

P prompts, G completions of each, K reward functions; a row is one completion.
A function has the signature `fn(completions, **columns) -> list[float | None]`: `completions` are texts, or for prompts of messages
`[{"role": "assistant", "content": text}]`; `prompts`, `completion_ids` and the columns of the data set come as lists as long, where its
parameters name them or it has **kwargs. None is no opinion. `worker` is the other end; `builtin` has rewards to start with.
"""

import math
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import NamedTuple

import numpy as np

from treetune.core.data.prompts import Prompt
from treetune.core.rollout import descendants, echo, wire, worker
from treetune.core.rollout.group import Group

START_S = 120.0  # a module of rewards may import large packages
OURS = ("prompts", "completions", "completion_ids")
NOT_COLUMNS = {*OURS, "prompt", "completion"}


class Process(NamedTuple):
    """A worker process, leader of a process group of its own, the channel to it, and its mark."""

    process: subprocess.Popen
    channel: socket.socket
    mark: str


class Task(NamedTuple):
    """One call: function k on rows, numbered through all groups."""

    function: int
    rows: tuple[int, ...]


class Job(NamedTuple):
    """What a process is at: a call, or its own start (None), and until when it may take."""

    task: Task | None
    deadline: float


class Pool:
    """Reward functions in worker processes, until `close`, which a `with` block calls.

    names: built in, or import paths, with options after `?`. workers: processes that share the prompts. timeout_s: of one call, which
    holds the rows of a worker's share of the prompts; when a call fails its rows are tried again one by one, with the limit each.
    weights [K]: kept for whoever combines the rewards, 1 each if not given. say: told the first failure of each function.
    log: file that gets what the functions print; standard error if None. One thread at a time may score.
    Errors: ValueError for names that cannot be loaded, bad weights, and (scoring) a function of which every call failed.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        workers: int = 1,
        timeout_s: float = 30.0,
        weights: Sequence[float] | None = None,
        say: Callable[[str], None] = lambda text: None,
        log: str | os.PathLike | None = None,
    ):
        self.names, self.weights = tuple(names), _weights(names, weights)
        if workers < 1 or not 0 < timeout_s < math.inf:
            raise ValueError(f"rewards have {workers} workers and {timeout_s} seconds: expected at least 1 worker, and seconds above 0")
        self._workers, self._timeout_s, self._say = workers, timeout_s, say
        self._counts = [_count() for _ in self.names]
        self._seen: set[str] = set()  # columns of the prompts so far
        self._alive: set[Process] = set()
        self._busy: dict[Process, Job] = {}
        self._echo = echo.Echo(log)
        # It holds the set and not the pool, which it would keep alive, and runs at the end of the program too.
        self._kill_all = weakref.finalize(self, _kill_all, self._alive, os.getpid())
        self._takes = self._start_all()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends every worker, and what their functions started."""
        self._kill_all()
        self._echo.close()

    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [child.process.pid for child in self._alive]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """ValueError when a function needs a column that no prompt has: known before anything is sampled."""
        self._seen.update(name for prompt in prompts for name in prompt.columns)
        for name, takes in zip(self.names, self._takes, strict=True):
            missing = [column for column in takes["required"] if column not in self._seen and column not in OURS]
            if missing and prompts:
                have = ", ".join(sorted(self._seen)) or "none"
                raise ValueError(f"reward {name} takes {missing[0]}, which is no column of the prompts (columns: {have})")

    def score(self, groups: Sequence[Group]) -> np.ndarray:
        """Rewards float64 [P, G, K] of the groups; nan where a function has no opinion or failed."""
        self._refuse_closed()
        sizes = {len(group.completions) for group in groups}
        if len(sizes) > 1:
            raise ValueError(f"groups have {sorted(sizes)} completions: expected as many for each prompt")
        self.check([group.prompt for group in groups])
        size = max(sizes, default=0)
        rewards = np.full((len(groups), size, len(self.names)), np.nan)
        before = [dict(count) for count in self._counts]
        self._run(_tasks(len(groups), size, len(self.names), self._workers), groups, rewards)
        self._refuse_useless(before, len(groups), size)
        self._tell_retries(before)
        return rewards

    def report(self) -> dict[str, dict]:
        """For each function so far: rows, numbers, abstained, failed, retried, restarts (of workers), first and last message."""
        return {name: dict(count) for name, count in zip(self.names, self._counts, strict=True)}

    def _refuse_closed(self) -> None:
        if not self._kill_all.alive:
            raise RuntimeError("the pool of rewards is closed")

    def _start_all(self) -> list[dict]:
        """What the first worker says of each function."""
        for _ in range(self._workers):
            self._start()
        infos: list[list[dict]] = []
        try:
            while self._busy:
                infos += [answer["functions"] for _, _, answer, _ in self._answers() if answer]
        except BaseException:
            self.close()
            raise
        return infos[0]

    def _start(self) -> None:
        self._refuse_closed()
        # The channel is the standard input of the worker: what functions print goes elsewhere, and cannot be taken for an answer.
        ours, theirs = socket.socketpair()
        # -P: a file of the folder, such as random.py, must not hide a module that the worker itself imports.
        command = [sys.executable, "-P", "-u", "-m", worker.__name__]
        out, mark = self._echo.pipe(ours.fileno()), uuid.uuid4().hex
        environment = dict(os.environ) | {descendants.MARK: mark}
        with theirs:
            try:
                # In a session of its own Ctrl-C at the terminal does not reach it, and its group can be killed as a whole.
                process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=out, stderr=out, start_new_session=True, env=environment)
            finally:
                os.close(out)
        child = Process(process, ours, mark)
        self._alive.add(child)
        self._send(child, None, {"names": self.names, "limit_s": START_S}, START_S)

    def _send(self, child: Process, task: Task | None, message: dict, limit_s: float) -> None:
        self._busy[child] = Job(task, time.monotonic() + limit_s)
        child.channel.settimeout(limit_s)
        self._echo.renew(child.channel.fileno())
        try:
            wire.send(child.channel, message)
        except OSError:
            pass  # gone or stuck: reading its answer says so
        except (TypeError, ValueError) as error:
            raise ValueError(_not_json(message["rows"])) from error

    def _run(self, tasks: deque[Task], groups: Sequence[Group], rewards: np.ndarray) -> None:
        columns = sorted({name for group in groups for name in group.prompt.columns} - NOT_COLUMNS)
        try:
            while tasks or any(job.task for job in self._busy.values()):
                self._hand_out(tasks, groups, columns)
                for child, job, answer, why in self._answers():
                    if job.task:
                        tasks.extendleft(reversed(self._settle(job.task, answer, why, groups, rewards)))
                        self._counts[job.task.function]["restarts"] += child not in self._alive
        except BaseException:  # also Ctrl-C: an answer that is still to come must not be taken for the next one's
            for child in list(self._busy):
                self._kill(child)
            raise

    def _hand_out(self, tasks: deque[Task], groups: Sequence[Group], columns: list[str]) -> None:
        for child in [child for child in self._alive - self._busy.keys() if child.process.poll() is not None]:
            self._kill(child)  # ended while idle: no row pays for that
        for child in list(self._alive - self._busy.keys())[: len(tasks)]:
            task = tasks.popleft()
            takes = self._takes[task.function]
            rows = _rows(task, groups, [name for name in (*OURS, *columns, *takes["required"]) if takes["rest"] or name in takes["takes"]])
            self._send(child, task, {"function": task.function, "rows": rows, "limit_s": self._timeout_s}, self._timeout_s)
        starting = sum(job.task is None for job in self._busy.values())
        for _ in range(min(len(tasks) - starting, self._workers - len(self._alive))):
            self._start()

    def _answers(self) -> list[tuple[Process, Job, dict | None, str]]:
        """Waits for processes that answer, end or are late: (process, its job, answer or None, why there is none)."""
        wait_s = min(job.deadline for job in self._busy.values()) - time.monotonic()
        ready = set(connection.wait([child.channel for child in self._busy], max(wait_s, 0)))
        now, out = time.monotonic(), []
        for child, job in list(self._busy.items()):
            if child.channel in ready or job.deadline <= now:
                answer, why = _answer(child, job) if child.channel in ready else (None, "")
                del self._busy[child]
                if answer is None:
                    why = why or f"no answer within {self._timeout_s if job.task else START_S:g} s"
                    self._kill(child)
                if job.task is None and (answer is None or "error" in answer):
                    raise ValueError(answer["error"] if answer else f"rewards {', '.join(self.names)} cannot be loaded: {why}")
                out.append((child, job, answer, why))
        return out

    def _kill(self, child: Process) -> None:
        self._busy.pop(child, None)
        self._alive.discard(child)
        _kill(child)

    def _settle(self, task: Task, answer: dict | None, why: str, groups: Sequence[Group], rewards: np.ndarray) -> list[Task]:
        """Takes an answer down; gives the calls to make instead when it failed."""
        count, size = self._counts[task.function], rewards.shape[1]
        answer = answer or {"error": why}
        # Which row hung or crashed the worker is not known: one by one, only that row pays.
        if "error" in answer and len(task.rows) > 1:
            count["retried"] += len(task.rows)
            return [Task(task.function, (row,)) for row in task.rows]
        values = answer.get("values") or [answer.get("error") or answer["length"]] * len(task.rows)
        for row, value in zip(task.rows, values, strict=True):
            count["rows"] += 1
            if isinstance(value, str):
                self._fail(task.function, f"{value}; data set row {groups[row // size].prompt.row}, completion {row % size}")
            elif value is None:
                count["abstained"] += 1
            else:
                count["numbers"] += 1
                rewards[row // size, row % size, task.function] = value
        return []

    def _fail(self, function: int, message: str) -> None:
        count = self._counts[function]
        count["failed"] += 1
        count["last"] = message
        if not count["first"]:
            count["first"] = message
            self._say(f"reward {self.names[function]} failed, which counts as no opinion: {message}")

    def _refuse_useless(self, before: list[dict], prompts: int, size: int) -> None:
        for name, old, new in zip(self.names, before, self._counts, strict=True):
            # One prompt can be to blame for all its completions; a function that has never worked is to blame itself.
            never = new["failed"] == new["rows"]
            if prompts * size and new["failed"] - old["failed"] == prompts * size and (prompts > 1 or never):
                raise ValueError(
                    f"reward {name}: every call failed, {prompts * size} rows: {new['last'] if old['first'] else new['first']}"
                )

    def _tell_retries(self, before: list[dict]) -> None:
        """Once, where calls failed of which every row alone went well: a time limit for too many rows."""
        for name, old, new in zip(self.names, before, self._counts, strict=True):
            if new["retried"] > old["retried"] == 0 and new["failed"] == old["failed"]:
                self._say(
                    f"reward {name}: {new['retried']} rows failed together and not one alone; more workers or time save the second try"
                )


def _weights(names: Sequence[str], weights: Sequence[float] | None) -> np.ndarray:
    values = np.ones(len(names)) if weights is None or not len(weights) else np.array(weights, np.float64)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"rewards are {list(names)}: expected at least one, and none twice")
    if values.shape != (len(names),) or not np.isfinite(values).all():
        raise ValueError(f"weights are {values.tolist()} for the rewards {', '.join(names)}: expected {len(names)} finite numbers")
    return values


def _count() -> dict:
    return {"rows": 0, "numbers": 0, "abstained": 0, "failed": 0, "retried": 0, "restarts": 0, "first": "", "last": ""}


def _tasks(prompts: int, size: int, functions: int, workers: int) -> deque[Task]:
    """One call for each function and worker, on whole groups."""
    shares = [share for share in np.array_split(np.arange(prompts * size).reshape(prompts, size), min(workers, prompts) or 1) if share.size]
    return deque(Task(k, tuple(share.ravel().tolist())) for k in range(functions) for share in shares)


def _rows(task: Task, groups: Sequence[Group], names: list[str]) -> dict[str, list]:
    """The arguments of a call: one list a name, one value a row; None where a prompt lacks the column."""
    size = len(groups[0].completions)
    rows = [(groups[row // size].prompt, groups[row // size].completions[row % size]) for row in task.rows]
    columns: dict[str, list] = {}
    for name in {"completions": None, **dict.fromkeys(names)}:
        if name == "completions":
            columns[name] = [
                [{"role": "assistant", "content": completion.text}] if prompt.messages is not None else completion.text
                for prompt, completion in rows
            ]
        elif name == "prompts":
            columns[name] = [prompt.text if prompt.messages is None else prompt.messages for prompt, _ in rows]
        elif name == "completion_ids":
            columns[name] = [completion.tokens.tolist() for _, completion in rows]
        else:
            columns[name] = [prompt.columns.get(name) for prompt, _ in rows]
    return columns


def _not_json(rows: dict[str, list]) -> str:
    """Says which column of a call cannot be written as JSON."""
    for name, values in rows.items():
        for value in values:
            try:
                wire.dumps(value)
            except (TypeError, ValueError) as error:
                return f"column {name} holds {value!r:.60}, which rewards cannot be sent ({error}): turn it into text, numbers or lists"
    raise AssertionError("every column is JSON")


def _answer(child: Process, job: Job) -> tuple[dict | None, str]:
    # At least a second, for the rest of an answer whose first bytes came in time.
    child.channel.settimeout(max(job.deadline - time.monotonic(), 1.0))
    try:
        answer = wire.receive(child.channel)
    except TimeoutError:
        return None, ""
    except OSError:
        answer = None
    return answer, "" if answer else _ended(child.process)


def _ended(process: subprocess.Popen) -> str:
    try:
        code = process.wait(1.0)
    except subprocess.TimeoutExpired:
        return "the worker process closed its channel"
    return (
        f"the worker process was ended by {signal.Signals(-code).name}" if code < 0 else f"the worker process ended with exit code {code}"
    )


def _kill(child: Process) -> None:
    """The process and what it started, in its group or in one of its own."""
    child.channel.close()
    # Before the worker itself: without it they have another parent, and are found by their mark only.
    descendants.kill(child.process.pid, child.mark)
    try:
        if hasattr(os, "killpg"):
            os.killpg(child.process.pid, signal.SIGKILL)
        else:  # Windows
            child.process.kill()
    except (ProcessLookupError, PermissionError):
        pass  # nothing of the group is left
    child.process.wait()


def _kill_all(alive: set[Process], owner: int) -> None:
    while alive and os.getpid() == owner:  # a fork of the owner that exits leaves the workers alone
        _kill(alive.pop())
