"""The pages of docs/reference are those that the config classes make, and say of every option what `--help` says."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

from treetune.cli import python_reference, reference
from treetune.cli.main import COMMANDS
from treetune.core.config import table

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs/reference"
MODULES = [name for names in python_reference.GROUPS.values() for name in names]


def test_the_committed_pages_are_those_of_the_code():
    committed = {path.stem: path.read_text() for path in FOLDER.glob("*.md")}
    made = reference.pages()
    changed = sorted(name for name in made.keys() | committed.keys() if made.get(name) != committed.get(name))
    assert not changed, f"run `make reference`: {changed}"


def test_every_option_has_one_row():
    for name, command in COMMANDS.items():
        rows = [line.split("`")[1] for line in (FOLDER / f"{name}.md").read_text().splitlines() if line.startswith("| `")]
        options = [one.lstrip("-").lower().replace("-", "_") for one in rows]
        assert sorted(options) == sorted(table.options(command.config)), name


def test_rows_hold_default_values_and_text():
    page = reference.pages()["quantize"]
    assert "treetune quantize MODEL OUTPUT [options]" in page and "| `MODEL` | required | text | Model folder" in page
    assert "| `--quant` | `nf4` | `nf4`, `fp4`, `int4`, `int8`, `fp8` | Bits and codes" in page
    assert "a number above 0, at most 1 | Nucleus" in reference.pages()["generate"]
    assert "micro_batch_size \\* sequence_len" in reference.pages()["sft"]


def test_pages_of_gone_commands_are_taken_away(tmp_path):
    (tmp_path / "gone.md").write_text("old")
    reference.write(tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == set(reference.pages())


@pytest.mark.parametrize("name", MODULES)
def test_functions_of_python_are_those_of_the_module_with_their_parameters(name):
    module = importlib.import_module(f"treetune.{name}")
    functions = [one for one in vars(module).values() if inspect.isfunction(one) and one.__module__ == module.__name__]
    public = {one.__name__: list(inspect.signature(one).parameters) for one in functions if not one.__name__.startswith("_")}
    section = (FOLDER / "python.md").read_text().partition(f"### `treetune.{name}`\n")[2].partition("\n##")[0]
    said = {line.partition("(")[0]: line for line in re.findall(r"^- `([^`]+)`", section, re.M)}
    assert public.keys() <= said.keys() and all(re.search(rf"\b{one}\b", said[key]) for key, names in public.items() for one in names)


def test_modules_that_pages_and_loops_import_are_there():
    texts = [(ROOT / name).read_text() for name in ("README.md", "docs/python.md", "docs/models.md", "docs/runs.md")]
    texts += [path.read_text() for path in (ROOT / "examples/loops").glob("*.py")]
    lines = [found for text in texts for found in re.findall(r"^from treetune\.([\w.]+) import ([\w, ]+)", text, re.M)]
    named = {f"{place}.{word}" for place, words in lines for word in re.findall(r"(\w+)(?= as|,|$)", words)} | {place for place, _ in lines}
    modules = {name for name in named if (ROOT / f"{name.replace('.', '/')}.py").is_file()}
    assert len(modules) > 15 and modules - set(MODULES) == set()
