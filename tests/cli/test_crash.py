"""Runs that end badly: killed at any moment, interrupted, out of disk. What they leave can always be resumed, bit for bit."""

import os
import random
import resource
import signal
import time

import pytest
import torch

from treetune.cli import fit
from treetune.core import ckpt, tensor_file
from treetune.core.run import folder, loop, recorder

STEPS = 6
RUN = ["--output-dir", "run", "--max-steps", STEPS, "--save-steps", 2, "--eval-steps", 3, "--micro-batch-size", 1]
KINDS = {
    "lora": [*RUN, "--lora-dropout", 0.2, "--neftune-noise-alpha", 5],
    "full": [*RUN, "--adapter", "none", "--learning-rate", 1e-3, "--neftune-noise-alpha", 5],
    "async": [*RUN, "--async-save"],
    "bf16": [*RUN, "--dtype", "bfloat16", "--gradient-checkpointing", "--lora-dropout", 0.2],
    "lion, rows": [*RUN, "--optimizer", "lion", "--no-sample-packing", "--loraplus-lr-ratio", 4, "--lora-modules-to-save", "norm"],
    "8 bits": [*RUN, "--adapter", "none", "--learning-rate", 1e-3, "--optimizer", "paged_adamw_8bit"],
    "bfloat16 weights": [*RUN, "--adapter", "none", "--master-dtype", "bfloat16", "--optimizer", "adamw_8bit", "--weight-decay", 0.1],
    "galore": [*RUN, "--adapter", "none", "--optimizer", "galore_adamw", "--optim-args", "rank=4", "update_proj_gap=2"],
    "schedule-free": [*RUN, "--optimizer", "schedule_free_adamw", "--lr-scheduler", "constant"],
    "muon": [*RUN, "--adapter", "none", "--optimizer", "muon"],
    "dora": [*RUN, "--lora-dora", "--lora-dropout", 0.2, "--lora-rank-pattern", "q_proj=2", "--gradient-checkpointing"],
    "pissa": [*RUN, "--lora-init", "pissa_niter_4", "--lora-dora", "--lora-alpha-pattern", "up_proj=3", "--dtype", "bfloat16"],
    "corda": [*RUN, "--lora-init", "corda_ipm", "--lora-init-rows", 4],
    "loftq": [*RUN, "--lora-init", "loftq", "--quant", "nf4", "--lora-r", 4],
    "qera": [*RUN, "--lora-init", "qera", "--lora-init-rows", 4, "--quant", "nf4", "--lora-r", 4],
    "relora": [*RUN, "--relora-steps", 2, "--lora-dropout", 0.2, "--lora-dora", "--relora-prune-ratio", 0.9],
    "relora, bf16": [*RUN, "--relora-steps", 3, "--dtype", "bfloat16", "--optimizer", "adamw_8bit", "--lora-modules-to-save", "norm"],
    "bias": [*RUN, "--lora-bias", "all", "--model", "biased"],
    "unfrozen": [*RUN, "--adapter", "none", "--learning-rate", 1e-3, "--unfrozen-parameters", "layers.1", "^norm$"],
}


def left(kit, root):
    """All that a finished run leaves, without times."""
    out = "adapter/adapter_model" if (root / "adapter").exists() else "model/model"
    samples = (root / "samples.jsonl").read_text()
    return kit.state(root, STEPS), kit.tensors(root / f"{out}.safetensors"), kit.timeless(kit.metrics(root)), samples


@pytest.fixture(scope="module")
def undisturbed():
    """What the runs of this file leave that nothing disturbs, by kind: each is run once."""
    return {}


@pytest.fixture(autouse=True)
def biased(kit, here):
    """A model that some kinds train."""
    return kit.write_biased(here / "biased")


@pytest.fixture
def whole(undisturbed, kit, tiny, tune, here):
    """whole(kind) -> what the run leaves that nothing disturbed."""

    def run(kind):
        if kind not in undisturbed:
            args = ["whole" if arg == "run" else arg for arg in KINDS[kind]]
            assert tune("sft", *kit.basics(tiny, *args)).code == 0
            undisturbed[kind] = left(kit, here / "whole")
        return undisturbed[kind]

    return run


def assert_same(kit, one, other):
    for mine, theirs in zip(one[:2], other[:2], strict=True):
        assert kit.same(mine, theirs)
    assert one[2:] == other[2:]


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(step, do):
    """Patch the loop to call `do` right after the weights of this step have changed."""

    def prepare():
        push = recorder.Recorder.push

        def patched(self, index, metrics):
            done = push(self, index, metrics)
            if index == step:
                do()
            return done

        recorder.Recorder.push = patched

    return prepare


