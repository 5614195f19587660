"""What happens how often: pauses at the ends of epochs, and options that a run of its length never reaches."""

import math
import re
from fractions import Fraction

import pytest

from treetune.core.run import pauses as pausing


def evals(kit, root):
    return [record["step"] for record in kit.metrics(root) if "eval/loss" in record]


def pauses(ends, total):
    pauses = [0]
    for end in ends:
        if pausing.at_end(end, pauses[-1], total):
            pauses.append(end)
    return pauses[1:]


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


def test_parts_of_epochs_are_exact_where_epochs_have_other_lengths():
    passes = pausing.passes({0: 4, 1: 3, 2: 5}.__getitem__)
    expected = [Fraction(step, 4) for step in range(4)] + [1 + Fraction(step, 3) for step in range(3)]
    assert [passes(step) for step in range(13)] == [*expected, *(2 + Fraction(step, 5) for step in range(6))]
    due = {n: [step for step in range(1, 13) if pausing.Every(None, n).due(step, passes, epoch_ended=False)] for n in (0, 1, 2, 4, 99)}
    assert due == {0: [], 1: [4, 7, 12], 2: [2, 4, 6, 7, 10, 12], 4: [1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12], 99: list(range(1, 13))}


def saved(root):
    return sorted(int(path.name.removeprefix("step_")) for path in (root / "checkpoints").glob("step_*"))


@pytest.fixture
def ten(kit, here, sft):
    """ten(...): a run over two epochs of 5 steps each."""
    rows = kit.write_rows(here / "rows.jsonl", kit.chats(11))
    size = ["--no-sample-packing", "--micro-batch-size", 2, "--gradient-accumulation-steps", 1, "--val-set-size", 1]
    return lambda *args: sft("--data", rows, *size, "--num-epochs", 2, "--sample-prompt=", *args, without=["--max-steps"])


def test_evaluations_and_checkpoints_of_an_epoch(kit, ten, here):
    done = ten("--evals-per-epoch", 2, "--saves-per-epoch", 1, "--save-total-limit", 99, "--output-dir", "run")
    assert done.code == 0, done.err
    assert evals(kit, here / "run") == [0, 3, 5, 8, 10]
    assert {5, 10} <= set(saved(here / "run")) <= {5, 10} | set(evals(kit, here / "run")), "and the best of the evaluations"


def test_parts_of_epochs_of_a_resumed_run_are_those_of_the_whole(kit, ten, here):
    args = ["--evals-per-epoch", 2, "--save-steps", 1, "--save-total-limit", 99]
    assert ten(*args, "--output-dir", "run").code == 0
    whole = kit.timeless(kit.metrics(here / "run"))
    done = ten(*args, "--resume", "run/checkpoints/step_000004")
    assert done.code == 0, done.err
    assert kit.timeless(kit.metrics(here / "run")) == whole and evals(kit, here / "run") == [0, 3, 5, 8, 10]


def test_none_an_epoch_is_none_at_all(kit, ten, here):
    done = ten("--evals-per-epoch", 0, "--saves-per-epoch", 0, "--output-dir", "run")
    assert done.code == 0, done.err
    assert evals(kit, here / "run") == [] == saved(here / "run")
    assert (here / "run/adapter/adapter_model.safetensors").exists() and "eval" not in "".join(kit.metrics(here / "run")[-1])


def test_a_run_that_saves_nothing_saves_where_a_signal_ends_it(kit, forked, tiny, here):
    import os
    import signal

    from treetune.core.run import recorder

    def at_step_two():
        push = recorder.Recorder.push

        def patched(self, index, metrics):
            done = push(self, index, metrics)
            if index == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return done

        recorder.Recorder.push = patched

    args = ["sft", *kit.basics(tiny, "--saves-per-epoch", 0, "--max-steps", 5, "--output-dir", "run")]
    stopped = forked(at_step_two, *args)
    assert stopped.code == 128 + signal.SIGTERM, stopped.err
    assert saved(here / "run") == [2]


