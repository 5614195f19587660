"""Commands to paste: the one that continues a run, and those that use its result."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from treetune.cli.options.commands import Score

_COMMAND_LINE: ContextVar[tuple[str, ...]] = ContextVar("command line")
STARTING = {"resume": 1, "overwrite": 0, "no_overwrite": 0}  # options that say how a run starts, and how many values each takes


def remember(command: str, argv: Sequence[str]) -> None:
    """Keep the command line of this process for `continuation`."""
    _COMMAND_LINE.set((command, *argv))


def words() -> tuple[str, ...]:
    """The command line of this process: the command and its arguments."""
    return _COMMAND_LINE.get(())


def program() -> str:
    """The name that starts treetune from a shell: its path where the shell would not find it, or find another."""
    path, on_path = sys.argv[0], shutil.which("treetune")
    is_script = os.path.basename(path) == "treetune" and os.path.exists(path)
    return path if is_script and (on_path is None or not os.path.samefile(on_path, path)) else "treetune"


def command(*words: object) -> str:
    """A treetune command line, quoted for a shell."""
    return shlex.join([program(), *map(str, words)])


def continuation(root: Path, *, overwrite: bool, secrets: frozenset[str] = frozenset()) -> str | None:
    """The command line that continues the run at `root` with all its options; None where this process has no command line.

    overwrite: whether the run overwrites, perhaps by a config file, which the new command line names again. secrets: options to leave out.
    """
    argv = _COMMAND_LINE.get(None)
    if argv is None:
        return None
    words, options, i = [argv[0]], set(), 1
    left_out = STARTING | dict.fromkeys(secrets, 1)
    while i < len(argv):
        flag, equals, _ = argv[i].partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        options.add(name)
        if name in left_out:
            i += 0 if equals else left_out[name]
        else:
            words.append(argv[i])
        i += 1
    words += [] if "output_dir" in options else ["--output-dir", str(root)]
    words += ["--no-overwrite"] if overwrite and "overwrite" not in options else []
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1 and "nproc" not in options and "nnodes" not in options
    return ("under torchrun, as before: " if several else "") + command(*words, "--resume", "auto")


def trial(data: Any, saved: Path, *, scores: bool, adapter: bool, chat: bool) -> str:
    """The command that tries what a run left in its folder. data: the options of the rows; chat: whether the rows were conversations."""
    if scores:
        return command("score", saved.parent, "--data", data.data[0] if data.data else "ROWS", *_score_options(data))
    place = ("--adapter" if adapter else "--model", saved)
    return command("chat", *place) if chat else command("generate", "Once upon a time", "--raw", *place)


def _score_options(options: Any) -> list[Any]:
    """Options of `treetune score` for rows to be read as the run read them, where its defaults would not do so."""
    default = Score()
    names = ("format", "split", "sequence_len", "chat_template", "step_separator")
    values = {name: getattr(options, name, getattr(default, name)) for name in names}
    return [part for name, value in values.items() if value != getattr(default, name) for part in (f"--{name.replace('_', '-')}", value)]
