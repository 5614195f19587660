"""Columns inside columns."""

from treetune.core.data import nested, sources

ROWS = [{"a": {"b": {"c": 1}, "d": 2}, "e": 3}, {"a": {"b": None}, "e": 4}, {"e": 5}]


def test_a_dotted_name_is_a_column_in_place_of_the_one_it_is_in():
    rows = nested.lifted(sources.from_list(ROWS), ["a.b.c", "e", None, 7])
    assert rows.rows == [{"e": 3, "a.b.c": 1}, {"e": 4}, {"e": 5}]
    assert rows.numbers == [1, 2, 3]


def test_what_is_named_itself_stays():
    assert nested.lifted(sources.from_list(ROWS), ["a.d", "a"]).rows[0] == {"a": ROWS[0]["a"], "e": 3, "a.d": 2}


def test_a_column_of_that_very_name_comes_first():
    rows = sources.from_list([{"a.b": 1, "a": {"b": 2}}])
    assert nested.lifted(rows, ["a.b"]) is rows
    assert nested.look_up(rows.rows[0], "a.b") == 1 and nested.look_up({"a": {"b": 2}}, "a.b") == 2
    assert nested.look_up({"a": 3}, "a.b") is None and nested.look_up({}, "a") is None


def test_plain_names_change_nothing():
    rows = sources.from_list(ROWS)
    assert nested.lifted(rows, ["a", "e"]) is rows
