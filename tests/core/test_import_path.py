"""Import paths of functions: their form, their options, and what a function takes, read without importing it."""

import pytest

from treetune.core import import_path


@pytest.mark.parametrize(
    "text, is_path",
    [
        ("own.py:focal", True), ("folder/own.py:focal?gamma=2", True), ("package.module.focal", True), ("package.module:focal", True),
        ("dapo", False), ("nll", False), ("own.py", True), ("focal", False), ("own.py:", False), ("a b.c", False), ("", False),
    ],
)  # fmt: skip
def test_what_has_the_form_of_an_import_path(text, is_path):
    assert import_path.is_path(text) == is_path


def test_options_are_json_where_they_can_be():
    found = import_path.split_options("own.py:focal?gamma=2.5,name=x")
    assert found == ("own.py:focal", {"gamma": 2.5, "name": "x"})


def test_an_option_without_a_value_or_given_twice_is_refused():
    for text in ("own.py:focal?gamma", "own.py:focal?=1", "own.py:focal?gamma=1,gamma=2"):
        with pytest.raises(ValueError, match="is not name=value, each name once"):
            import_path.split_options(text)


def test_loading_binds_options_and_makes_an_instance_of_a_class(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def double(x, *, times=2):\n    return x * times\n\n\nclass Sum(int):\n    pass\n")
    assert import_path.load("mine.py:double")(3) == 6 and import_path.load("mine.py:double?times=5")(3) == 15
    assert import_path.load("mine.py:Sum")(3) == 3
    with pytest.raises(ValueError, match="mine.py has no function triple"):
        import_path.load("mine.py:triple")
