"""Answers of a report: damaged records are skipped, and of many completions the extremes are shown."""

import json

from treetune.core.run import report


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
