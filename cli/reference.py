"""The pages of docs/reference, made of the config classes: `python -m treetune.cli.reference docs/reference`. Imports no torch.

One page a command, one table a group of options as `--help` groups them, and a list of the commands. `python_reference` makes
the page of functions.
"""

import dataclasses
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from treetune.cli import file_commands, python_reference
from treetune.cli.main import COMMANDS, Command
from treetune.cli.planning import command as planning
from treetune.core.config import table, wording
from treetune.core.config.table import Option
from treetune.core.data import samples

INDEX = "index"
POSITIONAL = typing.get_args(Positional[int])[1]
HEADER = "| option | default | values | what it does |\n|---|---|---|---|\n"
NOTICE = "<!-- Made by `make reference` from the config classes under `cli/`; a test compares. Change the text below a field there. -->\n"
MODULES = "<!-- Made by `make reference` from the docstrings; a test compares. -->\n"
TYPES = {bool: "on or off", str: "text"}


def pages() -> dict[str, str]:
    """{name: text} of all pages: one for each command, and `index`."""
    files = {"train": file_commands, "plan": planning}
    out = {name: _page(name, module.HELP, f"```text\n{module.USAGE}\n```\n") for name, module in files.items()}
    out |= {name: _page(name, _doc(command.config), _of_command(name, command)) for name, command in COMMANDS.items()}
    lines = [f"- [`treetune {name}`]({name}.md): {help_}" for name, help_ in _helps(files)]
    index = [NOTICE, "# Reference", "", "From Python: [functions and classes](python.md). Commands:", "", *lines, ""]
    return {INDEX: "\n".join(index), "python": f"{MODULES}\n{python_reference.page()}"} | out


def write(folder: Path) -> None:
    """Write all pages into a folder, and take away those of commands that are gone."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = pages()
    for path in folder.glob("*.md"):
        if path.stem not in texts:
            path.unlink()
    for name, text in texts.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")


def _helps(files: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield from ((name, module.HELP) for name, module in files.items())
    yield from ((name, command.help) for name, command in COMMANDS.items())


def _page(name: str, help_: str, body: str) -> str:
    return f"{NOTICE}\n# `treetune {name}`\n\n{_capital(help_).rstrip('.')}.\n\n{body}"


def _of_command(name: str, command: Command) -> str:
    """How the command is called, and a table for each group of options."""
    groups = list(_groups(command.config))
    bare = [one.upper() for _, _, rows in groups for one, positional in rows if positional]
    words = " ".join(["treetune", name, *["[run.yaml]"] * (command.module == "commands.train"), *bare, "[options]"])
    said, options = wording.texts(command.config), table.options(command.config)
    tables = [_group(title, text, [_row(options[one], said, positional) for one, positional in rows]) for title, text, rows in groups]
    return "\n".join([f"```bash\n{words}\n```\n", *tables])


def _group(title: str, text: str, rows: list[str]) -> str:
    return f"## {title}\n\n{text}{HEADER}{''.join(rows)}"


def _groups(config: type, title: str = "Options") -> Iterator[tuple[str, str, list[tuple[str, bool]]]]:
    """(title, text, [(option, whether it stands without its name)]) of what a class has itself, then of its groups."""
    kinds, marked = typing.get_type_hints(config), typing.get_type_hints(config, include_extras=True)
    fields = dataclasses.fields(config)
    own = [(one.name, POSITIONAL in getattr(marked[one.name], "__metadata__", ())) for one in fields if not _is_group(kinds[one.name])]
    if own:
        yield title, "" if title == "Options" or not _doc(config) else f"{_doc(config)}\n\n", own
    for one in fields:
        if _is_group(kinds[one.name]):
            yield from _groups(kinds[one.name], f"{_capital(one.name.replace('_', ' '))} options")


def _is_group(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind)


def _row(option: Option, said: dict[str, str], positional: bool) -> str:
    name = option.name.upper() if positional else f"--{option.name.replace('_', '-')}"
    cells = [f"`{name}`", _default(option), _values(option), python_reference.prose(said.get(option.name, ""))]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _default(option: Option) -> str:
    value = option.default
    if value is table.REQUIRED:
        return "required"
    if value is None or value in ((), ""):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    # Where the sample rows lie depends on the working folder.
    texts = [
        f"{samples.SOURCE}/{Path(str(one)).name}" if Path(str(one)).is_absolute() else str(one)
        for one in (value if isinstance(value, tuple | list) else [value])
    ]
    return " ".join(f"`{text}`" for text in texts)


def _values(option: Option) -> str:
    """What one value must be, and how many there may be."""
    if option.of_mappings:
        return "list of mappings, in a file only"
    if option.choices:
        words = ", ".join(f"`{one}`" for one in option.choices) + (", or `FILE.py:FUNCTION`" if option.door else "")
    else:
        words = TYPES.get(option.single) or python_reference.prose(option.expected())
    return f"{words}; several" if option.many else words


def _doc(config: type) -> str:
    return python_reference.prose(" ".join((config.__doc__ or "").split()))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/reference"))
