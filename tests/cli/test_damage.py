"""Damaged files of a run: told in a line, and never wrong weights or lost records. Damaged bookkeeping never blocks a resume."""

import json
import os
import shutil

import pytest
import torch

from treetune.cli import assembly
from treetune.core import ckpt, manifest
from treetune.core.run import loop
from treetune.models import decode

STEPS = 4
EVERY = ("--max-steps", STEPS, "--save-steps", 1, "--eval-steps", 2, "--save-total-limit", 9, "--output-dir", "run", "--warmup-steps", 0,
         "--lr-scheduler", "constant")  # fmt: skip


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where the run is kept that every test takes a copy of."""
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def run(sft, here, kept):
    """The folder of a run with a checkpoint at every step, each evaluated step a little better."""
    if not kept.exists():
        assert sft(*EVERY).code == 0
        shutil.move(here / "run", kept)
    return shutil.copytree(kept, here / "run")


@pytest.fixture
def again(sft):
    """Train the run two steps further, from the newest checkpoint unless told otherwise."""
    return lambda *args: sft(*(STEPS + 2 if arg == STEPS else arg for arg in EVERY), *(args or ("--resume", "auto")))


def flip(file, bit=None):
    data = bytearray(file.read_bytes())
    bit = len(data) * 4 if bit is None else bit
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def checkpoint(run, step):
    return run / "checkpoints" / f"step_{step:06d}"


def edit(file, change):
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found, indent=1))


DAMAGES = {
    "weights": (lambda path: flip(path / "state.safetensors"), "state.safetensors is not as it was written"),
    "header": (lambda path: flip(path / "state.safetensors", 100), "state.safetensors is not as it was written"),
    "step": (lambda path: edit(path / "state.json", lambda meta: meta.update(step=3)), "state.json is not as it was written"),
    "cursor": (lambda path: edit(path / "state.json", lambda meta: meta["progress"].update(cursor=[1, 0])), "state.json"),
    "no json": (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    "no weights": (lambda path: (path / "state.safetensors").unlink(), "state.safetensors is missing"),
    "cut": (lambda path: os.truncate(path / "state.safetensors", 100), "state.safetensors has 100 bytes"),
    "no manifest": (lambda path: (path / manifest.NAME).unlink(), "has lost its treetune_manifest.json"),
    "broken manifest": (lambda path: os.truncate(path / manifest.NAME, 50), "treetune_manifest.json is damaged"),
    "empty": (lambda path: [file.unlink() for file in path.iterdir()], "is not a checkpoint"),
    "swapped": (lambda path: swap(path), "is not as it was written|has .* bytes"),
}


def swap(path):
    """The weights of the checkpoint before."""
    shutil.copy(path.with_name("step_000003") / "state.safetensors", path / "state.safetensors")


LATER = ("header", "cursor", "no weights", "empty")  # found as weights, step, no json and no manifest are


@pytest.mark.sampled(3)
@pytest.mark.parametrize("damage", [pytest.param(name, marks=pytest.mark.slow) if name in LATER else name for name in DAMAGES])
def test_resume_auto_takes_the_newest_sound_checkpoint_and_says_what_it_skipped(damage, kit, run, again):
    spoil, words = DAMAGES[damage]
    spoil(checkpoint(run, STEPS))
    kit.refused(again("--resume", checkpoint(run, STEPS)), words, "newest sound one is .*step_000003")
    done = again()
    assert done.code == 0, done.err
    out = " ".join(done.out.split())
    assert "step_000004" in out and ": skipped" in out and "back to step 3" in out
    assert ckpt.newest_sound(run / "checkpoints") == (checkpoint(run, STEPS + 2), [])


def test_resumed_past_a_damaged_checkpoint_ends_as_one_that_was_whole(kit, run, again, here):
    shutil.copytree(run, here / "whole")
    assert again().code == 0
    shutil.move(run, here / "first")
    shutil.move(here / "whole", run)
    flip(checkpoint(run, STEPS) / "state.safetensors")
    assert again().code == 0
    for one, other in zip(kit.left(run, STEPS + 2)[:2], kit.left(here / "first", STEPS + 2)[:2], strict=True):
        assert kit.same(one, other)
    assert [r["step"] for r in kit.metrics(run) if "train/loss" in r] == [*range(1, STEPS + 3)]


def test_resume_auto_with_no_sound_checkpoint_starts_nothing(kit, run, again):
    for step in range(1, STEPS + 1):
        flip(checkpoint(run, step) / "state.json")
    before = kit.listing(run), (run / "metrics.jsonl").read_bytes()
    kit.refused(again(), "step_000004/state.json is not as it was written", "4 checkpoints, none is sound", "--overwrite")
    assert (kit.listing(run), (run / "metrics.jsonl").read_bytes()) == before


def old_format(path):
    """As the version before wrote it."""
    (path / manifest.NAME).unlink()
    edit(path / "state.json", lambda meta: meta.update(format=1))


def test_a_checkpoint_of_the_version_before_is_used_and_said_to_be_unchecked(run, again):
    for step in range(1, STEPS + 1):
        old_format(checkpoint(run, step))
    done = again()
    assert done.code == 0 and "older version, without a manifest" in " ".join(done.out.split())


EDITS = {
    "step": (lambda meta: meta.update(step=3), "its state.json says step 3"),
    "step of a type": (lambda meta: meta.update(step="4"), "step must be a whole number"),
    "no progress": (lambda meta: meta.pop("progress"), "progress must be a mapping"),
    "cursor": (lambda meta: meta["progress"].update(cursor=[1, -2]), "cursor must be"),
    "long cursor": (lambda meta: meta["progress"].update(cursor=[1, 2, 3]), "cursor must be a list of 2"),
    "best": (lambda meta: meta["progress"].update(best="low"), "best must be a number"),
    "tokens": (lambda meta: meta["progress"].pop("tokens_seen"), "tokens_seen must be"),
}


@pytest.mark.parametrize("what", EDITS)
def test_what_cannot_be_checked_is_read_by_type(what, kit, run, again):
    change, words = EDITS[what]
    old_format(checkpoint(run, STEPS))
    edit(checkpoint(run, STEPS) / "state.json", change)
    before = kit.listing(run)
    kit.refused(again("--resume", checkpoint(run, STEPS)), words, "resume from another checkpoint")
    assert kit.listing(run) == before


def test_a_checkpoint_that_is_not_finite_is_refused(kit, run, again):
    from safetensors.torch import load_file, save_file

    path = checkpoint(run, STEPS)
    leaves = load_file(path / "state.safetensors")
    leaves[next(iter(leaves))].view(-1)[0] = float("nan")
    save_file(leaves, path / "state.safetensors")
    old_format(path)
    kit.refused(again("--resume", path), "not finite", "another checkpoint")


BEST = {
    "empty": (b"", "written anew"), "zeros": (b"\0" * 40, "written anew"), "cut": (b'{"checkpoint": "st', "written anew"),
    "list": (b"[]", "written anew"), "other": (b'{"checkpoint": 4}', "written anew"), "missing": (None, None),
    "gone": (b'{"checkpoint": "step_000099", "eval_loss": 1}', None),
}  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.parametrize("what", BEST)
def test_a_damaged_best_json_blocks_no_resume(what, run, again):
    data, words = BEST[what]
    good = (run / "best.json").read_bytes()
    (run / "best.json").unlink()
    if data is not None:
        (run / "best.json").write_bytes(data)
    done = again()
    assert done.code == 0, done.err
    assert words is None or words in done.out
    assert json.loads((run / "best.json").read_text()).keys() == json.loads(good).keys()


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_broken_line_costs_that_line_only(name, kit, run, again):
    lines = (run / name).read_bytes().splitlines(keepends=True)
    (run / name).write_bytes(b"".join([b'{"step": 0, "bro\x00\xff\n', *lines[1:]]))
    done = again()
    assert done.code == 0 and f"{name}: line 1 holds no record and is left out" in " ".join(done.out.split())
    steps = [record["step"] for record in kit.metrics(run) if "train/loss" in record]
    assert steps == [*range(1, STEPS + 3)]


@pytest.mark.parametrize("adapter", [["--learning-rate", 1e38], ["--adapter", "none", "--learning-rate", 1e38]])
@pytest.mark.parametrize("steps", [1, 3])
def test_an_update_that_is_not_finite_is_never_saved(adapter, steps, kit, here, sft):
    done = sft("--output-dir", "run", "--max-steps", steps, "--save-steps", 1, "--warmup-steps", 0, *adapter)
    assert done.code == 1 and done.err.count("\n") == 1 and "Traceback" not in done.err, done.err
    assert "the update of step 1 is not finite in params." in done.err and "lower learning_rate" in done.err
    assert "there is no checkpoint yet" in done.err
    assert ckpt.numbered(here / "run/checkpoints") == [] and not (here / "run/adapter").exists() and not (here / "run/model").exists()


def test_finite_weights_that_compute_no_finite_loss_are_not_saved(here, sft):
    done = sft("--output-dir", "run", "--max-steps", 1, "--learning-rate", 1e25, "--val-set-size", 0)
    assert done.code == 1 and "after the update of step 1 the loss of rows" in done.err and not (here / "run/adapter").exists()


def test_the_checkpoint_that_a_failure_names_is_finite(kit, here, sft, monkeypatch):
    """The third update is made infinite; the checkpoint of the second is what is left, and what is named."""
    step = assembly.step.make_step

    def make(*args, **kwargs):
        plain = step(*args, **kwargs)

        def poisoned(state, batches):
            state, metrics = plain(state, batches)
            if int(state.step) == 3:
                state.params["lora"]["layers"][1]["q_proj"]["B"][0, 0] = float("inf")
            return state, metrics

        return poisoned

    monkeypatch.setattr(assembly.step, "make_step", make)
    done = sft(*EVERY)
    assert done.code == 1 and "the update of step 3 is not finite in params.lora.layers.1.q_proj.B" in done.err
    assert done.err.rstrip().endswith("the last checkpoint is run/checkpoints/step_000002")
    assert [path.name for path in ckpt.numbered(here / "run/checkpoints")] == ["step_000001", "step_000002"]
    assert all(bool(torch.isfinite(leaf).all()) for leaf in kit.state(here / "run", 2).values())


def test_a_run_that_replaces_another_and_fails_gives_it_back(kit, here, sft):
    assert sft("--output-dir", "run").code == 0
    before = (here / "run/metrics.jsonl").read_bytes(), kit.state(here / "run", 2)
    done = sft("--output-dir", "run", "--overwrite", "--max-steps", 1, "--learning-rate", 1e38, "--warmup-steps", 0)
    assert done.code == 1 and (here / "run/metrics.jsonl").read_bytes() == before[0]
    assert kit.same(kit.state(here / "run", 2), before[1])


def test_a_failing_sample_loses_no_weights(here, sft, monkeypatch):
    sample = decode.sample

    def failing(*args, **kwargs):
        if (here / "run/checkpoints/step_000002").exists():
            raise RuntimeError("no\nanswer")
        return sample(*args, **kwargs)

    monkeypatch.setattr(decode, "sample", failing)
    done = sft("--output-dir", "run")
    assert done.code == 0 and "the sample answer failed, the trained weights are saved: no answer" in " ".join(done.out.split())
    assert (here / "run/adapter/adapter_model.safetensors").exists() and (here / "run/report.html").exists()


def test_a_model_too_large_for_its_dtype_is_not_saved(here, sft, monkeypatch):
    """float32 weights above 3.39e38 round to inf in bfloat16."""
    run = loop.run

    def large(*args, **named):
        outcome = run(*args, **named)
        outcome.state.params["model"]["norm"][0] = 3.4e38
        return outcome

    monkeypatch.setattr(loop, "run", large)
    done = sft("--output-dir", "run", "--adapter", "none", "--dtype", "bfloat16")
    assert done.code == 1 and "norm is not finite in bfloat16" in done.err and not (here / "run/model").exists()
