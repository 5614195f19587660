"""The pages of docs/reference are those that the config classes make, and say of every option what `--help` says."""

from pathlib import Path

from treetune.cli import reference
from treetune.cli.main import COMMANDS
from treetune.core.config import table

FOLDER = Path(__file__).parents[2] / "docs/reference"


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
