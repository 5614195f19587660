"""What is said of ranks that do not go on, from where each of them is."""

import sys
from pathlib import Path

import pytest
import torch

from treetune.core import heartbeat, tree
from treetune.core.run import stalls
from treetune.core.run.stalls import Place

WAITS, READS = Place("step.py line 2 (all_sum)", True), Place("mine.py line 7 (grade)", False, True)
ASYNC = Place("copies.py line 87 (_take_in)", False)


@pytest.mark.parametrize(
    ("places", "says"),
    [
        ({0: WAITS, 1: READS}, "rank 1 hangs in mine.py line 7 (grade)"),
        ({0: ASYNC, 1: READS}, "rank 1 hangs in mine.py line 7 (grade)"),
        ({0: WAITS, 1: ASYNC}, "rank 1 hangs in copies.py line 87 (_take_in)"),
        ({0: WAITS}, "rank 1 does not answer"),
        ({1: WAITS}, "rank 0 does not answer"),
        ({0: WAITS, 1: WAITS}, "all ranks wait for one another"),
        ({0: READS, 1: READS}, "no rank goes on: rank 0 is in mine.py line 7 (grade); rank 1 is in"),
    ],
)
def test_the_rank_that_the_others_wait_for_is_named(places, says):
    text = stalls.told(places, 2, 30.4, Path("run/stacks"))
    assert says in text and "30 s" in text and str(Path("run/stacks")) in text


def test_a_place_is_that_of_the_users_code(monkeypatch):
    """Also where that code waits in a library; where none of it runs, it is that of the library."""
    name = "test_a_place_is_that_of_the_users_code"
    own = stalls.place_of(sys._getframe())
    assert own == Place(f"test_stalls.py line {sys._getframe().f_lineno - 1} ({name})", False, True)
    inside = tree.map(lambda leaf: stalls.place_of(sys._getframe(1)), {"a": torch.ones(1)})["a"]
    assert name in inside.text and not inside.waits
    assert stalls.place_of(None) == Place("no Python code", False)
    monkeypatch.setattr(stalls, "INSTALLED", ("<", "/"))
    library = tree.map(lambda leaf: stalls.place_of(sys._getframe(1)), {"a": torch.ones(1)})["a"]
    assert library.text.startswith("tree.py") and not library.waits


def test_collectives_are_waits(monkeypatch):
    monkeypatch.setattr(stalls, "DISTRIBUTED", __name__)
    assert stalls.place_of(sys._getframe()).waits
    monkeypatch.undo()
    assert not stalls.place_of(sys._getframe(), device="cuda").waits, "code of one's own hangs on any device"
    monkeypatch.setattr(stalls, "INSTALLED", ("<", "/"))
    assert stalls.place_of(sys._getframe(), device="cuda").waits, "a library may wait for others"


def test_the_heart_beats(monkeypatch):
    monkeypatch.setattr(heartbeat, "_last", [0.0])
    assert heartbeat.silence() > 0.1
    heartbeat.beat()
    assert heartbeat.silence() < 5


def test_nobody_looks_at_a_run_of_one_process(tmp_path):
    with stalls.watched(0, 1, 0.01, tmp_path, device="cpu"):
        pass
    assert not list(tmp_path.iterdir())
