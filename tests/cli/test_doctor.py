"""`treetune doctor`: ten runs that are broken in ten ways, each named with what to change, and sound ones without a finding."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from treetune.cli.commands import doctor as command
from treetune.core.rollout import documents, sync
from treetune.core.run import loop


@pytest.fixture
def examined(tune, here):
    """examined() -> the causes that the doctor names in the run folder `run`, first to last, and all that it says."""

    def examine(code=1):
        done = tune("doctor", "run")
        assert (done.code, done.err) == (code, ""), done
        return re.findall(r"^\d+\. (.+?) *$", done.out, re.M), done.out

    return examine


@pytest.fixture
def train(sft):
    return lambda *args: sft("--output-dir", "run", "--sample-prompt=", *args)


@pytest.fixture
def explore(kit, tiny, tune, here):
    """explore(reward, ...) -> Done of a short GRPO run whose reward is the body of a function."""

    def run(reward, *args):
        (here / "own.py").write_text(f"def own(completions, **kw): return [{reward} for c in completions]\n")
        rows = kit.write_rows(here / "prompts.jsonl", [{"prompt": f"<{i}> "} for i in range(6)])
        basic = ["--model", tiny.model, "--data", rows, "--reward-funcs", "own.own", "--max-completion-length", 4]
        return tune("grpo", *basic, "--num-generations", 3, "--micro-batch-size", 1, "--sample-prompt=", "--output-dir", "run", *args)

    return run


def test_numbers_that_are_not_finite(train, examined):
    assert train("--learning-rate", 1e30, "--max-steps", 6, "--val-set-size", 0).code == 1
    causes, text = examined()
    assert causes[0] == "not finite (NaN)" and "change  lower learning_rate: it was 1e+30, where 0.0002 is usual" in text


def test_a_loss_that_is_flat_because_gradients_are_clipped_to_nothing(train, examined):
    assert train("--optimizer", "sgd", "--learning-rate", 0.001, "--max-grad-norm", 1e-9, "--max-steps", 12).code == 0
    causes, text = examined()
    assert causes == ["flat loss"] and "are clipped to 1e-09" in text and "raise max_grad_norm" in text


def test_a_tiny_learning_rate(train, examined):
    assert train("--learning-rate", 1e-10, "--max-steps", 12).code == 0
    causes, text = examined()
    assert causes == ["tiny learning rate"] and "1e-10 at its peak" in text and "raise learning_rate to about 0.0002" in text


def test_a_template_of_another_model(train, examined):
    done = train("--chat-template", "llama3", "--sequence-len", 256)
    assert done.code == 0 and done.out.count("! chat template llama3 is not one of this model's") == 1, done
    causes, text = examined()
    assert causes == ["wrong template"] and re.search(r"<\|start_header_id\|>, which its tokenizer splits into \d+ tokens", text)


def test_leaves_without_a_gradient(train, examined):
    assert train("--lora-alpha", 1e-30, "--max-steps", 3).code == 1
    causes, text = examined()
    assert causes[0] == "dead leaves" and "get no gradient" in text and "raise lora_alpha, which is 1e-30" in text


def test_overfitting(train, examined, kit, here):
    rows = kit.write_rows(here / "few.jsonl", kit.chats(3))
    other = kit.write_rows(here / "other.jsonl", kit.chats(8, first=900))
    assert train("--data", rows, "--val-data", other, "--max-steps", 48, "--eval-steps", 8, "--learning-rate", 0.03).code == 0
    causes, text = examined()
    assert causes[0] == "overfitting" and "rose twice in a row" in text and "fewer epochs" in text


def test_memory_that_has_run_out(train, examined, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(loop._Loop, "steps", full)
    assert train("--micro-batch-size", 4).code == 1
    causes, text = examined()
    assert causes == ["out of memory"] and "2 GiB" in text
    rungs = re.findall(r"^ +(\d)\. (--\S+)", text, re.M)
    assert [number for number, _ in rungs] == [str(i) for i in range(1, len(rungs) + 1)]
    assert [flag for _, flag in rungs][:3] == ["--micro-batch-size", "--micro-batch-size", "--gradient-checkpointing"]


def test_a_process_that_was_killed_with_its_memory_full(train, examined, here, monkeypatch):
    assert train().code == 0
    status = json.loads((here / "run/status.json").read_text())
    (here / "run/status.json").write_text(json.dumps(status | {"state": "running"}))
    assert examined()[0] == ["killed"]
    monkeypatch.setattr(command, "_memory_gib", lambda: 0.01)
    causes, text = examined()
    assert causes == ["out of memory"] and "of 0.0 GiB in use" in text


def test_a_reward_that_is_always_zero(explore, examined):
    assert explore("0.0", "--max-steps", 4).code == 0
    causes, text = examined()
    assert causes[0] == "zero reward" and "no signal" not in causes and "treetune rollout" in text


def test_an_entropy_that_has_collapsed(explore, examined):
    assert explore("float(len(c))", "--max-steps", 11, "--temperature", 0.001).code == 0
    causes, text = examined()
    assert causes[0] == "collapsed entropy" and "no signal" not in causes and "entropy_coef" in text and "the same text" in text


def test_a_sampler_that_has_other_weights(explore, examined, monkeypatch):
    """The server of a run is simulated: what it says at the second sync is what it said at the first."""
    draw = documents.completions
    old = sync.Reading(1, np.array([-1.0, -2.0]), np.array([-1.0, -2.0]))

    def stale(*args, **options):
        if len(calls) == 2:
            sync.judge(sync.Reading(2, np.array([-1.5, -2.0]), old.got), old, tolerance=1e-3, resolution=1e-4)
        calls.append(1)
        return draw(*args, **options)

    calls = []
    monkeypatch.setattr(documents, "completions", stale)
    assert explore("float(len(c))", "--max-steps", 6).code == 1
    causes, text = examined()
    assert causes[0] == "lost sync with the sampler" and "the sync of version 2 was lost" in text


def test_other_failures_say_what_and_where(train, examined, monkeypatch):
    def broken(*_, **__):
        raise KeyError("speed")

    monkeypatch.setattr(loop._Loop, "steps", broken)
    with pytest.raises(KeyError):
        train()
    causes, text = examined()
    assert causes == ["error"] and "speed" in text and "test_doctor.py" in text


def test_nothing_is_found_in_sound_runs(train, examined, explore, runs, here):
    assert train("--max-steps", 30, "--eval-steps", 10, "--learning-rate", 0.003).code == 0
    assert examined(code=0) == ([], "run: sft, finished, step 30 of 30\nnothing found\n")
    shutil.rmtree(here / "run")
    shutil.copytree(runs / "full", here / "run")
    assert examined(code=0)[0] == []
    shutil.rmtree(here / "run")
    assert explore("len(set(c)) / 4", "--max-steps", 6).code == 0
    assert examined(code=0)[0] == []


def test_a_folder_that_is_no_run(here, tune, kit):
    (here / "other").mkdir()
    kit.refused(tune("doctor", "other"), "other is no run")
