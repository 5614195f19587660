"""`treetune fetch`: get a model onto this machine."""

import sys

from treetune.cli.options.commands import Fetch
from treetune.core.run.errors import checking_input
from treetune.models import fetch


def run(config: Fetch, given: frozenset[str]) -> int:
    """Get a model and print where it is; the exit code."""
    with checking_input():
        path = fetch.resolve(config.name, say=lambda line: print(line, file=sys.stderr))
    print(path)
    return 0
