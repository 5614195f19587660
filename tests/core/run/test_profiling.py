"""Profiles: which steps they are of, and what they leave."""

import json

import pytest
import torch

from treetune.core.run import profiling
from treetune.core.run.profiling import Span


class Numbers:
    """A source of nothing that counts what it is asked for."""

    total_steps, epoch = 6, 0

    def __init__(self):
        self.asked = []

    def next(self, state, index):
        self.asked.append(index)
        return [index], {}


@pytest.mark.parametrize(
    ("steps", "start", "expected"), [((), 0, None), ((5,), 3, Span(4, 8)), ((1,), 0, Span(1, 1)), ((3, 1, 2), 0, Span(1, 3))]
)
def test_one_number_is_how_many_and_several_are_steps(steps, start, expected):
    assert profiling.span(steps, start) == expected


def profiled(root, steps, last, *, first=1):
    """The ops that a profile of `steps` has seen in a run of steps that each compute something of their own."""
    said = []
    one = profiling.Profile(root, steps, torch.device("cpu"), said.append)
    source = profiling.Watched(Numbers(), one.before)
    for index in range(first, last + 1):
        source.next(None, index)
        with torch.profiler.record_function(f"step_{index}"):
            torch.ones(4) @ torch.ones(4)
    one.end()
    path = root / profiling.TRACE
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]} if path.exists() else set()
    return {name for name in names if str(name).startswith("step_")}, said


def test_a_profile_is_of_its_steps_and_no_other(tmp_path):
    steps_of_spans, said = profiled(tmp_path, Span(2, 4), 6)
    assert steps_of_spans == {"step_2", "step_3", "step_4"}
    table = (tmp_path / profiling.TABLE).read_text()
    assert table.startswith("steps 2 to 4 on cpu: ") and "aten::ones" in table and "Self CPU" in table and "by memory" in table
    assert said == [f"profile of steps 2 to 4: {profiling.TRACE}, {profiling.TABLE} in {tmp_path}"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [profiling.TABLE, profiling.TRACE]


def test_a_run_that_ends_earlier_leaves_what_there_was(tmp_path):
    steps_of_spans, said = profiled(tmp_path, Span(2, 40), 3)
    assert steps_of_spans == {"step_2", "step_3"} and "steps 2 to 3" in said[0]


def test_steps_that_never_come_leave_nothing(tmp_path):
    assert profiled(tmp_path, Span(9, 10), 3) == (set(), [])
    assert profiled(tmp_path, Span(1, 2), 5, first=3) == (set(), []), "a resumed run is past them"
    assert list(tmp_path.iterdir()) == []


def test_a_watched_source_is_the_one_inside():
    times, inside = [], Numbers()
    source = profiling.Watched(inside, lambda index: None, lambda index, seconds: times.append((index, seconds >= 0)))
    assert source.next(None, 3) == ([3], {}) and inside.asked == [3] and times == [(3, True)]
    assert source.total_steps == 6
    with pytest.raises(AttributeError):
        _ = source.cursor