@pytest.mark.parametrize("packing", [(), ("--no-sample-packing",)])
def test_evaluations_do_not_depend_on_how_they_are_cut(kit, tiny, sft, here, packing):
    runs = []
    for size in (None, 1, 5):
        own = () if size is None else ("--eval-batch-size", size)
        assert sft(*own, *packing, "--val-set-size", 7, "--sample-prompt=", "--output-dir", f"run{size}").code == 0
        runs.append(kit.timeless(kit.metrics(here / f"run{size}")))
    plain, *others = [[record for record in records if "eval/loss" in record] for records in runs]
    for other in others:
        assert [list(record) for record in other] == [list(record) for record in plain]
        assert [value for record in other for value in record.values()] == pytest.approx(
            [value for record in plain for value in record.values()], rel=1e-5
        )
    trained = [[record for record in records if "train/loss" in record] for records in runs]
    assert trained[0] == trained[1] == trained[2], "steps are as they were"


def test_the_seed_of_the_order_is_that_of_the_order_alone(kit, sft, here):
    for name, args in {
        "plain": [],
        "same": ["--data-seed", 42],
        "order": ["--data-seed", 7],
        "seed": ["--seed", 7, "--data-seed", 42],
    }.items():
        assert sft(*args, "--val-set-size", 5, "--sample-prompt=", "--output-dir", name).code == 0
    records = {name: kit.timeless(kit.metrics(here / name)) for name in ("plain", "same", "order", "seed")}
    assert records["same"] == records["plain"]
    assert records["order"][0] == records["plain"][0], "the same rows held out, the same start of the adapter"
    assert records["order"] != records["plain"] and records["seed"][0] != records["plain"][0]
    more = ["--val-set-size", 5, "--sample-prompt=", "--output-dir", "plain", "--resume", "auto"]
    done = sft("--data-seed", 42, "--max-steps", 3, *more)
    assert done.code == 0 and "data_seed" not in done.out, done.err
    kit.refused(sft("--data-seed", 7, "--max-steps", 4, *more), "data_seed 7 instead of 42")
    kit.refused(sft("--data-seed", 7, "--no-shuffle"), "data-seed would be ignored: shuffle is off")


def test_prompts_have_an_order_of_their_own_seed():
    from treetune.core.run import generations, ranks

    settings = generations.Settings(2, 8, 1, seed=3, data_seed=5)
    assert generations.feed_settings(settings, 4, ranks.ALONE).seed == 5
    assert generations.feed_settings(settings._replace(data_seed=None), 4, ranks.ALONE).seed == 3


def test_a_rule_names_a_module_of_transformers(kit, tiny, sft, here):
    both = ["--adapter", "none", "--optimizer", "sgd", "--sample-prompt="]
    for name, rule in {"ours": r"^model\.layers\.0\.q_proj$=0.5", "theirs": r"model.layers.0.self_attn.q_proj.weight=0.5"}.items():
        assert sft(*both, "--lr-rules", rule, "--output-dir", name).code == 0
    assert kit.same(kit.tensors(here / "ours/model/model.safetensors"), kit.tensors(here / "theirs/model/model.safetensors"))


def test_the_embedding_has_a_learning_rate_of_its_own(kit, tiny, sft, here):
    both = ["--adapter", "none", "--optimizer", "sgd", "--learning-rate", 0.01, "--max-steps", 1, "--sample-prompt="]
    for name, own in {"plain": [], "faster": ["--embedding-lr", 0.03]}.items():
        assert sft(*both, *own, "--output-dir", name).code == 0
    before = kit.tensors(tiny.model / "model.safetensors")
    plain, faster = (kit.tensors(here / name / "model/model.safetensors") for name in ("plain", "faster"))
    for key, start in before.items():
        ratio = 3 if "embed_tokens" in key else 1
        assert (faster[key] - start - ratio * (plain[key] - start)).abs().max() < 1e-5, key
    kit.refused(sft("--embedding-lr", 0.1), "embedding_lr is the learning rate of the embedding and the head, and neither trains")