def in_save(step, spoil):
    """Patch the saving of this step's checkpoint: `spoil(draft, path)` comes when everything but the last rename is done."""

    def prepare():
        commit = ckpt.commit

        def patched(draft, path):
            if path.name == f"step_{step:06d}":
                spoil(draft, path)
            commit(draft, path)

        ckpt.commit = patched

    return prepare


def half_written(draft, _):
    file = draft / "state.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    die()


def after_commit(step):
    def prepare():
        commit = ckpt.commit

        def patched(draft, path):
            commit(draft, path)
            if path.name == f"step_{step:06d}":
                die()

        ckpt.commit = patched

    return prepare


def before_report():
    fit.report.Report.summary = die


def in_evaluation():
    evaluate = loop._Loop.evaluate
    loop._Loop.evaluate = lambda self, state: die() if int(state.step) == 3 else evaluate(self, state)


DEATHS = {f"step {step}": at_step(step, die) for step in range(1, STEPS + 1)} | {
    "while saving": in_save(4, half_written),
    "before the rename": in_save(4, die),
    "before the first rename": in_save(2, die),
    "after the rename": after_commit(4),
    "in an evaluation": in_evaluation,
    "while leaving": before_report,
}
FAST = [("lora", f"step {random.Random(1).randint(3, STEPS)}"), ("full", f"step {random.Random(2).randint(3, STEPS)}"),
        ("lora", "step 1"), ("lora", "while saving"), ("full", "before the first rename"), ("lora", "while leaving"),
        ("unfrozen", "step 3"), ("pissa", "step 5"), ("corda", "step 3"), ("loftq", "step 3"), ("relora", "step 5"),
        ("bias", "step 3"), ("async", "before the rename"), ("async", "after the rename")]  # fmt: skip


def killed_and_resumed(kit, tiny, tune, forked, here, kind, death):
    args = ["sft", *kit.basics(tiny, *KINDS[kind])]
    assert forked(DEATHS[death], *args).code == -signal.SIGKILL
    done = tune(*args, "--resume", "auto")
    assert done.code == 0, done.err
    steps = [record["step"] for record in kit.metrics(here / "run") if "train/loss" in record]
    assert steps == list(range(1, STEPS + 1))
    assert not list((here / "run").glob("checkpoints/.*")), "drafts are left"
    return left(kit, here / "run")


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("kind", "death"), FAST)
def test_killed_run_resumes_bit_for_bit(kind, death, kit, tiny, tune, forked, here, whole):
    assert_same(kit, killed_and_resumed(kit, tiny, tune, forked, here, kind, death), whole(kind))


@pytest.mark.slow
@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_killed_run_resumes_bit_for_bit_wherever_it_died(kind, death, kit, tiny, tune, forked, here, whole):
    assert_same(kit, killed_and_resumed(kit, tiny, tune, forked, here, kind, death), whole(kind))


def test_run_killed_again_and_again_ends_the_same(kit, tiny, tune, forked, here, whole):
    args = ["sft", *kit.basics(tiny, *KINDS["lora"]), "--resume", "auto"]
    for step in (1, 3, 4, 5, 6):
        assert forked(at_step(step, die), *args).code == -signal.SIGKILL
    assert tune(*args).code == 0
    assert_same(kit, left(kit, here / "run"), whole("lora"))


@pytest.mark.slow
def test_process_killed_from_outside_resumes_bit_for_bit(kit, tiny, tune, here, whole):
    """A fresh process, killed whenever its second checkpoint happens to appear."""
    args = ["sft", *kit.basics(tiny, *KINDS["lora"])]
    slow = "import time; from treetune.core.run import recorder; p = recorder.Recorder.push\n"
    slow += "def push(*a):\n    time.sleep(0.3)\n    return p(*a)\n"
    slow += "recorder.Recorder.push = push\nfrom treetune.cli.main import main; import sys; sys.exit(main())"
    process, until = kit.spawn(*args, cwd=here, program=slow), time.monotonic() + 60
    while not (here / "run/checkpoints/step_000004").exists():
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert kit.metrics(here / "run")[-1]["step"] < STEPS
    assert tune(*args, "--resume", "auto").code == 0
    assert_same(kit, left(kit, here / "run"), whole("lora"))


SIGNALS = [
    ("lora", signal.SIGINT),
    ("full", signal.SIGTERM),
    ("async", signal.SIGTERM),
    *(pytest.param(*some, marks=pytest.mark.slow) for some in (("lora", signal.SIGTERM), ("full", signal.SIGINT))),
]


@pytest.mark.parametrize(("kind", "signum"), SIGNALS)
def test_signal_saves_first_and_the_run_resumes_bit_for_bit(kind, signum, kit, tiny, tune, forked, here, whole):
    args = ["sft", *kit.basics(tiny, *KINDS[kind])]
    done = forked(at_step(3, lambda: os.kill(os.getpid(), signum)), *args)
    assert done.code == 128 + signum and "Traceback" not in done.err
    assert "interrupted: continue with --resume auto" in done.out
    assert ckpt.steps(here / "run/checkpoints")[-1].name == "step_000003"
    assert tune(*args, "--resume", "auto").code == 0
    assert_same(kit, left(kit, here / "run"), whole(kind))


