"""Import paths of functions: their form, their options, and what a function takes, read without importing it."""

import inspect
import os
import sys

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


FILE = """from __future__ import annotations

from dataclasses import dataclass

import neighbour


@dataclass
class Focal:
    gamma: float = 2.0

    def __call__(self, logp):
        return logp["missing"] if self.gamma == 0 else neighbour.VALUE


def wrong(x, *, gamma=2.0):
    raise OSError(28, "no space")
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "user.py").write_text(FILE)
    (tmp_path / "neighbour.py").write_text("VALUE = 7\n")
    return f"{tmp_path}/user.py"


def test_a_file_may_have_dataclasses_and_import_its_neighbours(user):
    assert import_path.load_guarded(f"{user}:Focal")(1) == 7, "a class without options is made, too"
    assert list(inspect.signature(import_path.load_guarded(f"{user}:Focal?gamma=3")).parameters) == ["logp"]


def test_what_a_function_raises_is_named_with_its_line(user):
    with pytest.raises(import_path.Failed, match=r"user.py:wrong failed in line 17: OSError: .*no space"):
        import_path.load_guarded(f"{user}:wrong")(1)
    with pytest.raises(import_path.Failed, match=r"user.py:Focal failed in line 13: TypeError"):
        import_path.load_guarded(f"{user}:Focal?gamma=0")(1)


@pytest.mark.parametrize("value", ["abc", "", "[1]", "null", "true"])
def test_an_option_of_another_type_than_its_default_is_refused(user, value):
    with pytest.raises(ValueError, match="gamma must be a number, as its default 2.0"):
        import_path.load(f"{user}:wrong?gamma={value}")


@pytest.mark.parametrize("text", ["raise Exception('own')", "import sys; sys.exit(7)", "raise RuntimeError('x')", "undefined_name"])
def test_a_file_that_does_not_run_is_named(tmp_path, text):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(ValueError, match="bad.py does not load"):
        import_path.load(f"{tmp_path}/bad.py:f")


def test_a_file_runs_once_until_it_changes(tmp_path):
    file = tmp_path / "once.py"
    file.write_text("def f():\n    return 1\n")
    assert import_path.load(f"{file}:f") is import_path.load(f"{file}:f")
    file.write_text("def f():\n    return 22\n")
    os.utime(file, ns=(1, 1))
    assert import_path.load(f"{file}:f")() == 22


def test_a_module_is_that_of_the_current_folder(tmp_path, monkeypatch):
    """Files of one name in two folders, one after the other in a process, as in a notebook that changes its folder."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ours.py").write_text(f"def who():\n    return {name!r}\n")
    for name in ("first", "second", "first"):
        monkeypatch.chdir(tmp_path / name)
        assert import_path.load("ours.py:who")() == import_path.load("ours.who")() == name
