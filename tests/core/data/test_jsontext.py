"""JSON of rows: what Python's parser lets pass or cannot survive is one line that says where."""

import json

import pytest

from treetune.core.data import jsontext, sources

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a", "text": "b"}', "^x line 1: the field 'text' comes twice in one object: rename"),
        ('{"messages": [{"role": "user", "role": "assistant"}]}', "^x line 1: the field 'role' comes twice"),
        ('{"a": ' + DEEP + "}", "^x line 1: objects and lists lie in each other more than 200 levels deep"),
        ('{"a": ' + "[" * 250 + "]" * 250 + "}", "^x line 1: objects and lists lie in each other more than 200"),
        ('{"a": ' + "9" * 5000 + "}", "^x line 1: broken JSON .Exceeds the limit"),
        ('{"text": "a"},', "^x line 1: broken JSON .Extra data at column 14"),
    ],
)
def test_refused(text, message):
    with pytest.raises(ValueError, match=message):
        jsontext.parse(text, "x line 1")


def test_case_counts_and_nesting_within_the_limit_is_read():
    assert jsontext.parse('{"text": "a", "Text": "b"}', "x") == {"text": "a", "Text": "b"}
    assert jsontext.parse("[" * 200 + "]" * 200, "x")


@pytest.mark.parametrize("value", [[], [1], [{"a": [1, {"b": None}]}, "x", 2.5]])
def test_items_are_those_of_the_list(value):
    for indent in (None, 1):
        assert list(jsontext.iterate_items(f" {json.dumps(value, indent=indent)}\n", "x")) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n]', "line 2: broken JSON"),
        ('[{"a": 1} {"a": 2}]', "line 1: broken JSON .Expecting ',' delimiter"),
        ('[{"a": 1},\n{"a": 2}', "line 2: broken JSON .Expecting ',' delimiter"),
        ('[{"a": 1}]\nx', "line 2: broken JSON .Extra data"),
        ('[{"a": 1},\n{"a": 1, "a": 2}]', "row 2: the field 'a' comes twice"),
        ("[", "line 1: broken JSON"),
    ],
)
def test_a_broken_list_names_its_line_or_row(text, message):
    with pytest.raises(ValueError, match=f"^x {message}"):
        list(jsontext.iterate_items(text, "x"))


def test_a_repeated_column_of_a_file_is_refused(tmp_path):
    for name, text, place in (
        ("a.jsonl", '{"text": "a"}\n{"text": "a", "text": "b"}\n', "line 2: the field 'text'"),
        ("a.json", '[{"text": "a", "text": "b"}]', "row 1: the field 'text'"),
        ("a.csv", "q;a\n1;2\n", r"line 1: one column, 'q;a': expected columns separated by commas, not by ';'"),
        ("a.csv", "text,id,text\na,1,b\n", "line 1: the header has the column 'text' twice"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name} {place}"):
            sources.read(str(tmp_path / name))
    (tmp_path / "b.csv").write_text("text,Text\na,b\n")
    assert sources.read(str(tmp_path / "b.csv")).rows == [{"text": "a", "Text": "b"}]


def test_blank_ends_and_byte_order_marks_are_no_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n \n\n')
    assert sources.read(str(tmp_path / "a.jsonl")).rows == [{"text": "a"}, {"text": "b"}]
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf\n{"text": "a"}\n')
    assert sources.read(str(tmp_path / "b.jsonl")).rows == [{"text": "a"}]


def test_numbers_past_the_machines_types_do_not_stop_a_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "n": NaN, "m": 1e400, "k": ' + "9" * 400 + "}\n")
    assert sources.read(str(tmp_path / "a.jsonl")).rows[0]["k"] == int("9" * 400)


def test_csv_fields_of_any_length(tmp_path):
    long = "a b " * 50_000
    (tmp_path / "a.csv").write_text(f'text,n\n"{long}",1\n')
    assert sources.read(str(tmp_path / "a.csv")).rows == [{"text": long, "n": "1"}]
