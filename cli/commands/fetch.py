"""`treetune fetch`: get a model onto this machine, or the examples and pages of this version into a folder."""

import sys
from pathlib import Path

from treetune.cli.options.commands import Fetch
from treetune.core.data import bundled
from treetune.core.run import guard
from treetune.core.run.errors import checking_input
from treetune.models import fetch

BUNDLED = ("examples", "docs")


def run(config: Fetch, given: frozenset[str]) -> int:
    """Get a model and print where it is, or copy what comes with the package; the exit code."""
    with checking_input():
        if config.name in BUNDLED:
            path = Path(config.dest or config.name)
            guard.require_new_folder(str(path), "--dest")
            print(f"{bundled.copy(config.name, path)} files", file=sys.stderr)
        else:
            path = fetch.resolve(config.name, say=lambda line: print(line, file=sys.stderr))
    print(path)
    return 0
