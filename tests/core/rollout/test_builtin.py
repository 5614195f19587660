"""Built-in rewards: real solutions, worked examples, TRL's functions as oracles, arbitrary text."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treetune.core.rollout import builtin

DATA = Path(__file__).parents[3] / "examples" / "data"
SOLUTIONS = [
    json.loads(line)["messages"][-1]["content"]
    for name in ("gsm8k_train_sample.jsonl", "gsm8k_test_sample.jsonl")
    for line in (DATA / name).read_text().splitlines()
]
STEADY = settings(deadline=None, derandomize=True)  # the same examples on every machine, however busy
LATEX = st.text("\\{}$#%-−/.,=<>0123456789 afrcboxedtkhinsw\n", max_size=80)


def test_every_gsm8k_solution_agrees_with_itself_and_with_no_other_number():
    said = [f"{one.split('####')[0]}The answer is ${int(one.split('####')[1].replace(',', '')):,}.00." for one in SOLUTIONS]
    final = [one.split("####")[1].strip() for one in SOLUTIONS]
    wrong = [str(int(one.replace(",", "")) + 1) for one in final]
    assert len(SOLUTIONS) == 500
    for function in (builtin.gsm8k, builtin.math_equal):
        for completions, answer in ((SOLUTIONS, SOLUTIONS), (SOLUTIONS, final), (said, SOLUTIONS)):
            assert set(function(completions, answer)) == {1.0}
        assert set(function(SOLUTIONS, wrong)) == {0.0}


@pytest.mark.parametrize(("label", "kind"), [(True, 1.0), (False, 0.0)])
def test_gsm8k_agrees_with_the_labels_of_model_solutions(label, kind):
    """Labels were given by GSM8K's own check of the line `A: number`, on solutions of models of four sizes."""
    answers = {(row := json.loads(line)["messages"])[0]["content"]: row[-1]["content"] for line in _lines("gsm8k_test_sample.jsonl")}
    rows = [row for line in _lines("gsm8k_binary_sample.jsonl") if (row := json.loads(line))["label"] is label and row["prompt"] in answers]
    scores = builtin.gsm8k([row["completion"] for row in rows], [answers[row["prompt"]] for row in rows])
    assert len(rows) >= 40 and set(scores) == {kind}


def _lines(name):
    return (DATA / name).read_text().splitlines()


@pytest.mark.parametrize(
    ("said", "answer", "reward"),
    [
        ("it is 18", "18", 1), ("it is 18.", 18, 1), ("$18.00", "18", 1), ("18%", "18", 1), ("1,234", "1234", 1), ("1234", "1,234", 1),
        ("-5", "5", 0), ("-$5", "-5", 1), ("$-5", "-5", 1), ("−5", "-5", 1), ("20-2=18", "18", 1), ("10-18", "18", 1),
        ("- 5 apples", "5", 1),
        ("18 then 19", "18", 0), ("#### 18\nQuestion: 7", "18", 1), ("#### 7\n18", "18", 0), ("#### none\n18", "18", 1), (".5", "0.5", 1),
        ("no number", "18", 0), ("", "18", 0), ("18", None, None), ("18", "", None), ("18", "eighteen", None), ("1,2,3", "3", 1),
        ("x18", "18", 0),
    ],
)  # fmt: skip
def test_gsm8k_worked(said, answer, reward):
    assert builtin.gsm8k([said], [answer]) == [reward]
    assert builtin.gsm8k([[{"role": "assistant", "content": said}]], [answer]) == [reward]


@pytest.mark.parametrize(
    ("said", "answer", "reward"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", 1), (r"\boxed{\dfrac12}", "1/2", 1), (r"\boxed{-\frac{3}{4}}", "-0.75", 1),
        ("it is 3/4", "0.75", 1),
        (r"\boxed{1\frac{4}{5}}", "9/5", 1), (r"\boxed{50\%}", "50", 1), (r"\boxed{50\%}", "1/2", 1), ("50%", "5%", 0), ("0.5%", "50%", 0),
        (r"\boxed{0.5}", r"50\%", 1), (r"first \boxed{1}, then \boxed{2}", "2", 1), (r"\boxed{1}, \boxed{2}", "1", 0),
        (r"\boxed{2", "2", 1),
        (r"\boxed{x = 7}", "7", 1), (r"\boxed{7\text{ cm}}", "7", 1), (r"\boxed{90^\circ}", "90", 1), (r"\boxed{1{,}000}", "1000", 1),
        (r"\boxed{\$12.50}", "12.5", 1), (r"\boxed{\sqrt{2}}", r"\sqrt 2", 1), (r"\boxed{(1, 2)}", "(1,2)", 1), (r"\boxed{x+1}", "x+2", 0),
        (r"\boxed{\frac{x}{2}}", r"\dfrac{x}{2}", 1), (r"it is \frac{x}{2}", "2", 0), (r"\boxed{\frac{1}{0}}", "1", 0),
        ("the answer: 5", r"so \boxed{5}", 1),
        (r"\boxed{\boxed{5}}", "5", 1), (r"\boxed{\text{B}}", "B", 1), ("B", "B", 0), ("0.333", "1/3", 0), ("none", "1", 0),
        ("1", None, None),
        ("1", " ", None), ("16-3", "3", 1), (r"$\frac{2}{4}$ it is", "0.5", 1), (r"\boxed{-5}", "5", 0), ("", "5", 0),
    ],
)  # fmt: skip
def test_math_equal_worked(said, answer, reward):
    assert builtin.math_equal([said], [answer]) == [reward]


