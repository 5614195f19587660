"""Trackers in the background: one that raises, hangs or crashes costs a warning; no step is told twice, and none is left out."""

import json
import os
import time

import pytest

from treetune.core.trackers.service import Service
from treetune.core.trackers.told import Book, Told

RECORDER = """
import json, os, time
from stub_calls import call

class Tracker:
    id, place = "there", "in a list"

    def __init__(self, run, **options):
        call("open", **run._asdict(), options=options)

    def numbers(self, step, values):
        call("numbers", step, values)
        {numbers}

    def facts(self, values):
        call("facts", values)

    def copy(self, path, name):
        call("copy", name)

    def finish(self, stopped):
        call("finish", stopped)
        {finish}

def open_run(run, **options):
    {open}
    return Tracker(run, **options)
"""


def recorder(stubs, *, open="", numbers="", finish="", **named) -> list[Service]:
    """A tracker of a module `noting`, with statements at the start of its calls."""
    stubs("noting", RECORDER.format(open=open or "pass", numbers=numbers or "pass", finish=finish or "pass"))
    return [Service("noting", "noting", {}, **named)]


def steps(stubs) -> list[int]:
    return [args[0] for _, args, _ in stubs.calls("numbers")]


def test_a_tracker_is_told_of_the_run_in_order(stubs, followed):
    trackers = followed.open(recorder(stubs))
    followed.evaluation(trackers, 0)
    followed.step(trackers, 1, grad_norm=float("nan"))
    followed.step(trackers, 2)
    (followed.root / "best.json").write_text('{"checkpoint": "step_000002", "eval_loss": 0.5}')
    followed.end(trackers)
    assert followed.warnings == []
    opened, *told, end = stubs.calls()
    assert opened[2]["id"] == followed.id and opened[2]["config"]["lora_r"] == 4 and opened[2]["continued"] is False
    assert [one[1] for one in told[:3]] == [
        [0, {"eval/loss": 2.0, "eval/seconds": 0.5}], [1, {"train/loss": 1.0, "grad_norm": pytest.approx(float("nan"), nan_ok=True)}],
        [2, {"train/loss": 0.5}],
    ]  # fmt: skip
    facts = {"done": "all", "saved": "https://***@host/x", "best/checkpoint": "step_000002", "best/eval_loss": 0.5}
    assert told[3] == ["facts", [facts], {}]
    assert end == ["finish", [None], {}] and followed.warnings == [] and followed.lines == ["noting: in a list"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("where", "stops", "words"),
    [
        ({"open": "raise RuntimeError('no login')"}, [], "failed (open): RuntimeError: no login"),
        ({"numbers": "if step == 2: raise OSError('gone')"}, [1, 2], "failed (numbers): OSError: gone"),
        ({"numbers": "step == 2 and os._exit(3)"}, [1, 2], "has ended in the middle of the run (numbers)"),
        ({"numbers": "raise SystemExit(2)"}, [1], "failed (numbers): SystemExit: 2"),
        ({"numbers": "step == 2 and time.sleep(60)"}, [1, 2], "has not answered for 1 s (numbers)"),
        ({"finish": "time.sleep(60)"}, [1, 2, 3], "has not finished in time"),
    ],
    ids=["open", "raises", "crashes", "leaves", "hangs", "end hangs"],
)
def test_what_goes_wrong_in_a_tracker_costs_a_warning(stubs, followed, where, stops, words):
    trackers = followed.open(recorder(stubs, **where), timeout_s=1)
    start = time.monotonic()
    for step in (1, 2, 3):
        followed.step(trackers, step)
    assert time.monotonic() - start < 0.5, "the run does not wait"
    while not trackers[0].lost and "numbers" in where and time.monotonic() - start < 20:
        time.sleep(0.02)
    followed.end(trackers)
    assert time.monotonic() - start < 30
    assert steps(stubs) == stops
    (warning,) = followed.warnings
    assert warning.startswith("tracker noting ") and words in warning
    assert trackers[0].process.poll() is not None and not trackers[0].thread.is_alive()


def test_a_tracker_that_never_opens_is_left_at_the_end(stubs, followed):
    trackers = followed.open(recorder(stubs, open="time.sleep(60)"), timeout_s=1)
    followed.step(trackers, 1)
    start = time.monotonic()
    followed.end(trackers)
    assert time.monotonic() - start < 5 and "has not opened the run (are its service and its key right?) in time" in followed.warnings[0]


