"""What happens how often: pauses at the ends of epochs, and options that a run of its length never reaches."""

import math
import re

import pytest

from treetune.core.run import loop


def evals(kit, root):
    return [record["step"] for record in kit.metrics(root) if "eval/loss" in record]


def pauses(ends, total):
    found = [0]
    for end in ends:
        if loop.pauses(end, found[-1], total):
            found.append(end)
    return found[1:]


def test_many_short_epochs_have_ten_pauses_and_few_long_ones_all():
    assert pauses(range(1, 41), 40) == list(range(4, 41, 4))
    assert pauses([20, 40, 60], 60) == [20, 40, 60]
    assert pauses(range(7, 1001, 7), 1000) == list(range(105, 1001, 105))
    assert pauses([1], 1) == [1]


def test_small_data_is_evaluated_and_saved_about_ten_times(kit, tiny, sft, here):
    rows = kit.write_rows(here / "rows.jsonl", kit.chats(4))
    done = sft("--data", rows, "--val-set-size", 1, "--max-steps", 24, "--output-dir", "run", "--sample-prompt=")
    assert done.code == 0, done.err
    assert evals(kit, here / "run") == [0, 3, 6, 9, 12, 15, 18, 21, 24]
    assert done.out.count("held out, step") == 9


def test_a_resumed_run_keeps_the_cadence(kit, tiny, sft, here):
    rows = kit.write_rows(here / "rows.jsonl", kit.chats(4))
    args = ["--data", rows, "--val-set-size", 1, "--max-steps", 24, "--sample-prompt=", "--save-steps", 1, "--save-total-limit", 99]
    assert sft(*args, "--output-dir", "run").code == 0
    whole = kit.timeless(kit.metrics(here / "run"))
    done = sft(*args, "--resume", "run/checkpoints/step_000005")
    assert done.code == 0, done.err
    assert kit.timeless(kit.metrics(here / "run")) == whole


def final(kit, root):
    return [record for record in kit.metrics(root) if "learning_rate" in record][-1]["learning_rate"]


@pytest.mark.parametrize("args", [(), ("--warmup-steps", 3), ("--lr-scheduler", "constant"), ("--warmup-steps", 90)])
def test_the_last_learning_rate_is_told_before_it_comes(kit, sft, here, args):
    done = sft("--max-steps", 5, "--output-dir", "run", *args)
    said = float(re.search(r"([-\d.e]+) at the last step", " ".join(done.out.split())).group(1))
    assert math.isclose(said, final(kit, here / "run"), rel_tol=5e-3)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ("--warmup-steps", 100),
            "warmup_steps 100 is longer than the run of 2 steps: the learning rate only rises, to 3.96e-06 of 0.0002",
        ),
        (("--warmup-ratio", 1.0), "warmup_ratio 1 is all of the run of 2 steps"),
        (("--eval-steps", 50), "eval_steps 50 is longer than the run of 2 steps: it is evaluated before and after"),
        (("--save-steps", 50), "save_steps 50 is longer than the run of 2 steps: the only checkpoint is that of the last"),
        (("--early-stopping-patience", 5), "early_stopping_patience 5 never stops this run"),
        (("--early-stopping-patience", 2, "--eval-steps", 1), "never stops this run: it is evaluated 2 times after the start"),
        (("--loss-watchdog-threshold", 9, "--loss-watchdog-patience", 7), "loss_watchdog_patience 7 is longer than the run"),
    ],
)
def test_what_never_comes_about_is_told_at_the_start_and_at_the_end(sft, args, said):
    done = sft(*args)
    assert done.code == 0, done.err
    assert len(re.findall(said, " ".join(done.out.split()))) == 2


def test_a_reference_that_never_moves_is_told(tune, tiny, kit, here):
    rows = [{"prompt": f"{i} + 1 = ", "chosen": f"{i + 1}", "rejected": f"{i + 5}"} for i in range(8)]
    args = ["--model", tiny.model, "--data", kit.write_rows(here / "pairs.jsonl", rows), "--sequence-len", 64, "--max-steps", 2]
    done = tune("dpo", *args, "--sync-ref-model", "--ref-model-mixup-alpha", 1, "--sample-prompt", "")
    assert done.code == 0 and "ref_model_sync_steps 512 is longer than the run of 2 steps: the reference never moves" in " ".join(
        done.out.split()
    )


@pytest.mark.parametrize("args", [(), ("--warmup-steps", 1), ("--eval-steps", 2), ("--early-stopping-patience", 1, "--eval-steps", 1)])
def test_what_comes_about_is_not_told(sft, args):
    done = sft(*args)
    assert done.code == 0 and "! " not in done.out and "warning" not in done.out


@pytest.mark.parametrize(
    ("flag", "value"), [("--max-steps", 0), ("--num-epochs", 0), ("--num-epochs", 0.5), ("--eval-steps", 0), ("--warmup-ratio", 1.5)]
)
def test_lengths_that_are_none_are_refused(kit, sft, here, flag, value):
    kit.refused(sft(flag, value), flag[2:].replace("-", "[-_]"))
    assert not (here / "runs").exists()