def test_math_verify_asks_the_package(monkeypatch):
    """The package as its documentation describes it: parse gives a list, empty for what it cannot read; verify(gold, answer)."""
    parse = lambda said: [said.strip("$")] if said.startswith("$") else []  # noqa: E731
    fake = types.SimpleNamespace(parse=parse, verify=lambda gold, answer: bool(answer) and gold == answer)
    monkeypatch.setitem(sys.modules, "math_verify", fake)
    assert builtin.math_verify(["$x$", "$y$", "x", "$$"], ["x", "$x$", "$x$", ""]) == [1.0, 0.0, 0.0, 1.0]
    fake.parse = lambda said: []
    assert builtin.math_verify(["$x$"], ["x"]) == [None]


def test_math_verify_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match="pip install 'math-verify"):
        builtin.math_verify([], [])


GOOD = "<think>a</think>\n<answer>b</answer>"


@pytest.mark.parametrize(
    ("said", "reward"),
    [
        (GOOD, 1), (f"\n{GOOD} ", 1), ("<think>\n</think><answer></answer>", 1), ("a</think><answer>b</answer>", 0), (f"well {GOOD}", 0),
        (f"{GOOD} more", 0), (GOOD + GOOD, 0), ("<answer>b</answer><think>a</think>", 0), ("<think><answer>b</answer></think>", 0), ("", 0),
        ("<think>a</think> so <answer>b</answer>", 0), ("<think>a</think><answer>b", 0), ("<think>a<think></think><answer>b</answer>", 0),
    ],
)  # fmt: skip
def test_format_tags(said, reward):
    assert builtin.format_tags([said]) == [reward]


def test_format_tags_where_the_prompt_opens_the_first():
    assert builtin.format_tags(["a</think><answer>b</answer>", GOOD], opened=True) == [1.0, 0.0]


def test_digits_is_the_share_of_digits():
    assert builtin.digits(["1234", "ab12", "abc", "", "²٣"]) == [1.0, 0.5, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(("limit", "cache"), [(100, 20), (64, 64), (256, 1)])
def test_length_and_repetition_are_those_of_trl(limit, cache):
    rewards = pytest.importorskip("trl.rewards.other_rewards")
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 4, size).tolist() for size in (0, 1, 2, 3, 40, 80, 81, 90, 100, 101, 255, 256, 257)]
    wanted = rewards.get_soft_overlong_punishment(limit, cache)(ids)
    np.testing.assert_allclose(builtin.length([""] * 13, ids, max=limit, cache=cache), wanted, rtol=0, atol=1e-15)
    for ngram in (1, 2, 5):
        wanted = rewards.get_repetition_penalty_reward(ngram)(ids)
        np.testing.assert_allclose(builtin.repetition([""] * 13, ids, ngram=ngram), wanted, rtol=0, atol=1e-15)


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="max=64, cache=65"):
        builtin.length([], [], max=64, cache=65)
    with pytest.raises(ValueError, match="cache=0"):
        builtin.length([], [], cache=0)
    with pytest.raises(ValueError, match="ngram=0"):
        builtin.repetition([], [], ngram=0)


@given(LATEX | st.text(max_size=40), LATEX | st.text(max_size=10) | st.none() | st.integers() | st.floats())
@STEADY
def test_any_text_gets_a_number_or_no_opinion(said, answer):
    for function in (builtin.gsm8k, builtin.math_equal):
        assert function([said], [answer])[0] in (0.0, 1.0, None)
    assert builtin.format_tags([said])[0] in (0.0, 1.0)
    assert 0.0 <= builtin.digits([said])[0] <= 1.0
    assert -1.0 <= builtin.repetition([said], [[ord(char) for char in said]])[0] <= 0.0


@given(st.fractions(max_denominator=999), st.text("abc \n", max_size=9))
@STEADY
def test_a_fraction_equals_itself_however_it_is_written(value, around):
    minus, top, bottom = "-" * (value < 0), abs(value.numerator), value.denominator
    written = [f"{minus}{top}/{bottom}", rf"{minus}\frac{{{top}}}{{{bottom}}}", rf"\boxed{{{minus}\dfrac{{{top}}}{{{bottom}}}}}"]
    for one in written:
        for other in written:
            assert builtin.math_equal([f"{around} {one} {around}"], [other]) == [1.0]
            assert builtin.math_equal([f"{around} {one} {around}"], [f"{top + 1}/{bottom}" if value >= 0 else "0"]) == [0.0]


@pytest.mark.parametrize("piece", [r"\boxed{", "{", "9", "9,", "1 ", r"\frac{", "#### ", "<think>", "-$", "1/", "0.", r"\text{"])
def test_degenerate_text_takes_no_time(piece):
    """A collapsed policy repeats itself: 40,000 characters of a piece must not take a reward's time limit."""
    said = piece * (40_000 // len(piece))
    for function in (builtin.gsm8k, builtin.math_equal):
        assert function([said], ["12345"]) == [0.0]
    assert builtin.format_tags([said]) == [0.0]
