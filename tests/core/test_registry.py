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
    assert {*entry.takes, *entry.bound} == {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert not set(entry.takes) & set(entry.bound)


@pytest.mark.parametrize("name", registry.OPTIMIZERS)
def test_what_options_leave_open_is_the_default_of_the_function(name):
    entry, said = registry.OPTIMIZERS[name], registry.left_open(name)
    parameters = inspect.signature(registry.resolve(entry.function)).parameters
    assert {key: said[key] for key in said if key in entry.takes} == {key: parameters[key].default for key in said if key in entry.takes}


def test_names_of_other_tools_stand_for_one_of_ours():
    assert set(registry.OPTIMIZER_ALIASES.values()) <= set(registry.OPTIMIZERS)
    assert not set(registry.OPTIMIZER_ALIASES) & set(registry.OPTIMIZERS)


def test_a_paged_optimiser_is_the_other_with_its_moments_elsewhere():
    bound = registry.bind(registry.OPTIMIZERS["paged_adamw"], b1=0.5, paged=False)
    assert bound.func is optim.adamw and bound.keywords == {"b1": 0.5, "paged": True}


@pytest.mark.parametrize("name", registry.SCHEDULES)
def test_every_schedule_takes_a_peak_and_steps(name):
    schedule = registry.bind(registry.SCHEDULES[name], min_ratio=0.0, warmup=1, num_decay_steps=3)(2.0, 10)
    assert max(schedule(torch.tensor(step)).item() for step in range(10)) == 2.0


def test_an_option_that_a_function_does_not_take_is_left_out_and_one_that_is_not_given_keeps_its_default():
    bound = registry.bind(registry.OPTIMIZERS["sgd"], momentum=0.5, b1=0.9, decay=())
    assert bound.func is optim.sgd and bound.keywords == {"momentum": 0.5, "decay": ()}
    assert registry.bind(registry.OPTIMIZERS["adamw"]) is optim.adamw


def test_names_are_listed_without_torch():
    code = "import sys; from treetune.core import registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
