"""Records of steps, and what observers are told of a run."""

import json

import pytest
import torch

from treetune.core import records
from treetune.core.run import observers
from treetune.core.run.recorder import Recorder


def test_numbers_are_read_one_step_late():
    recorder = Recorder(lambda record: record | {"double": 2 * record["loss"]})
    assert recorder.push(1, {"loss": torch.tensor(0.5), "epoch": 0}) is None and recorder.history == [], "nothing was read yet"
    assert recorder.push(2, {"loss": torch.tensor(0.25), "epoch": 0}) == {"step": 1, "loss": 0.5, "epoch": 0, "double": 1.0}
    recorder.note({"step": 1, "eval/loss": 3.0})
    assert recorder.flush()["loss"] == 0.25 and recorder.flush() is None
    assert [record["step"] for record in recorder.history] == [1, 1, 2]


def test_the_files_of_a_run_hold_a_line_for_each_event(tmp_path):
    file = observers.MetricsFile(tmp_path / "metrics.jsonl")
    file.step({"step": 1, "train/loss": 0.5})
    file.evaluation({"step": 1, "eval/loss": 3.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (
        lines
        == records.read(tmp_path / "metrics.jsonl", numbers=True).records
        == [{"step": 1, "train/loss": 0.5}, {"step": 1, "eval/loss": 3.0}]
    )
    answer, completion = {"step": 0, "answer": "a"}, {"step": 1, "answer": "b", "rewards": {"r": 1.0}}
    for completions, kept in ((True, ["a", "b"]), (False, ["a"])):
        path = tmp_path / f"samples-{completions}.jsonl"
        observers.SamplesFile(path, completions=completions).samples([answer, completion])
        assert [json.loads(line)["answer"] for line in path.read_text().splitlines()] == kept


class Curve:
    """An observer with two of the methods, as a user would write it."""

    def __init__(self):
        self.points, self.over = [], False

    def step(self, record):
        self.points.append(record["train/loss"])

    def end(self, stopped, history):
        self.over = True


def test_a_function_a_class_and_an_object_can_observe():
    events, curve = [], Curve()
    group = observers.Observers([observers.of(value, "x", pytest.fail) for value in (lambda *event: events.append(event), curve, Curve)])
    group.start(2, 0, {"model": "tiny"})
    group.step({"step": 1, "train/loss": 0.5})
    group.samples([{"answer": "a"}, {"answer": "b"}])
    with group.busy("evaluating"):
        pass
    group.end(None, [])
    group.summary({"saved": "here"}, [])
    assert [name for name, _ in events] == ["start", "step", "samples", "samples", "end", "summary"]
    assert events[0][1] == {"total_steps": 2, "step": 0, "about": {"model": "tiny"}} and events[-1][1] == {"saved": "here"}
    assert curve.points == [0.5] and curve.over


@pytest.mark.parametrize("error", [ConnectionError("no route to host"), SystemExit(3)])
def test_a_tracker_that_fails_is_left_out_and_the_rest_goes_on(error):
    warnings, curve = [], Curve()

    def broken(event, record):
        raise error

    group = observers.Observers([observers.of(broken, "mine.py:track", warnings.append), curve])
    for step in (1, 2):
        group.step({"step": step, "train/loss": 0.5})
    assert curve.points == [0.5, 0.5]
    assert warnings == [f"observer mine.py:track failed at step ({type(error).__name__}: {error}); the run goes on without it"]


def test_what_cannot_observe_is_refused():
    with pytest.raises(ValueError, match="observer mine is 3; expected a function track"):
        observers.of(3, "mine", pytest.fail)


def test_an_observer_may_change_what_it_is_told():
    class Popping:
        def step(self, record):
            record.pop("step")

        def samples(self, answers):
            answers[0].clear()

    seen, warnings = [], []
    group = observers.Observers(
        [observers.of(Popping(), "p", warnings.append), observers.of(lambda *event: seen.append(event), "f", print)]
    )
    record, answers = {"step": 1, "train/loss": 0.5}, [{"answer": "a"}]
    group.step(record)
    group.samples(answers)
    assert record == {"step": 1, "train/loss": 0.5} and answers == [{"answer": "a"}] and warnings == []
    assert seen == [("step", {"step": 1, "train/loss": 0.5}), ("samples", {"answer": "a"})]


def test_an_essential_class_is_made_and_a_constructor_that_fails_is_named():
    class Essential(observers.Observer):
        essential = True

    class Failing:
        def __init__(self):
            raise Exception("no login")

    assert isinstance(observers.of(Essential, "e", print), Essential)
    with pytest.raises(ValueError, match="observer f cannot be made: Exception: no login"):
        observers.of(Failing, "f", print)
