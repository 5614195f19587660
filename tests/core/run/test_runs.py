"""Runs as their folders tell: where each stands, what it reached, what differs."""

import json
import math

import pytest

from treetune.core import lock, records
from treetune.core.run import journal, marker, runs
from treetune.core.run.health import Event


def write(root, *, lines=(), config="model: a/b\nlearning_rate: 0.1\n", **status):
    root.mkdir(parents=True)
    marker.write(root, marker.new(("adapter",)))
    (root / "config.yaml").write_text(config)
    for line in lines:
        records.append(root / "metrics.jsonl", line)
    if status:
        journal.write(root, journal.Status(method="sft")._replace(**status))
    return root


def steps(*losses):
    return [{"step": i, "train/loss": loss, "step_seconds": 2.0} for i, loss in enumerate(losses, 1)]


@pytest.mark.parametrize("state", [journal.FINISHED, journal.STOPPED, journal.FAILED])
def test_a_run_that_has_ended_says_how(tmp_path, state):
    one = runs.read(write(tmp_path / "r", state=state, reason="why", total_steps=7, lines=steps(3.0, 2.0)))
    assert (one.state, one.reason, one.method, one.step, one.seconds, one.model) == (state, "why", "sft", 2, 4.0, "b")


@pytest.mark.parametrize("state", [journal.RUNNING, journal.SAVING])
def test_a_run_whose_process_is_gone_has_crashed_and_one_that_is_held_runs(tmp_path, state):
    root = write(tmp_path / "r", state=state)
    assert runs.read(root).state == runs.CRASHED and "without a word" in runs.read(root).reason
    held = lock.Lock(root)
    try:
        assert runs.read(root).state == journal.RUNNING
    finally:
        held.release()


def test_a_run_of_an_earlier_version_has_finished_where_its_result_is(tmp_path):
    root = write(tmp_path / "dpo-003")
    assert runs.read(root).state == runs.CRASHED
    (root / "adapter").mkdir()
    one = runs.read(root)
    assert (one.state, one.method) == (journal.FINISHED, "dpo")


def test_best_is_that_of_the_metric_that_checkpoints_follow(tmp_path):
    lines = [{"step": 0, "eval/reward": 0.1}, *steps(1.0, 2.0), {"step": 2, "eval/reward": 0.4}, {"step": 3, "eval/reward": 0.2}]
    root = write(tmp_path / "r", goal="reward", lines=lines)
    assert runs.read(root).best() == ("eval/reward", 0.4, 2)
    assert runs.read(root).best("train/loss") == ("train/loss", 1.0, 1), "losses fall"
    assert runs.read(root).best("nothing") is None
    (root / "status.json").unlink()
    (root / "best.json").write_text(json.dumps({"checkpoint": "step_000002", "eval_reward": 0.4}))
    assert runs.read(root).best() == ("eval/reward", 0.4, 2)
    nan = write(tmp_path / "n", lines=[{"step": 1, "train/loss": math.nan}, {"step": 2, "train/loss": 0.5}])
    assert runs.read(nan).best() == ("train/loss", 0.5, 2)


def test_runs_are_found_below_a_folder_and_not_inside_each_other(tmp_path):
    for name in ("b", "a/x", "a/y", "deep/1/2/z", "b/checkpoints/not"):
        write(tmp_path / name)
    (tmp_path / "other").mkdir()
    assert [path.relative_to(tmp_path).as_posix() for path in runs.find(tmp_path)] == ["a/x", "a/y", "b", "deep/1/2/z"]
    with pytest.raises(ValueError, match="is no run"):
        runs.read(tmp_path / "other")


def test_differences_are_those_of_the_configs_without_where_the_runs_are(tmp_path):
    one = write(tmp_path / "1", config="model: m\nlearning_rate: 1e-4\ndata: [a, b]\noutput_dir: x\n")
    two = write(tmp_path / "2", config="model: m\nlearning_rate: 2e-4\ndata: [a]\noutput_dir: y\nlora_r: 8\n")
    differences = runs.differences([runs.read(one), runs.read(two)])
    assert differences == {"learning_rate": [1e-4, 2e-4], "data": [["a", "b"], ["a"]], "lora_r": [None, 8]}
    assert [runs.shown(value) for value in differences["data"]] == ["a b", "a"] and runs.shown(None) == "-"
    assert runs.differences([runs.read(one), runs.read(two)], {"lora_r"}) == {"lora_r": [None, 8]}


