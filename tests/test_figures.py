"""Figures in the tables of the pages: each table of measured numbers says where they are from, and they are there.

A comment before the table says it: `<!-- figures: benchmarks/results/DEVICE/NAME.json, columns 2 3 -->`, whose numbers those of the columns
are, rounded as they are written; or `<!-- figures: tests/...py::test -->`, a test that reads the table.
"""

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MADE = [page for page in PAGES if page.read_text(encoding="utf-8").startswith("<!-- Made by `")]  # tests of theirs compare these whole
PAGES = [page for page in PAGES if page not in MADE]
MARK = re.compile(r"<!-- figures: (\S+?)(?:, columns? ([\d ]+))? -->\n\s*\Z")
UNIT = re.compile(r"(?<![\w.-])\d[\d.,]*(?:e-?\d+)? ?(?:x\b|%|[KMGT]i?B|tokens/s|nats|seconds|minutes|hours|s|ms|us)(?!\w)")
HEAD = re.compile(r"\b(?:[KMGT]i?B|nats|bits|bytes|seconds|tokens/s|ratio|accuracy|loss|KL)\b")
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?(?![\w.]*\w)")
# Tables with units whose numbers nobody has measured, by their first row, and what they are.
NOT_MEASURED = {
    "| # | failure |": "splits of a batch",
    "| | server: `treetune serve`": "options",
    "| it says | when |": "thresholds of core/run/doctor.py",
    "| source | what it uses |": "what papers used",
    "| model | training | weights |": "computed from sizes by models/memory.py, which tests/models/test_memory.py compares with torch",
}


class Table(NamedTuple):
    """A table of a page: its place, the text before it, its first row, and the cells of the others."""

    place: str
    before: str
    head: str
    rows: list[list[str]]


def tables(page: Path) -> Iterator[Table]:
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"(?:^\|.*\n)+", text, re.M):
        head, _, *rows = found[0].splitlines()
        cells = [[cell.strip() for cell in re.sub(r"`[^`]*`", "", row.replace("\\|", "")).strip("|").split("|")] for row in rows]
        yield Table(f"{page.name}: {head[:60]}", text[: found.start()], head, cells)


TABLES = [table for page in PAGES for table in tables(page)]
MARKED = [(table, mark) for table in TABLES if (mark := MARK.search(table.before))]


def has_figures(table: Table) -> bool:
    said = " | ".join(cell for row in table.rows for cell in row)
    return bool(UNIT.search(said) or HEAD.search(re.sub(r"`[^`]*`", "", table.head)) and re.search(r"\d", said))


def numbers(value) -> Iterator[float]:
    """All numbers in a JSON value."""
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from numbers(one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def written(number: str, value: float) -> bool:
    """Whether a value is this number, rounded to the digits that it has."""
    mantissa, _, power = number.partition("e")
    digits = len(mantissa.partition(".")[2])
    return float(f"{value:.{digits}{'e' if power else 'f'}}") == float(number)


def test_numbers_are_compared_by_their_digits():
    assert written("0.27", 0.2651) and not written("0.27", 0.264) and written("2.2e-3", 0.00221) and not written("2.2e-3", 0.0023)
    assert (
        written("138", 137.6)
        and not written("138", 138.6)
        and NUMBER.findall("5e-4, 0.29 to 0.27 of x2 in 3 B") == "5e-4 0.29 0.27 3".split()
    )


def test_every_table_of_figures_says_where_they_are_from():
    known = tuple(NOT_MEASURED)
    bare = [table.place for table in TABLES if has_figures(table) and not table.head.startswith(known) and not MARK.search(table.before)]
    assert bare == []
    heads = [table.head for table in TABLES if has_figures(table)]
    assert [head for head in known if not any(one.startswith(head) for one in heads)] == []


def test_pages_that_a_program_makes_have_a_test_of_their_own():
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    assert [page.name for page in MADE if not any(page.stem in text for text in texts)] == []


@pytest.mark.parametrize(("table", "mark"), MARKED, ids=[table.place for table, _ in MARKED])
def test_the_figures_are_there(table, mark):
    path, _, name = mark[1].partition("::")
    text = (ROOT / path).read_text(encoding="utf-8")
    if not path.endswith(".json"):
        assert name and f"def {name}(" in text
        return
    known = list(numbers(json.loads(text)))
    said = [number for row in table.rows for column in map(int, mark[2].split()) for number in NUMBER.findall(row[column - 1])]
    assert said and [number for number in said if not any(written(number, value) for value in known)] == []


def test_the_page_of_results_is_that_of_their_files(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("result_tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "result_tables", module)
    spec.loader.exec_module(module)
    assert (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8") == module.page()


def test_bits_of_a_quantised_weight():
    import torch

    from treetune.core import quant

    weight, said = torch.randn(1024, 1024), {}
    for table in TABLES:
        if table.head.startswith("| `--quant` | bits a weight"):
            said = [NUMBER.findall(row[1]) for row in table.rows]
    schemes = [[quant.Scheme("nf4"), quant.Scheme("nf4", False)], [quant.Scheme("int8")], [quant.Scheme("int4")], [quant.Scheme("fp8")]]
    bits = [[quant.quantise(weight, one).nbytes * 8 / weight.numel() for one in row] for row in schemes]
    by_row = 8 + 32 / 1024
    assert [float(number) for number in said[0]] == [round(bits[0][0], 2), bits[0][1]] and [float(number) for number in said[2]] == bits[2]
    assert said[1] == said[3] == ["8", "32"] and bits[1] == bits[3] == [by_row]
