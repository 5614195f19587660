import datetime

from hypothesis import given, settings
from hypothesis import strategies as st

from treetune.core.data import dedup, sources


def test_the_first_of_equal_rows_stays():
    one = sources.from_list([{"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1}, {"a": [1, {"x": "é", "y": None}]}], "one")
    two = sources.from_list([{"a": 1}, {"a": [1, {"y": None, "x": "é"}]}, {"a": 2}], "two")
    (first, second), dropped = dedup.drop_duplicates([one, two])
    assert first.numbers == [1, 3, 4] and second.numbers == [3] and dropped == [1, 2]
    assert sources.locate_row(second, 0) == "two row 3"


def test_rows_that_look_alike_differ():
    rows = [{"a": 1}, {"a": 1.0}, {"a": "1"}, {"a": True}, {"a": None}, {}, {"a": [1]}, {"a": {"a": 1}}, {"b": 1}, {"a": "\ud800"}]
    rows += [{"a": datetime.date(2020, 1, 2)}, {"a": datetime.date(2020, 1, 3)}, {"a": b"1"}, {"a": "a b"}, {"a": "a  b"}]
    assert dedup.drop_duplicates([sources.from_list(rows)])[1] == [0]
    assert dedup.drop_duplicates([sources.from_list(rows * 2)])[1] == [len(rows)]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.text("ab", max_size=1), lambda x: st.lists(x, max_size=2), max_leaves=3
)
ROWS = st.lists(st.dictionaries(st.sampled_from("abc"), VALUES, max_size=2), max_size=30)


def typed(value):
    """Hashable, and tells True from 1."""
    if isinstance(value, dict):
        return frozenset((key, typed(item)) for key, item in value.items())
    return tuple(map(typed, value)) if isinstance(value, list) else (type(value), value)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(ROWS, ROWS)
def test_it_is_the_set_of_rows(train, held):
    (one, two), dropped = dedup.drop_duplicates([sources.from_list(train), sources.from_list(held)])
    kept = [typed(row) for row in one.rows + two.rows]
    assert len(kept) == len(set(kept)) and set(kept) == {typed(row) for row in train + held}
    assert dropped == [len(train) - len(one.rows), len(held) - len(two.rows)]
    assert {typed(row) for row in one.rows} == {typed(row) for row in train}, "held-out rows give way to training rows"
