"""Checkpoints that a thread writes while the state goes on changing."""

import threading
from functools import partial

import pytest
import torch

from treetune.core import async_save, ckpt, ckpt_parts, tree
from treetune.core.state import TrainState


def _state(fill: float, at: int) -> TrainState:
    params = {"w": torch.full((5, 3), fill), "view": torch.full((4, 6), fill).T[::2], "half": torch.full((2,), fill).bfloat16()}
    return TrainState(params, {}, {"mu": {"w": torch.full((5, 3), -fill)}}, {}, torch.tensor(at))


def _held(path) -> set[float]:
    loaded, _ = ckpt.load(path, _state(0.0, 0))
    return {value for leaf in tree.leaves({"params": loaded.params, "opt": loaded.opt}) for value in leaf.flatten().tolist()}


class Gate:
    """Writing that waits to be let through; begun: a thread has come to it. most: threads that were inside at once."""

    def __init__(self):
        self.begun, self.open = threading.Event(), threading.Event()
        self.inside, self.most = 0, 0

    def __call__(self, write, *args):
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.begun.set()
        assert self.open.wait(60)
        self.inside -= 1
        return write(*args)


@pytest.fixture
def gate(monkeypatch):
    found = Gate()
    monkeypatch.setattr(ckpt_parts, "write", partial(found, ckpt_parts.write))
    return found


def test_what_changes_after_the_step_is_not_in_its_checkpoint(tmp_path, gate):
    saver, state = async_save.Saver(asynchronous=True), _state(1.0, 3)
    saver.begin(tmp_path, state, {"note": "x"})
    for leaf in tree.leaves({"params": state.params, "opt": state.opt}):
        leaf.fill_(9.0)
    assert saver.written() is None and ckpt.steps(tmp_path) == []
    gate.open.set()
    saver.wait()
    path = tmp_path / "step_000003"
    assert saver.written() == path and saver.written() is None
    assert _held(path) == {1.0, -1.0} and ckpt.read_meta(path)["note"] == "x"


def test_the_next_save_waits_for_the_one_before(tmp_path, gate):
    saver = async_save.Saver(asynchronous=True)
    saver.begin(tmp_path, _state(1.0, 1), {})
    assert gate.begun.wait(60)
    threading.Timer(0.2, gate.open.set).start()
    saver.begin(tmp_path, _state(2.0, 2), {})
    assert (tmp_path / "step_000001").exists() and gate.most == 1
    saver.wait()
    assert [_held(path) for path in ckpt.steps(tmp_path)] == [{1.0, -1.0}, {2.0, -2.0}]
    assert not list(tmp_path.glob(".*"))


def test_an_error_is_known_at_once_and_raised_where_it_is_waited_for(tmp_path, monkeypatch):
    saver = async_save.Saver(asynchronous=True)
    saver.begin(tmp_path, _state(1.0, 1), {})
    saver.wait()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ckpt_parts, "write", full)
    saver.begin(tmp_path, _state(2.0, 2), {})
    saver.settle()
    assert saver.failed
    with pytest.raises(ckpt.SaveError, match=r"could not save .*step_000002.*No space left.*before it are intact"):
        saver.begin(tmp_path, _state(3.0, 3), {})
    assert not saver.failed and saver.written() == tmp_path / "step_000001"
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def test_without_a_thread_it_is_written_when_begin_returns(tmp_path):
    saver = async_save.Saver()
    saver.begin(tmp_path, _state(1.0, 1), {})
    assert saver.written() == tmp_path / "step_000001" and _held(tmp_path / "step_000001") == {1.0, -1.0}
