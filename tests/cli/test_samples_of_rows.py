"""Rows of every kind train with default options, whose sample prompt comes from the rows."""

import json

import pytest

ROWS = {
    "pretokenised": {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]},
    "whole": {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9]},
    "segments": {"segments": [{"text": "hello", "label": False}, {"text": " yes", "label": True}]},
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_without_messages_have_a_sample(name, tune, tiny, here):
    (here / "rows.jsonl").write_text("".join(json.dumps(ROWS[name] | {"id": i}) + "\n" for i in range(6)))
    options = ("--sequence-len", "64", "--max-steps", "1", "--sample-tokens", "2")
    done = tune("sft", "--model", str(tiny.model), "--data", "rows.jsonl", *options, "--output-dir", "run")
    assert done.code == 0, done.err
    assert "not read: id" in done.out and len((here / "run" / "samples.jsonl").read_text().splitlines()) == 2


def test_a_mapped_conversation_has_a_sample(tune, tiny, here):
    talk = {"talk": [{"role": "user", "content": "hi"}, {"role": "bot", "content": "yes"}]}
    (here / "rows.jsonl").write_text((json.dumps(talk) + "\n") * 6)
    entry = "datasets: [{path: rows.jsonl, type: chat_template, field_messages: talk, roles: {assistant: [bot]}}]\n"
    (here / "run.yaml").write_text(f"model: {tiny.model}\nmax_steps: 1\nsequence_len: 64\nsample_tokens: 2\n{entry}")
    done = tune("sft", "--config", "run.yaml", "--output-dir", "run")
    assert done.code == 0, done.err
    assert len((here / "run" / "samples.jsonl").read_text().splitlines()) == 2
