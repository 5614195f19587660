"""The names of ours in docs/from_others.md are options or commands of the program."""

import re
from pathlib import Path

from treetune.cli import main
from treetune.core.config import table

PAGE = (Path(__file__).parents[2] / "docs" / "from_others.md").read_text()


def test_every_name_of_ours_exists():
    known = {name for command in main.COMMANDS.values() for name in table.options(command.config)} | main.COMMANDS.keys()
    ours = [line.strip("|").split("|")[4] for line in PAGE.splitlines() if line.startswith("| ") and line.count("|") == 6][1:]
    names = {name for cell in ours for name in re.findall(r"`([a-z][a-z_]+)(?:: \w+)?`", cell)}
    assert len(names) > 40 and names - known == set()
