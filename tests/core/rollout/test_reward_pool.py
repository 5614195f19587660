"""Rewards in worker processes: what functions get, how they are named, what they may return, what their faults cost."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

from treetune.core.rollout import reward_pool

spec = importlib.util.spec_from_file_location("reward_scene", Path(__file__).with_name("reward_scene.py"))
scene = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scene)
here = scene.here


def test_a_function_gets_what_the_documents_say(here):
    rows = [
        scene.group("a", "bc", columns={"answer": "4", "tags": ["x"], "completion": "gold"}),
        scene.group("d", "", columns={"answer": "5"}, row=1),
    ]
    scene.score("rewards.seen", rows)
    asked = [{"role": "user", "content": "2+2?"}]
    said = [[{"role": "assistant", "content": text}] for text in ("a", "bc", "d", "")]
    assert scene.seen(here) == [
        {
            "completions": said,
            "prompts": [asked] * 4,
            "completion_ids": [[0], [0, 1], [0], []],
            "answer": ["4", "4", "5", "5"],
            "tags": [["x"], ["x"], None, None],
        }
    ]


def test_prompts_of_text_give_plain_strings(here):
    scene.score("rewards.seen", [scene.group("a", "bc", chat=False)])
    assert scene.seen(here) == [{"completions": ["a", "bc"], "prompts": ["2+2?"] * 2, "completion_ids": [[0], [0, 1]]}]


def test_functions_of_trl_and_built_in_ones_run_as_they_are(here):
    pytest.importorskip("trl")
    rows = [scene.group("<think>\na\n</think>b", "b 4", columns={"answer": "4"})]
    made, _ = scene.score(["trl.rewards.think_format_reward", "gsm8k", "length?max=6,cache=4", "digits"], rows, timeout_s=60)
    np.testing.assert_array_equal(made[0], [[1, 0, -1, 0], [0, 1, -1 / 4, 1 / 3]])


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rewards.size", [1, 3]), ("rewards:size", [1, 3]), ("rewards.py:size", [1, 3]), ("rewards.later", [1, 3]),
        ("rewards.rubric", [7, 7]),
        ("rewards.named", [1, 1]), ("rewards.named?half=3", [6, 6]), ("rewards.ids_only", [0, 3]), ("rewards.torch_is_there", [0, 0]),
    ],
)  # fmt: skip
def test_names_and_kinds_of_functions(here, name, expected):
    assert scene.score(name, [scene.group("a", "bcd", columns={"level": 2})])[0][0, :, 0].tolist() == expected


def test_a_file_elsewhere_may_import_its_neighbours(here):
    (here / "deep").mkdir()
    (here / "deep" / "json.py").write_text("from helper import two\ndef fn(completions):\n    return [two] * len(completions)\n")
    (here / "deep" / "helper.py").write_text("two = 2\n")
    assert scene.values("deep/json.py:fn", "a") == [2.0]
    assert scene.values(f"{here}/deep/json.py:fn", "a") == [2.0]


BAD = {
    "gms8k": r"did you mean gsm8k\?",
    "nothing.size": "No module named 'nothing'",
    "rewards.sise": "rewards has no sise; its functions are texts, size",
    "rewards.sys": "rewards.sys is of type module, expected a function",
    "missing.py:size": "there is no file .*missing.py",
    "broken.size": "SyntaxError",
    "raises.size": r"RuntimeError: no key \(raises.py, line 2\)",
    "exits.size": "SystemExit: 3",
    "dies.size": r"dies.size cannot be loaded: the worker process ended with exit code 9",
    "rewards.size?half": "the option 'half' of rewards.size has no value",
    "rewards.named?halve=2": "rewards.named has no option halve; its options are completions, half, level",
    "length?min=3": "length has no option min; its options are cache, max",
    "length?max=3": "max=3, cache=64",
    "digits?x=1": "digits has no option x; its options are none",
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_loaded_is_refused_before_anything_starts(here, name):
    (here / "broken.py").write_text("def size(:\n")
    (here / "raises.py").write_text("\nraise RuntimeError('no key')\n")
    (here / "exits.py").write_text("import sys\nsys.exit(3)\n")
    (here / "dies.py").write_text("import os\nos._exit(9)\n")
    before = set(scene.children())  # earlier tests may have left helpers of multiprocessing
    with pytest.raises(ValueError, match=BAD[name]):
        reward_pool.Pool([name], workers=2)
    assert set(scene.children()) <= before


def test_bad_settings_are_refused(here):
    for names, options, message in [
        ([], {}, "expected at least one"), (["digits", "digits"], {}, "none twice"), (["digits"], {"workers": 0}, "0 workers"),
        (["digits"], {"timeout_s": 0}, "0 seconds"), (["digits"], {"weights": [1, 2]}, "expected 1 finite"),
        (["digits"], {"weights": [np.nan]}, "finite"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            reward_pool.Pool(names, **options)


def test_a_column_that_no_prompt_has_is_an_error_and_one_that_some_have_is_none(here):
    with reward_pool.Pool(["rewards.named", "gsm8k"]) as pool:
        with pytest.raises(ValueError, match=r"reward rewards.named takes level, which is no column of the prompts \(columns: answer\)"):
            pool.check([scene.group("a", columns={"answer": 1}).prompt])
        pool.check([scene.group("a", columns={"answer": 1}).prompt, scene.group("a", columns={"level": 2}).prompt])
        made = pool.score([scene.group("a", columns={"level": 2}), scene.group("3", columns={"level": 1})])
        np.testing.assert_array_equal(made[:, 0], [[1, np.nan], [0.5, np.nan]])
        assert pool.report()["gsm8k"]["abstained"] == 2


def test_a_column_that_is_not_json_is_named(here):
    with reward_pool.Pool(["rewards.seen", "digits"]) as pool:
        with pytest.raises(ValueError, match="column when holds 1j"):
            pool.score([scene.group("1", columns={"when": 1j})])
        assert pool.score([scene.group("1")])[0, 0].tolist() == [0.0, 1.0]
    assert scene.values("digits", "1") == [1.0]


def test_none_abstains_and_what_is_no_number_counts_as_failed(here):
    texts = ["none", "nan", "inf", "text", "true", "list", "two", "huge"]
    made, report = scene.score("rewards.odd", [scene.group(*texts)])
    np.testing.assert_array_equal(made[0, :, 0], [np.nan, np.nan, np.nan, np.nan, 1, np.nan, 2, np.nan])
    count = report["rewards.odd"]
    assert (count["rows"], count["numbers"], count["abstained"], count["failed"], count["retried"]) == (8, 2, 1, 5, 0)
    assert count["first"] == "gave nan, expected a finite number or None; data set row 0, completion 1"
    assert count["last"].startswith("gave 1000")


FAULTS = {
    "raise": "ZeroDivisionError: no price (rewards.py, line ",
    "sys.exit": "SystemExit: 0",
    "exit": "the worker process ended with exit code 7",
    "segfault": "the worker process was ended by SIGSEGV",
    "hang": "no answer within 0.5 s",
    "loops": "no answer within 0.5 s",
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_its_row_only(here, fault):
    told = []
    rows = [scene.group("a", "bb", row=5), scene.group("ccc", fault, row=6), scene.group(fault, "dddd", row=7)]
    with reward_pool.Pool(["rewards.faulty", "rewards.size"], timeout_s=0.5, say=told.append) as pool:
        made = pool.score(rows)
        np.testing.assert_array_equal(made[..., 0], [[1, 2], [3, np.nan], [np.nan, 4]])
        np.testing.assert_array_equal(made[..., 1], [[1, 2], [3, len(fault)], [len(fault), 4]])
        count = pool.report()["rewards.faulty"]
        assert (count["rows"], count["numbers"], count["failed"], count["retried"]) == (6, 4, 2, 6)
        assert count["restarts"] == (0 if fault in ("raise", "sys.exit") else 3)
        assert count["first"].startswith(FAULTS[fault]) and count["first"].endswith("; data set row 6, completion 1")
        assert (
            len(told) == 1
            and told[0].startswith("reward rewards.faulty failed, which counts as no opinion: ")
            and count["first"] in told[0]
        )
        assert pool.score(rows[:1])[..., 0].tolist() == [[1, 2]]  # and the pool goes on


def test_a_limit_too_short_for_many_rows_costs_none_and_is_told_once(here):
    told = []
    with reward_pool.Pool(["rewards.slow"], timeout_s=0.5, say=told.append) as pool:
        for _ in range(2):
            assert pool.score([scene.group("a", "b", "c")])[0, :, 0].tolist() == [1, 1, 1]
        count = pool.report()["rewards.slow"]
    assert (count["retried"], count["failed"], count["restarts"]) == (6, 0, 2)
    assert told == ["reward rewards.slow: 3 rows failed together and not one alone; more workers or time save the second try"]


def test_alarms_work_in_a_reward_and_do_not_reach_the_next(here):
    made, report = scene.score(["rewards.alarmed", "rewards.patient"], [scene.group("a", "hang", "b")])
    np.testing.assert_array_equal(made[0].T, [[1, -1, 1], [1, 1, 1]])
    assert report["rewards.patient"]["retried"] == 0


@pytest.mark.parametrize(
    ("name", "message"), [("short", "returned 3 values for 4 completions"), ("scalar", "returned 1.0, expected a list of 4")]
)
def test_a_wrong_length_is_an_error_of_the_function_and_not_tried_row_by_row(here, name, message):
    with pytest.raises(ValueError, match=rf"reward rewards.{name}: every call failed, 4 rows: {message}"):
        scene.score([f"rewards.{name}", "rewards.size"], [scene.group("a", "b"), scene.group("c", "d")])


def test_a_function_of_which_every_call_fails_stops_the_run(here):
    with pytest.raises(
        ValueError,
        match=r"reward rewards.always: every call failed, 2 rows: KeyError: 'price' \(rewards.py, line \d+\); data set row 0",
    ):
        scene.values("rewards.always", "a", "b")
    with reward_pool.Pool(["rewards.faulty"]) as pool:
        pool.score([scene.group("a", "b")])
        assert np.isnan(pool.score([scene.group("raise", "raise")])).all()  # one bad prompt alone is no reason
        with pytest.raises(ValueError, match="every call failed, 4 rows"):
            pool.score([scene.group("raise", "raise"), scene.group("raise", "raise")])
    assert np.isnan(scene.values("rewards.abstains", "a", "b")).all()  # having no opinion is no failure


def test_several_functions_are_kept_apart_and_weights_are_not_applied(here):
    with reward_pool.Pool(["rewards.size", "digits", "rewards.abstains"], weights=[0.5, -2, 3]) as pool:
        made = pool.score([scene.group("a1", "222", "b")])
        assert made.dtype == np.float64 and pool.weights.tolist() == [0.5, -2.0, 3.0]
    np.testing.assert_array_equal(made, [[[2, 0.5, np.nan], [3, 1, np.nan], [1, 0, np.nan]]])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("prompts", [1, 2, 3, 7])
def test_two_workers_score_as_one(here, prompts):
    rows = [scene.group(*("x" * (3 * p + g) + "7" * g for g in range(3)), columns={"level": p}, row=p) for p in range(prompts)]
    names = ["rewards.size", "digits", "rewards.named", "repetition?ngram=1"]
    np.testing.assert_array_equal(scene.score(names, rows, workers=2)[0], scene.score(names, rows)[0])
    assert scene.score(names, rows)[0][..., 0].tolist() == [[3 * p + 2 * g for g in range(3)] for p in range(prompts)]


def test_prompts_are_shared_between_the_workers_whole(here):
    with reward_pool.Pool(["rewards.process"], workers=2) as pool:
        made = pool.score([scene.group("a", "b") for _ in range(4)])[..., 0]
        assert set(made.ravel()) == set(pool.pids()) and (made[:, 0] == made[:, 1]).all()
        assert made[0, 0] == made[1, 0] != made[2, 0] == made[3, 0]


def test_shapes_without_prompts_and_with_unequal_groups(here):
    assert scene.score("digits", [])[0].shape == (0, 0, 1)
    with pytest.raises(ValueError, match=r"groups have \[1, 2\] completions"):
        scene.score("digits", [scene.group("a"), scene.group("a", "b")])


def test_a_function_that_empties_its_arguments_costs_nothing_and_nobody_else(here):
    rows = [scene.group("a", "bb", columns={"answer": "4", "more": [1, 2]})]
    found, report = scene.score(["rewards.clears", "rewards.size"], rows)
    assert found[0].tolist() == [[1, 1], [1, 2]] and all(one["failed"] == 0 for one in report.values())


@pytest.mark.parametrize(("said", "shown"), [("huge", "1e+308"), ("below", "-1e+308"), ("digits", "type int")])
def test_a_reward_too_large_for_advantages_is_told_with_its_row(here, said, shown):
    told = []
    found, report = scene.score("rewards.far", [scene.group("whole", said, "true", row=7)], say=told.append)
    assert found[0, :1, 0].tolist() == [1e20] and math.isnan(found[0, 1, 0]) and found[0, 2, 0] == 1
    assert report["rewards.far"]["failed"] == 1 and len(told) == 1
    assert shown in told[0] and "rewards.far" in told[0] and "data set row 7, completion 1" in told[0]
    assert scene.values("rewards.far", "decimal", "true", "whole") == [1.5, 1, 1e20]


@pytest.mark.parametrize(
    ("name", "why"), [("by_place", "by name"), ("alone", "no named.*def alone.completions, "), ("everything", "no named")]
)
def test_a_signature_that_takes_no_completions_is_refused_at_the_start(here, name, why):
    with pytest.raises(ValueError, match=why):
        reward_pool.Pool([f"rewards.{name}"])
