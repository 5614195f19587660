"""`treetune convert`: a file of axolotl's as one of ours."""

from pathlib import Path

from treetune.cli import run_file
from treetune.cli.axolotl import translate
from treetune.cli.methods import METHODS
from treetune.cli.options.commands import Convert
from treetune.cli.screen import Screen
from treetune.core.config import reading, table
from treetune.core.run.errors import checking_input


def run(config: Convert, given: frozenset[str]) -> int:
    """Write the file, or print it; the exit code."""
    with checking_input():
        text = converted(config.file)
    if config.output is None:
        print(text, end="")
    else:
        Path(config.output).write_text(text)
        Screen().line(f"wrote {config.output}: treetune train {config.output}")
    return 0


def converted(path: str) -> str:
    """Our file for a file of axolotl's: the method, what the file means as comments, and every option that it sets.

    Errors: ValueError for a file of ours, and for keys that are not supported.
    """
    written = run_file.load(path)
    if not translate.is_foreign(written):
        raise ValueError(f"{path} has no key that only axolotl's files have: it is a file of ours already")
    command = translate.method_of(written, path)
    config = METHODS[command].config
    file = run_file.read(path, command, table.options(config))
    filled = reading.fill(config, file.values)
    unlike = {name: value for name, value in table.flatten(filled).items() if name in file.values}
    rest = tuple(name for name in table.options(config) if name not in unlike)
    comments = "".join(f"# {line.strip()}\n" for line in file.lines)
    return f"{comments}{run_file.METHOD}: {command}\n{reading.to_yaml(filled, without=rest)}"
