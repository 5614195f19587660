"""Every command in a ```bash block of the documentation is one that the program takes: command, options and values."""

import re
import shlex
from pathlib import Path

import pytest

from treetune.cli import file_commands, main, parse, requirements
from treetune.cli.methods import CONFIGS

ROOT = Path(__file__).parents[2]
PAGES = [
    page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "extending.md"
]  # whose commands tests/test_extending.py runs


def commands(text: str) -> list[list[str]]:
    """The words of each `treetune ...` line of the bash blocks; lines that end in a backslash go on."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    calls = [shlex.split(line, comments=True) for line in lines if re.match(r"(\w+=\S+ )*treetune\b", line)]
    return [words[next(i for i, word in enumerate(words) if word == "treetune") + 1 :] for words in calls]


CALLS = [pytest.param(call, id=f"{page.stem}: {' '.join(call)[:60]}") for page in PAGES for call in commands(page.read_text())]


def test_there_are_commands():
    assert len(CALLS) > 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands are read: the examples, and a run file of each name."""
    root = tmp_path_factory.mktemp("pages")
    (root / "examples").symlink_to(ROOT / "examples")
    for name in {
        word for one in CALLS for word in one.values[0] if re.fullmatch(r"[\w/-]+\.ya?ml", word) and not word.startswith("examples/")
    }:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("method: sft\n")
    return root


@pytest.mark.sampled(3)
@pytest.mark.parametrize("call", CALLS)
def test_the_program_takes_it(call, folder, monkeypatch):
    monkeypatch.chdir(folder)
    command, *args = call
    if command == "--version":
        return
    if command == "plan":
        command, args, _ = file_commands.resolve_plan(args)
    command, args, _ = file_commands.resolve(command, args)
    chosen = main.COMMANDS[command]
    if "--sweep" not in args:
        config, given = parse.parse(command, chosen.config, args)
        if (method := CONFIGS.get(chosen.config)) is not None:
            requirements.check(config, method, given)
