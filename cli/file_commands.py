"""Commands that begin with the file of a run: `treetune train run.yaml`, other commands on it, and runs that say what they would do."""

import os
import sys
from collections.abc import Sequence
from typing import Any

from treetune.cli import run_file
from treetune.cli.axolotl.flags import CHOOSE
from treetune.cli.methods import METHODS
from treetune.cli.methods.method import Method
from treetune.cli.planning import command as planning
from treetune.cli.planning.command import Asked
from treetune.core.config import flags, table
from treetune.core.config.table import Config
from treetune.core.run.errors import checking_input

HELP = "train as a file says, of treetune or of axolotl: treetune train run.yaml"
DRY = "--dry-run"
USAGE = f"""usage: treetune train FILE [options]

Train as a config file says: one that a run of ours left or `treetune convert` wrote, or one of axolotl's. FILE may be an address.
The file names the method; the options are those of its command, and flags win over the file. Behind a file of axolotl's its keys are
flags, too.

  {DRY}   read and check the file, say what the run would be, and write nothing"""


def resolve(command: str, argv: Sequence[str]) -> tuple[str, list[str], bool]:
    """The command, its arguments with a file of a run behind --config, and whether it is only to say what it would do.

    Errors: ValueError for `train` without a file, and for a file that names no method.
    """
    dry = DRY in argv and (command == "train" or command in METHODS)
    rest = [arg for arg in argv if not dry or arg != DRY]
    if command == "train" and {"--help", "-h"} & set(rest):
        print(USAGE)
        sys.exit(0)
    if rest and run_file.is_file(rest[0]) and (command == "train" or command in METHODS or command in run_file.TAKEN):
        rest = ["--config", *rest]
    if command != "train":
        return command, rest, dry
    path = flags.take_config(rest)[1]
    if path is None:
        raise ValueError("treetune train needs a config file, such as treetune train run.yaml; without one name the method: treetune sft")
    _, over = run_file.foreign_flags(rest, path, {})
    chosen = {key: value for key, value in over.items() if key in CHOOSE}
    return run_file.method_of(run_file.load(path) | chosen, path), rest, dry


def resolve_plan(argv: Sequence[str]) -> tuple[str, list[str], Asked]:
    """The method of a plan, its arguments, and what the plan is asked.

    Errors: ValueError without a file or the name of a method.
    """
    if {"--help", "-h"} & set(argv):
        print(planning.USAGE)
        sys.exit(0)
    asked, rest = planning.take(argv)
    if rest and rest[0] in METHODS:
        return rest[0], rest[1:], asked
    if not (rest and run_file.is_file(rest[0])) and flags.take_config(rest)[1] is None:
        raise ValueError("treetune plan needs a config file or the name of a method, such as treetune plan run.yaml or treetune plan sft")
    command, rest, _ = resolve("train", rest)
    return command, rest, asked


def plan(asked: Asked, config: Any, method: Method | None, given: frozenset[str], file: str | None) -> int:
    """Check a config as a run would, and print what the run would take; the exit code."""
    from treetune.cli import requirements

    if method is None:
        raise ValueError("treetune plan is of commands that train")
    return planning.run(asked, requirements.plan(config, method, given, file)[0], method)


def say(line: str) -> None:
    """Print what a file means, on the first of several processes."""
    from treetune.cli.screen import Screen

    Screen(quiet=int(os.environ.get("RANK", 0)) > 0).line(line)


def dry_run(config: Any, method: Method | None, given: frozenset[str], file: str | None) -> int:
    """Check a config as a run would and print what the run would be; the exit code. Nothing is loaded or written."""
    from treetune.cli import requirements
    from treetune.cli.screen import Screen

    if method is None:
        raise ValueError(f"{DRY} is for commands that train")
    config, missing = requirements.plan(config, method, given, file)
    screen = Screen()
    with checking_input(config.model.model):
        memory = _memory(config)
    screen.table(f"treetune {method.name}", _shown(config, given) | memory)
    if (text := _room(config)) is not None:
        screen.line(text, "yellow")
    for text in missing:
        screen.line(f"not here, and the run would stop: {text}", "yellow")
    screen.line("the config resolves; nothing was loaded or written")
    return 0


def _shown(config: Config, given: frozenset[str]) -> dict[str, str]:
    """The options that are not at their defaults, and the model and the rows in any case."""
    values, defaults = table.flatten(config), table.defaults(type(config))
    named = given | {"model", "datasets" if values.get("datasets") else "data"}
    changed = {name for name, value in values.items() if value != defaults[name] and value not in (None, [])}
    return {name: _text(value) for name, value in values.items() if name in named | (changed - {"data"})}


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(", ".join(f"{k} {v}" for k, v in one.items()) if isinstance(one, dict) else str(one) for one in value)
    return str(value)


def _room(config: Any) -> str | None:
    """A line where the run would not fit on this machine, if it is to run here."""
    from treetune.cli import memory_check
    from treetune.models import loading

    try:
        return memory_check.check(config, loading.select_device(config.model.device).type) or None
    except ValueError as error:
        return str(error)


def _memory(config: Any) -> dict[str, str]:
    """The memory of the run by term, where the sizes of the model are on this machine."""
    from treetune.cli import memory_rows
    from treetune.cli.options.commands import MemoryOptions
    from treetune.models import fetch

    path = fetch.here(config.model.model)
    if path is None:
        return {"memory": f"not counted: {config.model.model} is not on this machine; treetune fetch gets it"}
    fixed = {"quant": "none"} if config.model.quant == "auto" else {}
    return memory_rows.of_model(path, table.record(MemoryOptions, config, **fixed))