@pytest.mark.more
def test_events_that_wait_are_limited(stubs, followed, monkeypatch):
    from treetune.core.trackers import background

    monkeypatch.setattr(background, "LONGEST", 3)
    trackers = followed.open(recorder(stubs, open="time.sleep(2)"))
    for step in range(1, 9):
        followed.step(trackers, step)
    time.sleep(4)
    followed.end(trackers)
    assert steps(stubs) == [1, 2, 3] and "was too slow for 5 events" in followed.warnings[0]


def test_a_resumed_run_tells_no_step_twice_and_what_was_missed(stubs, followed):
    trackers = followed.open(recorder(stubs, numbers="if step == 3: raise OSError('down')"))
    for step in (1, 2, 3, 4):
        followed.step(trackers, step)
    followed.end(trackers, "failed: power")
    assert Book(followed.root).read("noting").step == 2
    again = followed.open(recorder(stubs), step=4)
    assert again[0].told == Told()
    followed.step(again, 5)
    followed.end(again)
    assert steps(stubs) == [1, 2, 3, 3, 4, 5], "3 failed, and comes again"
    opened = [named for _, _, named in stubs.calls("open")]
    assert [(one["id"], one["continued"]) for one in opened] == [(followed.id, False), ("there", True)]
    # Back to step 4, as after a crash: 5 has been told.
    third = followed.open(recorder(stubs), step=4)
    for step in (5, 6):
        followed.step(third, step)
    followed.end(third)
    assert steps(stubs)[6:] == [6]


def test_a_tracker_that_can_rewind_is_told_again_from_the_step_where_the_run_goes_on(stubs, followed):
    first = followed.open(recorder(stubs, rewinds=True))
    for step in (1, 2, 3):
        followed.step(first, step)
    followed.end(first)
    second = followed.open(recorder(stubs, rewinds=True), step=2)
    followed.step(second, 3)
    followed.end(second)
    assert steps(stubs) == [1, 2, 3, 3] and stubs.calls("open")[1][2]["step"] == 2


def test_another_project_is_another_run(stubs, followed):
    def of(project: str) -> list[Service]:
        return [one._replace(options={"project": project}, destination=("project",)) for one in recorder(stubs)]

    for project in ("a", "a", "b"):
        followed.end(followed.open(of(project)))
    assert [named["continued"] for _, _, named in stubs.calls("open")] == [False, True, False]


def test_folders_are_copied_where_they_are_asked_for(stubs, followed):
    for name in ("step_000002", "adapter"):
        (followed.root / name).mkdir()
    for keeps in ((), ("end",), ("checkpoint", "end")):
        trackers = followed.open(recorder(stubs, keeps=keeps))
        trackers[0].saved(followed.root / "step_000002", 2)
        trackers[0].saved(followed.root / "step_000001", 1)  # gone meanwhile
        trackers[0].saved(followed.root / "adapter", None)
        followed.end(trackers)
    assert [args[0] for _, args, _ in stubs.calls("copy")] == ["adapter", "step_000002", "adapter"]


def test_a_killed_trainer_leaves_a_tracker_that_finishes(stubs, followed):
    (service,) = recorder(stubs)
    if (pid := os.fork()) == 0:
        trackers = followed.open([service])
        followed.step(trackers, 1)
        while not steps(stubs):
            time.sleep(0.02)
        os._exit(9)
    os.waitpid(pid, 0)
    until = time.monotonic() + 20
    while not stubs.calls("finish") and time.monotonic() < until:
        time.sleep(0.05)
    assert stubs.calls("finish") == [["finish", ["killed"], {}]]


def test_a_damaged_book_has_no_entries(tmp_path):
    book = Book(tmp_path)
    book.write("wandb", Told("a", "p", 3, 2))
    assert Book(tmp_path).read("wandb") == Told("a", "p", 3, 2)
    for text in (
        "{",
        "[]",
        '{"wandb": 3}',
        '{"wandb": {"id": "a"}}',
        json.dumps({"wandb": {"id": 1, "destination": "", "step": "x", "evaluation": 0}}),
    ):
        book.path.write_text(text)
        assert Book(tmp_path).read("wandb") == Told()
