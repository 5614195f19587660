"""The recipes of docs/extending.md run as they stand, in a user's folder on a tiny model, and are as short as promised."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()

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
}
# what the output of a recipe shows
SHOWS = {
    "A reward function": r"ends_in_answer",
    "A data transform": r"20 rows",
    "A token loss": r"step 4: loss",
    "A pair loss": r"step 2: loss",
    "A policy-gradient loss": r"step 2: reward",
    "An advantage": r"step 2: reward",
    "An optimiser": r"step 4: loss",
    "A schedule": r"learning rate 0\.005\n.*learning rate 0\.01\n.*learning rate 0\.0082",
    "A row format": r"20 documents",
    "A model family": r"starling",
}
RUNNERS = ("train.py", "loop.py", "run.yaml")


class Recipe(NamedTuple):
    """Files by name, and the commands to run after them."""

    files: dict[str, str]
    commands: list[str]


def recipes() -> dict[str, Recipe]:
    out = {}
    for section in re.split(r"^## ", PAGE, flags=re.M)[1:]:
        title, files, commands = section.split("\n", 1)[0], {}, []
        for language, text in re.findall(r"```(\w+)\n(.*?)```", section, re.S):
            if language == "bash":
                commands += [line for line in text.splitlines() if line]
                continue
            first, rest = text.split("\n", 1)
            files[first.removeprefix("# ")] = rest
        out[title] = Recipe(files, commands)
    return out


RECIPES = recipes()
SHARED = RECIPES.pop("A loop to try pieces in").files


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
    for name, text in (SHARED | recipe.files).items():
        (folder / name).write_text(re.sub(r"\bMODEL\b", str(model), text))
    for name, some in rows().items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    for path in (ROOT / "examples" / "loops").glob("*.py"):
        shutil.copy(path, folder)


def follow(folder: Path, recipe: Recipe, model: Path) -> int:
    """Run a recipe in this process, which it may leave as it likes: train.py, then the commands."""
    os.chdir(folder)
    sys.stdout = sys.stderr = open(folder / "output.txt", "w")
    sys.path.insert(0, str(folder))
    code = 0
    try:
        if "train.py" in recipe.files:
            exec(compile((folder / "train.py").read_text(), "train.py", "exec"), {"__name__": "__main__"})
        from treetune.cli import main

        for command in recipe.commands:
            code = code or main.main(shlex.split(re.sub(r"\bMODEL\b", str(model), command))[1:])
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    return code


@pytest.mark.parametrize("title", RECIPES)
def test_the_recipe_runs(title, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # its threads do not live through a fork
    recipe = RECIPES[title]
    assert recipe.commands or "train.py" in recipe.files
    write(tmp_path, recipe, tiny.long)
    if (pid := os.fork()) == 0:
        os._exit(follow(tmp_path, recipe, tiny.long))
    code, output = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), (tmp_path / "output.txt").read_text()
    assert code == 0, output
    assert re.search(SHOWS[title], output), output


@pytest.mark.parametrize("title", RECIPES)
def test_the_piece_is_as_short_as_promised(title):
    files, lines = SIZES[title]
    pieces = {name: text for name, text in RECIPES[title].files.items() if name not in RUNNERS}
    assert 1 <= len(pieces) <= files
    assert sum(len([line for line in text.splitlines() if line.strip()]) for text in pieces.values()) <= lines
