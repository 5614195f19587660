"""Structured runs of `treetune ebft` that are killed: resumed, they are the runs that nothing disturbed, bit for bit."""

import importlib.util
import signal
from pathlib import Path

import pytest


def _module(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runs, resume = _module("test_ebft_structured"), _module("test_grpo_resume")
learn = runs.learn  # the fixture

STEPS = resume.STEPS
RUN = ["--max-steps", STEPS, "--save-steps", 2, "--micro-batch-size", 1, "--gradient-accumulation-steps", 2, "--output-dir", "run"]
FULL = ["--adapter", "none", "--learning-rate", 1e-3]
TALKS = [runs.talk(i) for i in range(20)]
KINDS = {
    "lora": (["--lora-dropout", 0.2, "--ce-coef", 0.1, *runs.STOPS], None),
    "full": ([*FULL, "--use-whitening"], None),
    "full in main memory": ([*FULL, "--feature-device", "cpu", "--val-set-size", 4, "--eval-steps", 3], None),
    "conversations": (["--steps-per-generation", 2, "--num-iterations", 2, "--streaming-partial-batch"], TALKS),
    "dynamic": (["--dynamic-sampling", "--replay-buffer-size", 4, "--embed-method", "concat", "--top-k", 2], None),
}
FAST = ("conversations",)


@pytest.mark.more
@pytest.mark.parametrize("kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS])
def test_killed_run_resumes_bit_for_bit(kind, kit, tiny, here, tune, learn, forked):
    """Killed in step 3 and, once resumed, in step 6; each time the memory of true features starts empty."""
    args, rows = KINDS[kind]
    assert learn(*RUN, *args, "--output-dir", "whole", rows=rows).code == 0
    args = runs.arguments(tiny, *RUN, *args)
    assert forked(resume.at_step(3, signal.SIGKILL), "ebft", *args).code == -signal.SIGKILL
    assert forked(resume.at_step(6, signal.SIGKILL), "ebft", *args, "--resume", "auto").code == -signal.SIGKILL
    done = tune("ebft", *args, "--resume", "auto")
    assert done.code == 0, done.err
    resume.assert_same(kit, resume.left(kit, here / "run"), resume.left(kit, here / "whole"))


@pytest.mark.slow  # test_grpo_resume.py has it of prompts with rewards
@pytest.mark.parametrize("more", [[], ["--streaming-partial-batch", "--steps-per-generation", 2]])
def test_sampling_ahead_loses_and_doubles_no_prompt(more, kit, tiny, here, tune, learn, forked):
    """20 prompts, two of which a step trains on: ten steps, however often killed, see each of them once."""
    assert learn("--max-steps", 1, "--output-dir", "rows").code == 0  # writes the rows
    args = runs.arguments(tiny, *RUN, "--max-steps", 10, "--async-prefetch", "--prefetch-depth", 2, *more)
    for step in (3, 6):
        done = forked(resume.at_step(step, signal.SIGKILL), "ebft", *args, "--resume", "auto")
        assert done.code == -signal.SIGKILL, done.err
    done = tune("ebft", *args, "--resume", "auto")
    assert done.code == 0, done.err
    found = resume.times(kit, here / "run")
    assert len(found) == 20 and set(found.values()) == {4}
    assert max(record["rollout/staleness_max"] for record in kit.metrics(here / "run") if "train/loss" in record) > 0
