"""`treetune info`: this machine, or a model, an adapter or a run, in a few lines."""

from pathlib import Path

from treetune.cli.options.commands import Info
from treetune.cli.screen import Screen
from treetune.core import machine
from treetune.core.run import status
from treetune.core.run.errors import checking_input
from treetune.models import adapter, describe, fetch


def run(config: Info, given: frozenset[str]) -> int:
    """Print the table for what the path is; the exit code."""
    screen = Screen()
    with checking_input():
        rows = _rows(config.path, screen)
    screen.table("", rows)
    return 0


def _rows(name: str | None, screen: Screen) -> dict[str, str]:
    if name is None:
        return machine.describe()
    if (Path(name) / "config.yaml").is_file():
        return status.describe(Path(name))
    if (Path(name) / adapter.CONFIG).is_file():
        return describe.describe_adapter(Path(name))
    return describe.describe_model(fetch.resolve(name, say=screen.line))
