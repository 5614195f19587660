"""Several processes of one command on this machine, and with those of other machines: torchrun's own agent, in this process.

A process that fails ends the others (they have 30 s to end by themselves), and with restarts all of them start again.
"""

import contextlib
import dataclasses
import hashlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from treetune.core.run.errors import RunFailed

SAVING = 600  # seconds that processes have to save and end after a signal
SAID = (1, 2)  # exit codes of processes that have said what is wrong
RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"


class Launch(NamedTuple):
    """processes: on this machine. machines: that take part. rendezvous: HOST:PORT of the first. restarts: after a failure, of all."""

    processes: int
    machines: int = 1
    rendezvous: str | None = None
    restarts: int = 0


def inside() -> bool:
    """Whether this process is one of those that torchrun or `run` has started."""
    return "LOCAL_WORLD_SIZE" in os.environ


def restarted() -> bool:
    """Whether the processes have been started again after one of them failed."""
    return int(os.environ.get(RESTART_COUNT, 0)) > 0


def run(arguments: Sequence[str], launch: Launch, tell: Callable[[str], None]) -> int:
    """Start `python ARGUMENTS` in each process and wait; the exit code: of the process that failed first, 128 + N after signal N.

    tell(text): before all start again, of the process of this machine that has failed.
    Errors: RunFailed, with the rank, where a process ended without a word: killed, or with another code than 1 and 2.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its warnings are said below, in one line
    logging.getLogger("torch.distributed.launcher").setLevel(logging.CRITICAL)
    # As many threads as there are cores for each would starve all of them.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // launch.processes)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else each wait for a rank that has gone leaves a stack of torch's own
    if launch.machines == 1 and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo asks for the name of the machine, which not all resolve
    if launch.restarts:
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # a shared store still has the addresses of the processes before
    try:
        with _telling(tell):
            elastic_launch(_config(launch), sys.executable)(*arguments)
    except ChildFailedError as error:
        return _failed(error)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _config(launch: Launch) -> Any:
    from torch.distributed.launcher.api import LaunchConfig

    alone = launch.machines == 1
    options = {
        "min_nodes": launch.machines, "max_nodes": launch.machines, "nproc_per_node": launch.processes, "rdzv_backend": "c10d",
        "rdzv_endpoint": "localhost:0" if alone else launch.rendezvous, "run_id": uuid.uuid4().hex if alone else "treetune",
        "max_restarts": launch.restarts, "start_method": "spawn", "shutdown_timeout": SAVING, "local_addr": "localhost" if alone else None,
    }  # fmt: skip
    known = {field.name for field in dataclasses.fields(LaunchConfig)}  # older ones have no shutdown_timeout
    return LaunchConfig(**{name: value for name, value in options.items() if name in known})


@contextlib.contextmanager
def _telling(tell: Callable[[str], None]) -> Iterator[None]:
    """Inside, the agent of this process says why all start again."""
    from torch.distributed.launcher import api

    plain: Any = api.LocalElasticAgent

    class Agent(plain):
        """torchrun's own, which is silent about it."""

        def _monitor_workers(self, worker_group: Any) -> Any:
            found = super()._monitor_workers(worker_group)
            if found.failures and (left := self._remaining_restarts) > 0:
                number = worker_group.spec.max_restarts - left + 1
                tell(f"{_ended(*_first(found.failures))}; all ranks start again (restart {number} of {worker_group.spec.max_restarts})")
            return found

    api.LocalElasticAgent = Agent
    try:
        yield
    finally:
        api.LocalElasticAgent = plain


def _first(failures: Mapping[int, Any]) -> tuple[int, Any]:
    """The rank, and its failure, for want of which the others fail: one that was killed, or the first."""
    killed = [(rank, one) for rank, one in failures.items() if one.exitcode < 0 and one.exitcode != -signal.SIGTERM]
    return killed[0] if killed else min(failures.items(), key=lambda item: item[1].timestamp)


def _ended(rank: int, failure: Any) -> str:
    code = failure.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = ", as the system does where memory runs out" if -code == signal.SIGKILL else ""
    return f"rank {rank} (process {failure.pid}) {how}{hint}"


def _failed(error: Any) -> int:
    rank, failure = _first(error.failures)
    if failure.exitcode in SAID:
        return failure.exitcode
    raise RunFailed(f"{_ended(rank, failure)}; the other ranks were stopped")


def first_to_say(text: str) -> bool:
    """Whether none of the other ranks has asked this of the same text: what all of them find is said once."""
    if not inside() or "torch.distributed" not in sys.modules:
        return True
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized():
        return True
    try:
        key = hashlib.sha256(text.encode()).hexdigest()
        return distributed.distributed_c10d._get_default_store().add(f"said/{key}/{os.environ.get(RESTART_COUNT)}", 1) == 1
    except (RuntimeError, ValueError):  # the store is gone with the process that held it
        return True


def continued(root: Path) -> dict[str, Any]:
    """Options under which processes that are started again go on in a run folder: from its newest checkpoint, or anew without one."""
    from treetune.core import ckpt

    begun = bool(ckpt.numbered(root / "checkpoints"))
    return {"resume": "auto", "overwrite": False} if begun else {"resume": None, "overwrite": root.exists()}
