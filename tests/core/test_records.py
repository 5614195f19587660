"""Files of records: what a crash or a disk damages costs one line, never the lines after it."""

import json
import math
import os

import pytest

from treetune.core import drafts, durable, records

STEPS = [{"step": i, "loss": float(i)} for i in (1, 2, 2, 3)]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for record in STEPS:
        records.append(file, record)
    return file


@pytest.mark.parametrize("torn", ["", '{"step": 4, "lo', '{"step": 4}{"st'])
def test_resuming_truncates_to_the_checkpoint(path, tmp_path, torn):
    with open(path, "a") as file:
        file.write(torn)
    assert records.read(path) == (STEPS, [5] if torn else [])
    assert records.truncate(path, 2).records == STEPS[:3] == records.read(path).records
    assert records.truncate(tmp_path / "new.jsonl", 5) == ([], [])
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.jsonl", "new.jsonl"}, "no draft is left"


BROKEN = [
    b'{"step": 2, "lo',
    b"\x00\x00\x00", b"[1]", b"3", b"null", b'"step"', b'{"loss": 2.0}', b'{"step": null}', b'{"step": "2"}', b'{"step": -1}',
    b'{"step": 2.5}', b'{"step": true}', b'{"step": 2, "loss": "2"}', b'{"step": 2, "loss": [2]}', b'{"step": 2, "loss": NaN}', b"[" * 9999,
    b'{"step": 2, "loss": 1e999}', b'{"step": 99999999999999999999}', b'{"step": 2, "loss": 1\xff}', b'{"step": 1' + b"0" * 5000 + b"}",
]  # fmt: skip


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_line_costs_that_line_only(path, line):
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], line, *lines[2:]]) + b"\n")
    kept = [STEPS[0], *STEPS[2:]]
    assert records.read(path, numbers=True) == (kept, [2])
    assert records.truncate(path, 3, numbers=True) == (kept, [2])
    assert path.read_bytes() == b"\n".join([lines[0], *lines[2:]]) + b"\n"
    assert records.describe(path, [2]) == f"{path}: line 2 holds no record and is left out; the others are kept"
    assert "lines 1, 2, 3, 4, 5 and 2 more hold no record" in records.describe(path, [*range(1, 8)])


def test_a_record_after_a_torn_line_has_a_line_of_its_own(path):
    os.truncate(path, path.stat().st_size - 4)
    records.append(path, {"step": 4})
    assert records.read(path) == ([*STEPS[:3], {"step": 4}], [4])


def test_lines_that_are_kept_keep_their_bytes(tmp_path):
    path = tmp_path / "samples.jsonl"
    text = '{"step":1,  "answer": "a\\u2028 \u2028 \\ud83d é", "rewards": {"a": null}}\n'
    path.write_text(text + text.replace("1", "2"), encoding="utf-8")
    records.truncate(path, 1)
    assert path.read_text(encoding="utf-8") == text


def test_what_json_cannot_hold_is_null_and_read_as_nan(tmp_path):
    path = tmp_path / "samples.jsonl"
    records.append(path, {"step": 1, "a": math.nan, "b": [math.inf, {"c": -math.inf}], "d": "\ud800"})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"step": 1, "a": None, "b": [None, {"c": None}], "d": "\ud800"}
    assert math.isnan(records.read(path).records[0]["a"])


@pytest.mark.parametrize("keep", [True, False])
def test_records_at_the_step_itself_are_kept_on_request(path, keep):
    assert records.truncate(path, 2, keep=lambda _: keep).records == STEPS[: 3 if keep else 1]


def test_a_replaced_file_was_flushed_first_and_its_folder_after(tmp_path, monkeypatch):
    seen, fsync, replace = [], durable.fsync, os.replace
    monkeypatch.setattr(durable, "fsync", lambda path: seen.append(path.name) or fsync(path))
    monkeypatch.setattr(os, "replace", lambda *names: seen.append("replace") or replace(*names))
    drafts.write(tmp_path / "a", "text")
    assert seen[0].endswith(".draft") and seen[1:] == ["replace", tmp_path.name] and (tmp_path / "a").read_text() == "text"
