"""Commands to paste: the one that was given, so that it goes on, and the one that tries what a run has left."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path

_GIVEN: ContextVar[tuple[str, ...]] = ContextVar("command line")
STARTING = {"resume": 1, "overwrite": 0, "no_overwrite": 0}  # options that say how a run was started, and their values


def remember(command: str, argv: Sequence[str]) -> None:
    """Keep the command line of this process for `continuation`."""
    _GIVEN.set((command, *argv))


def program() -> str:
    """The name that starts treetune from a shell: its path where the shell would not find it, or find another."""
    path, known = sys.argv[0], shutil.which("treetune")
    own = os.path.basename(path) == "treetune" and os.path.exists(path)
    return path if own and (known is None or not os.path.samefile(known, path)) else "treetune"


def command(*words: object) -> str:
    """A command line of ours, quoted for a shell."""
    return shlex.join([program(), *map(str, words)])


def continuation(root: Path, *, overwrite: bool) -> str | None:
    """The command line that continues the run at `root` with all its options; None where nobody gave one.

    overwrite: whether the run was started so, perhaps by a config file, which is given again.
    """
    given = _GIVEN.get(None)
    if given is None:
        return None
    words, named, i = [given[0]], set(), 1
    while i < len(given):
        flag, equals, _ = given[i].partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        named.add(name)
        if name in STARTING:
            i += 0 if equals else STARTING[name]
        else:
            words.append(given[i])
        i += 1
    words += [] if "output_dir" in named else ["--output-dir", str(root)]
    words += ["--no-overwrite"] if overwrite and "overwrite" not in named else []
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return ("under torchrun, as before: " if several else "") + command(*words, "--resume", "auto")
