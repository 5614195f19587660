"""docs/memory_table.md is what the planner counts."""

import math
from pathlib import Path

import pytest

from treetune.cli.planning import memory_table, shapes
from treetune.core import tree
from treetune.models import devices

TABLE = (Path(__file__).parents[2] / "docs/memory_table.md").read_text()
# Billions of parameters that the publishers name.
SIZES = {"0.6B": 0.6, "1.7B": 1.72, "4B": 4.0, "7B-v0.3": 7.25, "8B": 8.0, "9B": 9.24, "14B": 14.8, "32B": 32.8, "70B": 70.6}


@pytest.mark.parametrize("name", shapes.CONFIGS)
def test_shapes_have_the_size_that_their_name_says(name):
    run = memory_table.planned(name, "LoRA")
    number = sum(math.prod(leaf.shape) for leaf in tree.leaves(run.shapes(devices.GPUS["h100"]).abstract))
    assert number / 1e9 == pytest.approx(SIZES[name.partition("-")[2].removeprefix("3.1-").removeprefix("2-")], rel=0.01)


def test_the_table_has_every_case_once():
    rows = [tuple(line.split(" | ")[:2]) for line in TABLE.splitlines() if line.startswith("| ") and not line.startswith("| model")]
    assert rows == [(f"| {name}", training) for name, training in memory_table.cases()]
    assert TABLE.startswith(memory_table.HEAD + memory_table.header())


@pytest.mark.parametrize(
    ("name", "training"),
    [
        ("Qwen3-4B", "full"),
        *(pytest.param(*case, marks=pytest.mark.more) for case in (("Llama-3.1-8B", "LoRA"), ("Llama-3.1-70B", "full"))),
    ],
)
def test_rows_are_what_the_planner_counts(name, training):
    assert memory_table.line(name, training, memory_table.row(name, training)) in TABLE.splitlines()
