"""The recipes of docs/extending.md, and the Python of docs/runs.md, run as they stand in a user's folder, and are as short as promised."""

import gc
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

spec = importlib.util.spec_from_file_location("command_line_fixtures", ROOT / "tests/cli/conftest.py")
fixtures = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = fixtures
spec.loader.exec_module(fixtures)
tiny = fixtures.tiny

# recipe -> the most files and lines that the piece itself takes; what runs it (train.py, a command, loop.py) is not counted
SIZES = {
    "A reward function": (1, 5),
    "A data transform": (1, 10),
    "A token loss": (1, 5),
    "A pair loss": (1, 6),
    "A policy-gradient loss": (1, 6),
    "An advantage": (1, 6),
    "An optimiser": (1, 20),
    "A schedule": (1, 5),
    "A row format": (1, 20),
    "A model family": (1, 20),
    "A tracker": (1, 6),
    "An option": (1, 35),
    "A method": (1, 60),
}
# what the output of a recipe shows
SHOWS = {
    "A reward function": r"ends_in_answer",
    "A data transform": r"20 rows",
    "A token loss": r"done .*step 2 of 2",
    "A pair loss": r"done .*step 2 of 2",
    "A policy-gradient loss": r"done .*step 2 of 2",
    "An advantage": r"done .*step 2 of 2",
    "An optimiser": r"done .*step 2 of 2",
    "A schedule": r"done .*step 4 of 4",
    "A row format": r"20 documents",
    "A model family": r"starling",
    "A tracker": r"done .*step 2 of 2",
    "An option": r"done .*step 2 of 2",
    "A method": r"resumed from step_000002",
    "From Python": r"^\d\.\d+\n$",
}
RUNNERS = ("train.py", "run.yaml")


class Recipe(NamedTuple):
    """Files by name, and the commands to run after them."""

    files: dict[str, str]
    commands: list[str]


def recipes(page: str) -> dict[str, Recipe]:
    """The sections of a page with files to write."""
    out = {}
    for section in re.split(r"^## ", (ROOT / "docs" / page).read_text(), flags=re.M)[1:]:
        title, files, commands = section.split("\n", 1)[0], {}, []
        for language, text in re.findall(r"```(\w+)\n(.*?)```", section, re.S):
            if language == "bash":
                commands += [line for line in text.splitlines() if line]
                continue
            first, rest = text.split("\n", 1)
            files[first.removeprefix("# ")] = rest
        out |= {title: Recipe(files, commands)} if files else {}
    return out


RECIPES = recipes("extending.md")
PIECES = tuple(RECIPES)
RECIPES |= recipes("runs.md")


def rows() -> dict[str, list[dict]]:
    numbers = range(20)
    return {
        "chats": fixtures.chats(20),
        "prompts": [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in numbers],
        "pairs": [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {i}!"} for i in numbers],
        "forum": [{"ask": f"{i} + 1?", "reply": str(i + 1)} for i in numbers],
        "dictionary": [{"word": f"w{i}", "meaning": f"the number {i}"} for i in numbers],
    }


def write(folder: Path, recipe: Recipe, model: Path) -> None:
    for name, text in recipe.files.items():
        (folder / name).write_text(re.sub(r"\bMODEL\b", str(model), text))
    for name, some in rows().items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    for path in (ROOT / "examples" / "loops").glob("*.py"):
        shutil.copy(path, folder)


def run_command(words: list[str]) -> int:
    """The exit code of `treetune ...`, with answers of a few tokens after its steps, or of `python FILE ...`."""
    if words[0] == "treetune":
        from treetune.cli import main

        short = ["--sample-tokens", "4"] if words[1] in ("sft", "dpo") or words[1].endswith(":METHOD") else []
        return main.main([*words[1:], *short])
    sys.argv = words[1:]
    try:
        runpy.run_path(words[1], run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    return 0


def follow(folder: Path, recipe: Recipe, model: Path) -> int:
    """Run a recipe in this process, which it may leave as it likes: train.py, then the commands."""
    os.chdir(folder)
    sys.stdout = sys.stderr = open(folder / "output.txt", "w")
    sys.path.insert(0, str(folder))
    code = 0
    try:
        if "train.py" in recipe.files:
            runpy.run_path("train.py", run_name="__main__")
        for command in recipe.commands:
            code = code or run_command(shlex.split(re.sub(r"\bMODEL\b", str(model), command)))
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    return code


@pytest.fixture(scope="module")
def loaded(tiny, tmp_path_factory):
    """What a run imports is imported here, once for all recipes."""
    from treetune.cli import main

    assert main.main(["sft", *fixtures.basics(tiny, "--output-dir", tmp_path_factory.mktemp("loaded") / "run")]) == 0


@pytest.mark.sampled(3)
@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("title", RECIPES)
def test_the_recipe_runs(title, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # its threads do not live through a fork
    recipe = RECIPES[title]
    assert recipe.commands or "train.py" in recipe.files
    write(tmp_path, recipe, tiny.long)
    if (pid := os.fork()) == 0:
        gc.freeze()  # what the tests before have left is not looked at, and so not copied
        os._exit(follow(tmp_path, recipe, tiny.long))
    code, output = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), (tmp_path / "output.txt").read_text()
    assert code == 0, output
    assert re.search(SHOWS[title], output), output
    if title == "A tracker":
        records = [json.loads(line) for line in (tmp_path / "tracked.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records if "train/loss" in record] == [1, 2]


@pytest.mark.parametrize("title", PIECES)
def test_the_piece_is_as_short_as_promised(title):
    files, lines = SIZES[title]
    pieces = {name: text for name, text in RECIPES[title].files.items() if name not in RUNNERS}
    assert 1 <= len(pieces) <= files
    assert sum(len([line for line in text.splitlines() if line.strip()]) for text in pieces.values()) <= lines
