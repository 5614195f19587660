"""Answers of a report: damaged records are skipped, and of many completions the extremes are shown."""

import itertools
import json
import re

from treetune.core import records as store
from treetune.core.run import report
from treetune.core.run.health import Event


def records(path, lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_answers_of_a_damaged_file_are_those_that_can_be_read(tmp_path):
    good = {"step": 0, "prompt": "a", "answer": "b"}
    path = records(
        tmp_path / "samples.jsonl", [json.dumps(good), '{"step": 1, "pro', "[1]", "null", json.dumps(good | {"step": 2, "answer": "c"})]
    )
    assert report._answers(path, set()) == ([("a", [(0, "b"), (2, "c")])], [])
    assert report._answers(tmp_path / "none.jsonl", {1}) == ([], [])


def test_of_many_completions_the_best_and_the_worst_are_shown(tmp_path):
    lines = [{"step": 3, "prompt": "p", "answer": str(i), "rewards": {"r": i, "s": None}, "advantage": i - 4.0} for i in range(9)]
    lines += [{"step": 3, "prompt": "flat", "answer": "x", "rewards": {"r": 0}, "advantage": 0.0}] * 9
    _, [group] = report._answers(records(tmp_path / "samples.jsonl", map(json.dumps, lines)), {3})
    assert group["prompt"] == "p" and [one["answer"] for one in group["completions"]] == ["8", "7", "6", "1", "0"] and group["more"] == 4
    assert group["completions"][0] == {
        "label": "on", "advantage": "+4.00", "rewards": [("r", "8"), ("s", "no opinion")], "about": "", "answer": "8"
    }  # fmt: skip


class Words:
    """A tokenizer of nothing: the page has no documents."""


def started(root, monkeypatch, *, every=0.0, step=0):
    monkeypatch.setattr(report, "EVERY_S", every)
    monkeypatch.setattr(report, "SHARE", 0)
    one = report.Report(root, docs=(), tokenizer=Words(), read=None, unit="supervised tokens")
    one.start(40, step, {"model": "tiny <b>"})
    return one


def text_of(root):
    return (root / "report.html").read_text()


def update_of(root):
    """What live.js hands to an open page."""
    script = re.fullmatch(r"treetune\((.*)\)\n", (root / "live.js").read_text(), re.S)
    return json.loads(script[1])


def step_record(step, loss=1.0):
    return {"step": step, "train/loss": loss, "step_seconds": 3.0}


def test_a_page_follows_its_run_and_ends_static(tmp_path, monkeypatch):
    one = started(tmp_path, monkeypatch)
    assert "<script>" in text_of(tmp_path) and "running: step 0 of 40" in text_of(tmp_path)
    for step in (1, 2):
        one.step(step_record(step, loss=8.0 / step))
    one.health(Event("plateau", "it is <flat>", "raise it"))
    one.samples([{"step": 2, "prompt": "p", "answer": "<i>an answer"}])
    one.evaluation({"step": 2, "eval/loss": 3.25, "eval/seconds": 1.0})
    for text in (text_of(tmp_path), "".join(update_of(tmp_path)["parts"].values())):
        assert "step 2 of 40, about 1:54 to go" in text and "tiny &lt;b&gt;" in text and "<i>an" not in text
        assert "eval/loss 3.25" in text and "it is &lt;flat&gt;" in text and "&lt;i&gt;an answer" in text
    one.end(None, one.history)
    assert (tmp_path / "live.js").exists(), "what is trained is not saved yet"
    one.summary({"done": "step 40"}, one.history)
    assert "<script" not in text_of(tmp_path) and "running: " not in text_of(tmp_path) and "step 40" in text_of(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html"]


def test_the_page_of_a_run_that_fails_says_why(tmp_path, monkeypatch):
    one = started(tmp_path, monkeypatch)
    one.step(step_record(1))
    one.end("failed: step 2 is not finite", one.history)
    assert "failed: step 2 is not finite" in text_of(tmp_path) and "<script" not in text_of(tmp_path)
    assert not (tmp_path / "live.js").exists()


def test_a_page_is_written_now_and_then_and_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    clock, written, write = [100.0], [], report.write

    def slow(*args, **options):
        clock[0] += 0.5
        written.append(clock[0])
        write(*args, **options)

    monkeypatch.setattr(report.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(report, "write", slow)
    one = report.Report(tmp_path, docs=(), tokenizer=Words(), read=None, unit="pairs")
    one.start(1000, 0, {})
    for step in range(1, 101):
        clock[0] += 1.0
        one.step(step_record(step))
    assert len(written) == 5, "half a second of writing needs 25 seconds of training"
    assert min(b - a for a, b in itertools.pairwise(written)) >= 25


def test_a_resumed_page_has_the_curves_from_before(tmp_path, monkeypatch):
    for step in (1, 2):
        store.append(tmp_path / "metrics.jsonl", step_record(step, loss=7.5))
    started(tmp_path, monkeypatch, step=2)
    assert "train/loss 7.5" in text_of(tmp_path)
