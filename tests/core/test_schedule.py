import math

import pytest
import torch

from treetune.core import optim


def _at(schedule, *steps):
    return [schedule(torch.tensor(step)).item() for step in steps]


def test_constant():
    assert _at(optim.constant(0.5), 0, 7, 10**6) == [0.5] * 3


@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_linear(ratio):
    assert _at(optim.linear(2.0, 10, min_ratio=ratio), 0, 5, 10, 99) == pytest.approx([2.0, 1 + ratio, 2 * ratio, 2 * ratio], abs=1e-6)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_cosine(ratio):
    quarter = ratio + (1 - ratio) * (1 + math.cos(math.pi / 4)) / 2
    expected = [2.0, 2 * quarter, 1 + ratio, 2 * ratio, 2 * ratio]
    assert _at(optim.cosine(2.0, 8, min_ratio=ratio), 0, 2, 4, 8, 99) == pytest.approx(expected, abs=1e-6)


def test_warmup_rises_by_equal_parts_and_then_the_schedule_begins():
    schedule = optim.warmup(optim.linear(1.0, 10), 4)
    assert _at(schedule, 0, 1, 2, 3, 4, 9, 14) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 0.5, 0.0], abs=1e-6)
    inner = optim.linear(1.0, 10)
    assert optim.warmup(inner, 0) is inner


def test_the_rate_is_a_tensor_of_no_dimension_and_reads_nothing_back():
    """A Python float would recompile a compiled step at every value; .item() would wait for the device."""
    for schedule in (optim.constant(1.0), optim.linear(1.0, 10), optim.cosine(1.0, 10), optim.warmup(optim.cosine(1.0, 10), 3)):
        lr = schedule(torch.tensor(3))
        assert isinstance(lr, torch.Tensor) and lr.ndim == 0 and lr.dtype == torch.float64
        assert schedule(torch.tensor(3, device="meta")).device.type == "meta"  # reading a meta tensor raises


def test_zero_steps_are_no_division_by_zero():
    assert _at(optim.cosine(1.0, 0), 0, 1) == [1.0, 0.0]
