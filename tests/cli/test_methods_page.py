"""The defaults that docs/methods.md names are those of the program."""

import re
from pathlib import Path

import pytest

from treetune.cli.methods import METHODS
from treetune.core.config import table

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
ROWS = {cells[0].strip(" `"): cells for line in PAGE.splitlines() if len(cells := line.strip("|").split("|")) == 5 and "`" in cells[0]}
RATED = tuple(METHODS)
VALUES = (("dpo", "rl_beta", 0.1), ("kto", "rl_beta", 0.1), ("orpo", "orpo_alpha", 0.1), ("simpo", "simpo_gamma", 0.5),
          ("simpo", "rl_beta", 2), ("cpo", "rl_beta", 0.1), ("grpo", "num_generations", 8), ("ebft", "num_generations", 4))  # fmt: skip


@pytest.mark.parametrize("method", RATED)
def test_learning_rates_are_the_defaults(method):
    with_adapter, without = (float(cell) for cell in ROWS[method][1:3])
    assert (with_adapter, without) == METHODS[method].rates


@pytest.mark.parametrize(("method", "name", "value"), VALUES)
def test_values_beside_them_are_the_defaults(method, name, value):
    assert re.search(rf"`{name}` {value:g}\b", ROWS[method][4])
    assert table.defaults(METHODS[method].config)[name] == value
