"""Optimisers and schedules by name: every row names a function that takes what the row says, and listing them needs no torch."""

import inspect
import subprocess
import sys

import pytest
import torch

from treetune.core import optim, registry

ROWS = [pytest.param(entry, id=name) for table in (registry.OPTIMIZERS, registry.SCHEDULES) for name, entry in table.items()]


@pytest.mark.parametrize("entry", ROWS)
def test_a_row_takes_what_its_function_takes(entry):
    parameters = inspect.signature(registry.resolve(entry.function)).parameters.values()
    assert set(entry.takes) == {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize("name", registry.SCHEDULES)
def test_every_schedule_takes_a_peak_and_steps(name):
    schedule = registry.bind(registry.SCHEDULES[name], min_ratio=0.0)(2.0, 10)
    assert schedule(torch.tensor(0)).item() == 2.0


def test_an_option_that_a_function_does_not_take_is_left_out_and_one_that_is_not_given_keeps_its_default():
    bound = registry.bind(registry.OPTIMIZERS["sgd"], momentum=0.5, b1=0.9, decay=())
    assert bound.func is optim.sgd and bound.keywords == {"momentum": 0.5, "decay": ()}
    assert registry.bind(registry.OPTIMIZERS["adamw"]) is optim.adamw


def test_names_are_listed_without_torch():
    code = "import sys; from treetune.core import registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