def test_signal_at_the_last_step_is_a_finished_run(kit, tiny, forked, here):
    done = forked(at_step(STEPS, lambda: os.kill(os.getpid(), signal.SIGTERM)), "sft", *kit.basics(tiny, *KINDS["lora"]))
    assert done.code == 0 and (here / "run/report.html").exists()


def test_second_interrupt_leaves_at_once(kit, tiny, forked, here):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    done = forked(at_step(3, twice), "sft", *kit.basics(tiny, *KINDS["lora"]))
    assert done.code == 130 and done.err.endswith("treetune: interrupted\n") and "Traceback" not in done.err
    assert ckpt.steps(here / "run/checkpoints")[-1].name == "step_000002"


def full_disk(limit):
    """From now on no file may grow beyond `limit` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def at_the_end(do):
    """Patch the command to call `do` when the training is done and the results are to be written."""

    def prepare():
        save = fit.policies.save

        def patched(*args, **named):
            do()
            return save(*args, **named)

        fit.policies.save = patched

    return prepare


DISKS = {
    "checkpoint": (at_step(3, lambda: full_disk(8000)), 2, "could not save run/checkpoints/step_000003"),
    "metrics": (at_step(3, lambda: full_disk(1000)), 2, "could not write to run"),
    "results": (at_the_end(lambda: full_disk(4000)), STEPS, "could not write to run"),
}


FULL_DISKS = [
    ("lora", "checkpoint"),
    ("full", "metrics"),
    ("lora", "results"),
    ("async", "checkpoint"),
    *(pytest.param(*some, marks=pytest.mark.slow) for some in (("full", "checkpoint"), ("lora", "metrics"), ("full", "results"))),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("kind", "what"), FULL_DISKS)
def test_full_disk_is_one_line_and_leaves_the_checkpoint_before(kind, what, kit, tiny, tune, forked, here, whole):
    prepare, step, words = DISKS[what]
    args = ["sft", *kit.basics(tiny, *KINDS[kind])]
    kit.refused(forked(prepare, *args), words, "intact")
    last = ckpt.steps(here / "run/checkpoints")[-1]
    assert last.name == f"step_{step:06d}" and kit.tensors(last / "state.safetensors")
    assert tune(*args, "--resume", "auto").code == 0
    assert_same(kit, left(kit, here / "run"), whole(kind))


@pytest.mark.parametrize("name", ["write", "commit"])
def test_error_while_saving_keeps_the_checkpoints_before(name, kit, tiny, tune, here, monkeypatch):
    owner = {"write": tensor_file, "commit": ckpt}[name]
    plain = getattr(owner, name)

    def full(*args, **kwargs):
        if ckpt.steps(here / "run/checkpoints"):
            raise OSError(28, "No space left on device")
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, full)
    done = tune("sft", *kit.basics(tiny, *KINDS["lora"]))
    kit.refused(done, "could not save run/checkpoints/step_000003|step_000004", "No space left on device", "intact")
    assert [path.name for path in ckpt.steps(here / "run/checkpoints")] == ["step_000002"]
    assert not list((here / "run").glob("checkpoints/.*"))


def test_full_disk_while_merging_leaves_nothing(kit, tiny, tune, forked, here):
    assert tune("sft", *kit.basics(tiny, "--output-dir", "run")).code == 0
    before = kit.listing(here)
    kit.refused(forked(lambda: full_disk(8000), "merge", "run", "merged"), "merged|large|space")
    assert kit.listing(here) - before <= {".out", ".err"}


def test_damaged_checkpoint_is_one_line(kit, tiny, tune, here):
    args = ["sft", *kit.basics(tiny, *KINDS["lora"])]
    assert tune(*args).code == 0
    *_, first, last = ckpt.steps(here / "run/checkpoints")
    os.truncate(last / "state.safetensors", 3000)
    kit.refused(tune(*args, "--resume", last), "state.safetensors has 3000 bytes", f"another checkpoint; the newest sound one is {first}")
    os.truncate(first / "state.json", 30)
    kit.refused(tune(*args, "--resume", first), "state.json has 30 bytes", "another checkpoint$")
    kit.refused(tune(*args, "--resume", "auto"), "2 checkpoints, none is sound", "start anew with --overwrite")


def test_interrupted_write_of_a_small_file_leaves_the_old_one(here, monkeypatch):
    folder.write(here / "best.json", "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        folder.write(here / "best.json", "new")
    assert (here / "best.json").read_text() == "old"


def test_threads_are_one():
    assert torch.get_num_threads() == 1  # the fork of a process with a pool of threads would hang
