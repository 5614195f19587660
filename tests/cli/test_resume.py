"""How a run continues, from where, and what it refuses to continue."""

import shutil

import pytest
import torch

from treetune.core import ckpt
from treetune.core.data import questions
from treetune.core.run import evaluation, recorder


def steps_of(records):
    return [record["step"] for record in records if "train/loss" in record]


def evals_of(records):
    return {record["step"]: record["eval/loss"] for record in records if "eval/loss" in record}


def checkpoints(root):
    return [path.name for path in ckpt.steps(root / "checkpoints")]


def test_resume_finishes_nothing_that_is_finished(kit, here, sft):
    assert sft("--output-dir", "a", "--max-steps", 3).code == 0
    before, samples = kit.metrics(here / "a"), (here / "a/samples.jsonl").read_text()
    assert sft("--output-dir", "a", "--max-steps", 3, "--resume", "auto").code == 0
    assert kit.metrics(here / "a") == before and (here / "a/samples.jsonl").read_text() == samples


def test_resume_auto_without_a_run_starts_one(here, sft):
    assert sft("--resume", "auto").code == 0
    assert checkpoints(here / "runs/sft-001") == ["step_000002"]


def test_resume_auto_takes_the_newest_run(kit, here, sft):
    for _ in range(2):
        assert sft("--max-steps", 4, "--save-steps", 1, "--save-total-limit", 9).code == 0
    assert sft("--max-steps", 6, "--resume", "auto").code == 0
    assert [steps_of(kit.metrics(here / f"runs/sft-00{i}"))[-1] for i in (1, 2)] == [4, 6]


