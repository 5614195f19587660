"""The notebooks of examples/notebooks: they run with a tiny model, and what is kept of the run of a real one is small and of no machine."""

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
BOOKS = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
LEFT = {"fine_tune": "runs/capitals/adapter", "replace_a_function": "brief"}  # the adapter that a notebook leaves
LONGEST = 2500  # characters of what a cell printed


def cells(name: str, kind: str = "code") -> list[dict]:
    return [cell for cell in json.loads(BOOKS[name].read_text())["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def printed(cell: dict) -> str:
    """What a cell has printed or returned, as text."""
    data = [output.get("text", output.get("data", {}).get("text/plain", "")) for output in cell["outputs"]]
    return "".join("".join(text) for text in data)


@pytest.mark.more
@pytest.mark.parametrize("name", BOOKS)
def test_a_notebook_runs_with_another_model(name, tiny, here):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    book = nbformat.read(BOOKS[name], as_version=4)
    nbformat.validate(book)
    (chosen,) = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ())]
    chosen.source = f"MODEL, STEPS, NEW_TOKENS = {str(tiny.long)!r}, 4, 6"
    for cell in book.cells:
        cell.pop("outputs", None) if cell.cell_type != "code" else cell.update(outputs=[])
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(here)}}).execute()
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    said = [printed(cell) for cell in code]
    assert sum(bool(text.strip()) for text in said) >= 6
    assert (here / LEFT[name] / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", BOOKS)
def test_parameters_are_in_one_cell(name):
    marked = [source(cell) for cell in cells(name) if "parameters" in cell["metadata"].get("tags", ())]
    assert len(marked) == 1 and re.findall(r"^(\w+) =", marked[0], re.M) == ["MODEL", "STEPS", "NEW_TOKENS"]


@pytest.mark.parametrize("name", BOOKS)
def test_outputs_are_those_of_one_run_from_top_to_bottom(name):
    code = cells(name)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell["outputs"] if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert max(len(printed(cell)) for cell in code) < LONGEST and sum(bool(printed(cell)) for cell in code) >= 6
    assert not re.search(r"(?<![\w.])/(?:work|home|root|Users|mnt|tmp)/\w", BOOKS[name].read_text())


@pytest.mark.parametrize("name", BOOKS)
def test_links_of_a_notebook_lead_somewhere(name):
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", "\n".join(map(source, cells(name, "markdown"))))
    assert links and [link for link in links if not (FOLDER / link).exists()] == []


@pytest.mark.parametrize("name", BOOKS)
def test_commands_that_a_notebook_names_are_taken(name):
    from treetune.cli import main

    calls = re.findall(r"(?:^|`)treetune ([\w-]+)", "\n".join(map(source, cells(name, "markdown"))), re.M)
    assert calls and set(calls) <= main.COMMANDS.keys()


def test_there_are_two_notebooks():
    assert BOOKS.keys() == LEFT.keys()