def test_prompts_have_parts_of_epochs_too():
    from treetune.core.run.rollouts import Rollouts, Sizes

    given = Rollouts(None, None, Sizes(9, 1, step_prompts=2, epoch_prompts=6))  # type: ignore[arg-type]
    assert [given.passes(step) for step in (1, 3, 4)] == [Fraction(1, 3), 1, Fraction(4, 3)]


def test_another_schedule_is_resumed_exactly(kit, ten, here):
    args = ["--lr-scheduler", "wsd", "--lr-scheduler-kwargs", "num_decay_steps=4", "decay_type=1-sqrt", "--warmup-steps", 2]
    args += ["--save-steps", 1, "--save-total-limit", 99]
    assert ten(*args, "--output-dir", "run").code == 0
    rates = [record["learning_rate"] for record in kit.metrics(here / "run") if "learning_rate" in record]
    falling = [2e-4 * (1 - math.sqrt(i / 4)) for i in range(4)]
    assert rates == pytest.approx([2e-4 / 3, 4e-4 / 3, *[2e-4] * 4, *falling], rel=1e-6)
    whole = kit.timeless(kit.metrics(here / "run"))
    assert ten(*args, "--resume", "run/checkpoints/step_000007").code == 0
    assert kit.timeless(kit.metrics(here / "run")) == whole


SCHEDULES = [
    (
        ["--lr-scheduler", "polynomial", "--lr-scheduler-kwargs", "powr=2"],
        "lr-scheduler-kwargs powr: polynomial takes no such; .*power, lr_end",
    ),
    (["--lr-scheduler", "polynomial", "--lr-scheduler-kwargs", "power=-1"], "lr-scheduler-kwargs power must be a number above 0"),
    (["--lr-scheduler", "one_cycle", "--lr-scheduler-kwargs", "three_phase=1"], "three_phase must be true or false, got 1"),
    (["--lr-scheduler", "one_cycle", "--lr-scheduler-kwargs", "anneal_strategy=x"], "must be one of cos, linear, got 'x'"),
    (
        ["--lr-scheduler", "one_cycle", "--lr-scheduler-kwargs", "pct_start=0.3", "--warmup-steps", 1],
        "give pct_start .* or the warm-up, not both",
    ),
    (
        ["--lr-scheduler", "one_cycle", "--lr-scheduler-kwargs", "div_factor=3", "--lr-div-factor", 2],
        "give lr_div_factor or the div_factor",
    ),
    (["--lr-scheduler", "one_cycle", "--lr-quadratic-warmup"], "lr-quadratic-warmup would be ignored: one_cycle rises in its own way"),
    (["--lr-quadratic-warmup", "--warmup-steps", 0], "lr-quadratic-warmup would be ignored: there is no warm-up"),
    (
        ["--lr-scheduler", "constant", "--lr-scheduler-kwargs", "power=2"],
        "lr-scheduler-kwargs would be ignored: constant takes none|takes none",
    ),
    (["--lr-scheduler", "wsd"], "warmup_stable_decay needs num_decay_steps: give lr_scheduler_kwargs num_decay_steps=100"),
    (["--lr-scheduler", "cosine_with_min_lr"], "needs min_lr or min_lr_rate"),
    (
        ["--lr-scheduler", "cosine_with_min_lr", "--lr-scheduler-kwargs", "min_lr=0", "min_lr_rate=0"],
        "give min_lr or min_lr_rate, not both",
    ),
    (["--lr-scheduler", "polynomial", "--lr-scheduler-kwargs", "lr_end=0.5"], "lr_end 0.5 .* must be below the peak learning rate 0.0002"),
    (["--cosine-constant-lr-ratio", 0.8], "after 0.8 of the run the learning rate would be 0, and nothing would train"),
    (
        ["--lr-scheduler", "linear", "--cosine-constant-lr-ratio", 0.8],
        "cosine-constant-lr-ratio would be ignored: the schedule is linear|after 0.8",
    ),
    (["--lr-scheduler", "log_sweep"], "not supported yet: use a function of your own"),
]


