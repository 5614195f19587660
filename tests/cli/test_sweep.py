"""Sweeps: a run in a process for each combination, which fail, stop and go on by themselves."""

import json
import os
import re
import signal
import time

import pytest

from treetune.cli import sweep as command
from treetune.core.run import runs, sweeps


class Calls(list):
    """The commands of the runs that a sweep would start, and with which exit code those of some folders end."""

    codes: dict[str, int]


@pytest.fixture
def calls(monkeypatch, here):
    calls = Calls()
    calls.codes = {}

    def call(self, args):
        calls.append(args[args.index("treetune.cli.main") + 1 :])
        return calls.codes.get(args[-1][-3:], 0)

    monkeypatch.setattr(command._Relay, "call", call)
    return calls


@pytest.fixture
def swept(tune, tiny, kit):
    return lambda *args: tune("sft", *kit.basics(tiny, "--sample-prompt=", "--max-steps", 2, *args), "--sweep")


def test_each_combination_is_a_run_of_its_own_with_a_table_and_a_page(swept, here, kit):
    done = swept("--learning-rate", "1e-3", "1e-2", "--output-dir", "s", "--val-set-size", 4)
    assert done.code == 0 and done.err == "", done
    one, two = (runs.read(here / "s" / name) for name in ("001", "002"))
    assert (one.state, two.state, one.config["learning_rate"], two.config["learning_rate"]) == ("finished", "finished", 0.001, 0.01)
    assert one.best().value > two.best().value
    lines = done.out.splitlines()
    assert lines[-4].split()[:3] == ["002", "1e-2", "finished"] and lines[-3].split()[:3] == ["001", "1e-3", "finished"]
    text = (here / "s/sweep.html").read_text()
    assert "<th>learning_rate</th><td>0.01</td><td>0.001</td>" in text and re.search(
        r"002</td><td>1e-2</td><td class=.state finished.>", text
    )
    assert text.count("<figcaption>") > 4
    again = swept("--learning-rate", "1e-3", "1e-2", "--output-dir", "s", "--val-set-size", 4)
    assert again.code == 0 and again.out.count("done already: finished") == 2
    assert [record["step"] for record in kit.metrics(here / "s/001")] == [0, 1, 2, 2]


def test_a_run_that_fails_does_not_end_the_sweep(swept, calls, here):
    calls.codes["001"] = 1
    done = swept("--lora-r", 2, 4, 8, "--output-dir", "s", "--seed", 3)
    assert done.code == 1 and [args[-1] for args in calls] == [f"--output-dir=s/00{i}" for i in (1, 2, 3)]
    assert "001 has failed (exit code 1); the sweep goes on" in done.out and "treetune doctor s/001" in done.out
    assert all({"--seed=3", f"--lora-r={rank}"} <= set(args) for args, rank in zip(calls, (2, 4, 8), strict=True))
    assert not any("--sweep" in args for args in calls)


def test_values_that_are_added_get_folders_of_their_own(swept, calls, here):
    swept("--lora-r", 2, 4, "--output-dir", "s")
    swept("--lora-r", 8, 4, 2, "--output-dir", "s")
    points = json.loads((here / "s/sweep.json").read_text())["runs"]
    assert points == {"001": {"lora_r": "2"}, "002": {"lora_r": "4"}, "003": {"lora_r": "8"}}
    assert [args[-1][-3:] for args in calls] == ["001", "002", "003", "002", "001"]


def test_without_a_folder_a_sweep_takes_the_next_free_one(swept, calls, here):
    swept("--lora-r", 2, 4)
    swept("--lora-r", 2, 4)
    assert sorted(path.name for path in (here / "runs").iterdir()) == ["sweep-001", "sweep-002"]


def test_what_cannot_be_a_sweep_is_refused_before_anything_starts(swept, calls, here, kit, tune):
    kit.refused(swept("--lora-r", 2, 0, "--output-dir", "s"), "lora_r must be at least 1")
    kit.refused(swept("--lora-r", 2, "--output-dir", "s"), "needs an option with several values")
    kit.refused(swept("--lora-rr", 2, 4, "--output-dir", "s"), "unknown option --lora-rr")
    kit.refused(swept("--lora-r", 2, 4, "--resume", "auto"), "--resume does not go with --sweep")
    (here / "c.yaml").write_text("sweep: true\n")
    kit.refused(tune("sft", "--config", "c.yaml"), "sweep is for the command line")
    assert calls == [] and not (here / "s").exists()
    (here / "other").mkdir()
    (here / "other/mine.txt").write_text("mine")
    kit.refused(swept("--lora-r", 2, 4, "--output-dir", "other"), "other holds files and no sweep")
    assert swept("--lora-r", 2, 4, "--output-dir", "s").code == 0
    kit.refused(swept("--lora-r", 2, 4, "--output-dir", "s", "--seed", 5), "the sweep in s began with other options")


def test_a_config_file_that_has_changed_is_another_sweep(swept, calls, here, kit):
    (here / "c.yaml").write_text("seed: 1\n")
    assert swept("--lora-r", 2, 4, "--output-dir", "s", "--config", "c.yaml").code == 0
    assert swept("--lora-r", 2, 4, "--output-dir", "s", "--config", "c.yaml").code == 0
    (here / "c.yaml").write_text("seed: 2\n")
    kit.refused(swept("--lora-r", 2, 4, "--output-dir", "s", "--config", "c.yaml"), "or with another config file")


@pytest.mark.parametrize(("state", "reason", "done"), [("finished", "", True), ("stopped", "eval/loss has not improved", True),
                                                       ("stopped", "interrupted", False), ("failed", "x", False)])  # fmt: skip
def test_what_is_left_of_a_sweep(run, state, reason, done):
    one = runs.read(run)._replace(state=state, reason=reason)
    assert sweeps.is_done(one) == done


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_the_run_in_good_order_and_the_same_command_does_what_is_left(kit, tiny, here, tune, signum):
    args = ["sft", *kit.basics(tiny, "--sample-prompt=", "--max-steps", 60, "--output-dir", "s", "--lora-r", 2, 4, "--val-set-size", 0)]
    process = kit.spawn(*args, "--sweep", cwd=here)
    metrics = here / "s/001/metrics.jsonl"
    until = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert time.monotonic() < until and process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(process.pid, signum)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signum, (out, err)
    assert re.search(r"^001 +2 +stopped ", out, re.M) and re.search(r"^002 +4 +not begun ", out, re.M)
    assert (here / "s/001/status.json").exists() and not (here / "s/002").exists()
    step = runs.read(here / "s/001").step
    assert 3 <= step < 60
    if signum == signal.SIGTERM:
        done = tune(*args, "--sweep")
        assert done.code == 0, done.err
        assert [runs.read(here / "s" / name).state for name in ("001", "002")] == ["finished"] * 2
        steps = [record["step"] for record in kit.metrics(here / "s/001")]
        assert steps == list(range(1, 61)), "continued from its checkpoint"
