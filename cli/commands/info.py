"""`treetune info`: this machine, or a model, an adapter or a run, in a few lines."""

from pathlib import Path

from treetune.cli import memory_rows
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
        rows = _rows(config, given, screen)
    screen.table("", rows)
    return 0


def _rows(config: Info, given: frozenset[str], screen: Screen) -> dict[str, str]:
    name, options = config.path, sorted(given - {"path"})
    if name is not None and not any((Path(name) / file).is_file() for file in ("config.yaml", adapter.CONFIG)):
        model = fetch.resolve(name, say=screen.line)
        return describe.describe_model(model) | memory_rows.of_model(model, config.memory)
    if options:
        raise ValueError(f"--{options[0].replace('_', '-')} would be ignored: it is for the memory of a run, and needs the path of a model")
    if name is None:
        return machine.describe()
    if (Path(name) / "config.yaml").is_file():
        return status.describe(Path(name))
    return describe.describe_adapter(Path(name))
