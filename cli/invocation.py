"""Commands to paste: the one that continues a run, and those that use its result."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path

_COMMAND_LINE: ContextVar[tuple[str, ...]] = ContextVar("command line")
STARTING = {"resume": 1, "overwrite": 0, "no_overwrite": 0}  # options that say how a run starts, and how many values each takes


def remember(command: str, argv: Sequence[str]) -> None:
    """Keep the command line of this process for `continuation`."""
    _COMMAND_LINE.set((command, *argv))


def program() -> str:
    """The name that starts treetune from a shell: its path where the shell would not find it, or find another."""
    path, on_path = sys.argv[0], shutil.which("treetune")
    is_script = os.path.basename(path) == "treetune" and os.path.exists(path)
    return path if is_script and (on_path is None or not os.path.samefile(on_path, path)) else "treetune"


def command(*words: object) -> str:
    """A treetune command line, quoted for a shell."""
    return shlex.join([program(), *map(str, words)])


def continuation(root: Path, *, overwrite: bool) -> str | None:
    """The command line that continues the run at `root` with all its options; None where this process has no command line.

    overwrite: whether the run overwrites, perhaps by a config file, which the new command line names again.
    """
    argv = _COMMAND_LINE.get(None)
    if argv is None:
        return None
    words, options, i = [argv[0]], set(), 1
    while i < len(argv):
        flag, equals, _ = argv[i].partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        options.add(name)
        if name in STARTING:
            i += 0 if equals else STARTING[name]
        else:
            words.append(argv[i])
        i += 1
    words += [] if "output_dir" in options else ["--output-dir", str(root)]
    words += ["--no-overwrite"] if overwrite and "overwrite" not in options else []
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return ("under torchrun, as before: " if several else "") + command(*words, "--resume", "auto")
