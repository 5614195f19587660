"""`--sweep`: one run after another, each in a process and a folder of its own, and a table at the end.

A run in this process could end the sweep with it: out of memory, a crash of a kernel, a signal. Imports no torch.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from treetune.cli.screen import Screen
from treetune.core.config import flags, product
from treetune.core.config.table import Option
from treetune.core.run import journal, runs, sweeps
from treetune.core.run.errors import checking_input
from treetune.core.run.sweeps import Sweep

Check = Callable[[list[str]], Any]  # raises ValueError for the arguments of a run that cannot be


def run(command: str, argv: Sequence[str], options: Mapping[str, Option], check: Check) -> int:
    """Do the runs of a sweep that are not done yet; the exit code: 0 all are done, 1 one is not, 130 and 143 after a signal.

    check(arguments) -> the config of a run; all are checked before the first one starts.
    """
    screen = Screen()
    with checking_input("the command line"):
        planned, folder = _plan(argv, options)
        points = list(planned.points())
        for _, args in points:
            check(args)
        shared = sweeps.digest(command, planned.shared, flags.take_config(list(argv))[1])
        sweep = sweeps.begin(folder, shared, [values for values, _ in points])
    relay, failed = _Relay(), []
    with relay:
        for number, (values, args) in enumerate(points, 1):
            name = sweep.name_of(values)
            assert name is not None
            if relay.signum is not None:
                break
            root = sweep.root / name
            screen.line(f"\nsweep {number} of {len(points)}: {_words(values)} in {root}", "bold")
            if not _one(command, args, root, relay, screen):
                failed.append(name)
            sweeps.write_page(sweep)
    return _end(sweep, failed, relay.signum, screen)


def _plan(argv: Sequence[str], options: Mapping[str, Option]) -> tuple[product.Product, str | None]:
    """The product, without the folder of the sweep, and that folder."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--sweep starts processes of its own: leave out torchrun")
    given = [arg.partition("=")[0] for arg in argv if arg.startswith("--")]
    for name in ("--resume", "--overwrite"):
        if name in given:
            raise ValueError(f"{name} does not go with --sweep: a sweep that is started again in its --output-dir does what is left of it")
    planned = product.read(argv, options)
    folders = [arg.partition("=")[2] for arg in planned.shared if arg.startswith("--output-dir=")]
    shared = [arg for arg in planned.shared if not arg.startswith("--output-dir=")]
    return planned._replace(shared=shared), folders[0] if folders else None


def _words(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {text}" for name, text in values.items())


def _one(command: str, args: Sequence[str], root: Path, relay: "_Relay", screen: Screen) -> bool:
    """Do a run, or go on with it; whether it is done."""
    old = runs.read(root) if runs.is_run(root) else None
    if old is not None and sweeps.is_done(old):
        screen.line(f"done already: {old.state}")
        return True
    if old is not None and old.state == journal.RUNNING:
        screen.warn(f"another process has it: {old.reason}")
        return False
    resume = [] if old is None else ["--resume=auto"]
    code = relay.call([sys.executable, "-P", "-m", "treetune.cli.main", command, *args, f"--output-dir={root}", *resume])
    if code and relay.signum is None:
        screen.warn(f"{root.name} has failed (exit code {code}); the sweep goes on")
    return code == 0


class _Relay:
    """Runs one process after another and passes signals on to it, each once; `signum` is the first that came."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self.child: subprocess.Popen | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "_Relay":
        self.before = {signum: signal.signal(signum, self._pass_on) for signum in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, action in self.before.items():
            signal.signal(signum, action)

    def _pass_on(self, signum: int, frame: object) -> None:
        self.signum = self.signum or signum
        if self.child is not None:
            self.child.send_signal(signum)

    def call(self, command: Sequence[str]) -> int:
        """Run a process to its end; its exit code."""
        # In a session of its own: a terminal would send Ctrl-C to it as well, and twice means to leave at once.
        self.child = subprocess.Popen(command, start_new_session=True)
        try:
            return self.child.wait()
        finally:
            self.child = None


def _end(sweep: Sweep, failed: Sequence[str], signum: int | None, screen: Screen) -> int:
    """Print the table; the exit code."""
    page = sweeps.write_page(sweep)
    screen.line("")
    screen.grid(sweeps.columns(sweep), sweeps.rows(sweep))
    screen.line(f"\n{page}")
    if signum is not None:
        screen.warn(f"interrupted: the same command with --output-dir {sweep.root} does what is left")
        return 128 + signum
    if failed:
        screen.warn(f"not done: {', '.join(failed)}; treetune doctor {sweep.root / failed[0]} says why")
    return 1 if failed else 0