def test_names_are_short_unless_two_are_the_same(tmp_path):
    past_runs = [runs.read(write(tmp_path / name)) for name in ("s/1", "t/1", "t/2")]
    assert runs.names(past_runs) == [str(tmp_path / "s/1"), str(tmp_path / "t/1"), "2"]


def test_a_damaged_status_config_or_record_is_left_out(tmp_path):
    root = write(tmp_path / "r", lines=steps(1.0), state=journal.FINISHED)
    (root / "status.json").write_text('{"state": ')
    (root / "config.yaml").write_text("a: [")
    with open(root / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "tra\n')
    one = runs.read(root)
    assert (one.config, one.state, len(one.history)) == ({}, runs.CRASHED, 1)
    assert [text.partition(f"{root}/")[2].split()[0] for text in one.damage] == ["config.yaml", "status.json", "metrics.jsonl:"]


def test_options_that_nobody_knows_differ_from_none(tmp_path):
    known, other = write(tmp_path / "a", state="finished"), write(tmp_path / "b", config="learning_rate: 0.2\n", state="finished")
    lost = write(tmp_path / "c")
    (lost / "config.yaml").unlink()
    assert runs.differences([runs.read(known), runs.read(lost)]) == {}
    assert "config.yaml does not exist" in runs.read(lost).damage[0]
    three = runs.differences([runs.read(known), runs.read(lost), runs.read(other)])
    assert three == {"model": ["a/b", runs.UNKNOWN, None], "learning_rate": [0.1, runs.UNKNOWN, 0.2]}


def test_the_journal_keeps_lines_until_the_run_has_its_folder(tmp_path):
    one = journal.Journal(tmp_path, method="sft", goal="loss")
    one.message("reading")
    assert list(tmp_path.iterdir()) == []
    one.start(10, 0, {"model": "m"})
    one.message("hot\x1b[31m http://u:p@h/x", warning=True)
    assert journal.log(tmp_path) == ["reading", "model: m", "hot\\x1b[31m http://***@h/x"]
    assert journal.log(tmp_path, journal.WARNING) == ["hot\\x1b[31m http://***@h/x"]
    assert journal.read(tmp_path).state == journal.RUNNING


@pytest.mark.parametrize(
    ("stopped", "saved", "state", "reason"),
    [
        (None, True, journal.FINISHED, ""),
        ("interrupted", True, journal.STOPPED, "interrupted"),
        ("failed: step 3 is not finite", False, journal.FAILED, "step 3 is not finite"),
        ("failed", False, journal.FAILED, ""),
        (None, False, journal.SAVING, ""),
    ],
)
def test_how_a_run_ended_is_in_its_status(tmp_path, stopped, saved, state, reason):
    one = journal.Journal(tmp_path, method="sft", goal="loss")
    one.start(10, 0, {})
    one.end(stopped, [])
    if saved:
        one.summary({"saved": "x"}, [])
    status = journal.read(tmp_path)
    assert (status.state, status.reason, status.total_steps) == (state, reason, 10)


def test_an_error_is_logged_with_the_place_where_it_arose(tmp_path):
    one = journal.Journal(tmp_path, method="sft", goal="loss")
    one.start(10, 0, {})
    try:
        raise RuntimeError("broken\nin two lines")
    except RuntimeError:
        one.end("failed: broken\nin two lines", [])
    assert journal.read(tmp_path).reason == "broken in two lines"
    errors = journal.log(tmp_path, journal.ERROR)
    assert errors[:2] == ["RuntimeError: broken", "in two lines"] and any("test_runs.py" in line for line in errors)


def test_a_resumed_run_keeps_its_beginning_and_the_health_up_to_there(tmp_path):
    one = journal.Journal(tmp_path, method="sft", goal="loss")
    one.start(10, 0, {})
    for step in (1, 2, 3):
        one.step({"step": step})
        one.health(Event(f"rule{step}", "seen", "fix"))
    began = journal.read(tmp_path).started
    again = journal.Journal(tmp_path, method="sft", goal="loss")
    again.start(12, 2, {})
    status = journal.read(tmp_path)
    assert [event.rule for event in status.health] == ["rule1", "rule2"] and status.started == began and status.total_steps == 12