@pytest.mark.parametrize(("args", "words"), SCHEDULES)
def test_schedules_that_make_no_sense_are_refused(kit, sft, here, args, words):
    kit.refused(sft(*args), words)
    assert not (here / "runs").exists()


def test_a_file_gives_the_numbers_of_a_schedule_as_a_mapping(kit, tiny, tune, here):
    text = "lr_scheduler: constant_with_warmup\nwarmup_steps: 1\n"
    (here / "a.yaml").write_text(text)
    assert tune("sft", *kit.basics(tiny, "--config", "a.yaml", "--output-dir", "a")).code == 0
    assert [record["learning_rate"] for record in kit.metrics(here / "a") if "learning_rate" in record] == pytest.approx([1e-4, 2e-4])
    (here / "b.yaml").write_text("lr_scheduler: polynomial\nlr_scheduler_kwargs:\n  power: 2\n  lr_end: 1.0e-5\nwarmup_steps: 0\n")
    assert tune("sft", *kit.basics(tiny, "--config", "b.yaml", "--output-dir", "b")).code == 0
    rates = [record["learning_rate"] for record in kit.metrics(here / "b") if "learning_rate" in record]
    assert rates == pytest.approx([2e-4, 1e-5 + 1.9e-4 / 4])


REFUSED = [
    (["--eval-steps", 2, "--evals-per-epoch", 1], "give eval_steps or evals_per_epoch, not both: 2 steps, or 1 times an epoch"),
    (["--save-steps", 2, "--saves-per-epoch", 0], "give save_steps or saves_per_epoch, not both"),
    (["--evals-per-epoch", 1, "--val-set-size", 0], "evals-per-epoch would be ignored: nothing is held out"),
    (["--saves-per-epoch", 0, "--save-total-limit", 3], "save-total-limit would be ignored: saves_per_epoch is 0"),
    (["--evals-per-epoch", 0, "--early-stopping-patience", 3], "early-stopping-patience would be ignored: evals_per_epoch is 0"),
    (["--evals-per-epoch", 1.5], "evals[-_]per[-_]epoch must be a whole number"),
    (["--evals-per-epoch", -1], "evals_per_epoch must be a number from 0 up"),
]


@pytest.mark.parametrize(("args", "words"), REFUSED)
def test_parts_of_epochs_that_make_no_sense_are_refused(kit, sft, here, args, words):
    kit.refused(sft(*args), words)
    assert not (here / "runs").exists()


def test_a_stream_has_no_parts_of_epochs(kit, tune, tiny):
    stream = ["pretrain", "--model", tiny.model, "--data", tiny.text, "--sequence-len", 64, "--streaming", "--max-steps", 2]
    kit.refused(tune(*stream, "--saves-per-epoch", 2), "saves_per_epoch 2 needs the length of an epoch, .*give save_steps")
    assert tune(*stream, "--saves-per-epoch", 0).code == 0


def final(kit, root):
    return [record for record in kit.metrics(root) if "learning_rate" in record][-1]["learning_rate"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("args", [(), ("--warmup-steps", 3), ("--lr-scheduler", "constant"), ("--warmup-steps", 90)])
def test_the_last_learning_rate_is_told_before_it_comes(kit, sft, here, args):
    done = sft("--max-steps", 5, "--output-dir", "run", *args)
    said = float(re.search(r"([-\d.e]+) at the last step", " ".join(done.out.split())).group(1))
    assert math.isclose(said, final(kit, here / "run"), rel_tol=5e-3)


@pytest.mark.sampled(3)
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
        (("--evals-per-epoch", 50), r"evals_per_epoch 50 is more than the \d+ steps of an epoch: it is evaluated after every step"),
        (
            ("--saves-per-epoch", 1, "--micro-batch-size", 1),
            "saves_per_epoch 1 is longer than the run of 2 steps: the only checkpoint is that of the last step; set it to at least 2",
        ),
        (("--evals-per-epoch", 3, "--early-stopping-patience", 2), "never stops this run: it is evaluated 2 times after the start"),
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


@pytest.mark.sampled(2)
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