def test_resume_remembers_how_many_evaluations_were_bad(kit, here, sft, monkeypatch):
    losses = iter([5.0, 4.0, 4.5, 4.6, 1.0])
    monkeypatch.setattr(evaluation, "of_documents", lambda *_, **__: lambda state: {"loss": torch.tensor(next(losses))})
    args = ("--output-dir", "a", "--max-steps", 9, "--eval-steps", 1, "--save-steps", 1, "--early-stopping-patience", 2)
    push = recorder.Recorder.push

    def interrupted(self, index, metrics):
        if index == 3:
            raise KeyboardInterrupt
        return push(self, index, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(recorder.Recorder, "push", interrupted)
        assert sft(*args).code == 130
    done = sft(*args, "--resume", "auto")
    assert done.code == 0 and "not improved in 2 evaluations" in done.out and steps_of(kit.metrics(here / "a")) == [1, 2, 3]


def test_resume_after_a_start_without_checkpoint_leaves_no_double_records(kit, here, sft, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ckpt, "save", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert sft("--output-dir", "a").code == 130
    assert evals_of(kit.metrics(here / "a")) and not checkpoints(here / "a")
    assert sft("--output-dir", "a", "--resume", "auto").code == 0
    records = kit.metrics(here / "a")
    assert [record["step"] for record in records] == [0, 1, 2, 2]
    assert len(kit.samples(here / "a")) == 2


def test_resume_from_an_older_checkpoint_forgets_what_came_after(kit, here, sft):
    every = ("--max-steps", 5, "--eval-steps", 1, "--save-total-limit", 9, "--learning-rate", 0.01)
    assert sft("--output-dir", "whole", *every, "--save-steps", 1).code == 0
    assert sft("--output-dir", "a", *every, "--save-steps", 1).code == 0
    done = sft(*every, "--save-steps", 9, "--resume", "a/checkpoints/step_000002")
    assert done.code == 0 and not (here / "runs").exists()
    assert "back to step 2: the later checkpoints and records of" in done.out
    assert kit.same(kit.state(here / "a", 5), kit.state(here / "whole", 5))
    assert kit.timeless(kit.metrics(here / "a")) == kit.timeless(kit.metrics(here / "whole"))


def test_resume_from_an_older_checkpoint_keeps_the_new_ones(here, sft):
    one = ("--save-total-limit", 2, "--val-set-size", 0)
    assert sft("--output-dir", "a", "--max-steps", 8, "--save-steps", 4, *one).code == 0
    assert sft("--max-steps", 6, "--save-steps", 1, *one, "--resume", "a/checkpoints/step_000004").code == 0
    assert checkpoints(here / "a") == ["step_000005", "step_000006"]


def test_resume_into_a_new_folder_leaves_the_old_one_alone(kit, here, sft):
    assert sft("--output-dir", "a", "--max-steps", 4, "--save-steps", 2).code == 0
    before = kit.listing(here / "a"), (here / "a/metrics.jsonl").read_bytes()
    assert sft("--output-dir", "b", "--max-steps", 4, "--resume", "a/checkpoints/step_000002").code == 0
    assert (kit.listing(here / "a"), (here / "a/metrics.jsonl").read_bytes()) == before
    assert kit.same(kit.state(here / "a", 4), kit.state(here / "b", 4))


OTHERS = {
    "rank": (["--lora-r", 8], "lora_r 8 instead of 4"),
    "scale": (["--lora-alpha", 64], "lora_alpha 64 instead of 32"),
    "kind": (["--adapter", "none"], "adapter none instead of lora"),
    "optimiser": (["--optimizer", "sgd"], "optimizer sgd instead of adamw"),
    "data": (["--max-rows", 20], "max_rows 20 instead of none"),
    "supervision": (["--train-on-inputs"], "train_on_inputs true instead of false"),
    "packing": (["--no-sample-packing"], "sample_packing false instead of true"),
    "order": (["--seed", 3], "seed 3 instead of 42"),
    "step": (["--gradient-accumulation-steps", 1], "gradient_accumulation_steps 1 instead of 2"),
    "end": (["--max-steps", 1], "is at step 2 and this run ends at 1"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_resume_of_another_run_is_refused(what, kit, here, sft, finished):
    args, words = OTHERS[what]
    run = finished("sft")
    before = kit.listing(here), (run / "config.yaml").read_bytes()
    kit.refused(sft("--output-dir", "run", "--resume", "auto", *args), words)
    assert (kit.listing(here), (run / "config.yaml").read_bytes()) == before


@pytest.mark.sampled(2)
@pytest.mark.parametrize("args", [[], ["--adapter", "none"]])
@pytest.mark.parametrize("model", ["other", "same"])
def test_resume_on_another_model_is_refused(model, args, kit, tiny, sft, finished):
    finished("sft", *args)
    other = ["--output-dir", "run", "--resume", "run/checkpoints/step_000002", "--model", getattr(tiny, model)]
    kit.refused(sft(*other, *args), f"model /.*{model} instead of", "weights belong to the model that they started from")


def test_resume_into_the_folder_of_another_run_is_refused(kit, here, sft):
    assert sft("--output-dir", "a").code == sft("--output-dir", "b").code == 0
    kit.refused(sft("--output-dir", "b", "--resume", "a/checkpoints/step_000002"), "b already holds files", "not of that run")


def test_checkpoint_outside_a_run_needs_an_output_dir(kit, here, sft):
    assert sft("--output-dir", "a").code == 0
    shutil.copytree(here / "a/checkpoints/step_000002", here / "copies/here/step_000002")
    kit.refused(sft("--resume", "copies/here/step_000002"), "does not lie in a run folder; give --output-dir")
    assert not (here / "copies/config.yaml").exists()


def test_overwrite_starts_anew(kit, here, sft):
    assert sft("--output-dir", "a", "--max-steps", 4).code == 0
    assert sft("--output-dir", "a", "--max-steps", 2, "--overwrite").code == 0
    assert steps_of(kit.metrics(here / "a")) == [1, 2] and checkpoints(here / "a") == ["step_000002"]


def test_refused_overwrite_deletes_nothing(kit, here, sft):
    assert sft("--output-dir", "a").code == 0
    before = kit.listing(here)
    kit.refused(sft("--output-dir", "a", "--overwrite", "--lora-target-modules", "qq"), "matches no parameter")
    assert kit.listing(here) == before


def test_answers_of_any_characters_survive_a_resume_and_the_report(kit, here, sft, monkeypatch):
    """Line separators inside a JSON string are not line ends, and files are UTF-8 whatever the locale says."""
    monkeypatch.setattr(questions, "decode", lambda *_: "a\u2028b\x85c é \U0001f600 <i>")
    assert sft("--output-dir", "a", "--max-steps", 2, "--save-steps", 1, "--save-total-limit", 9).code == 0
    before = (here / "a/samples.jsonl").read_bytes()
    assert sft("--max-steps", 2, "--resume", "a/checkpoints/step_000001").code == 0
    assert (here / "a/samples.jsonl").read_bytes() == before and "é".encode() in before
    assert "é \U0001f600 &lt;i&gt;" in (here / "a/report.html").read_text(encoding="utf-8")
