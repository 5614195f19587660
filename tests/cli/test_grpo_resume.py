"""Runs of `treetune grpo` that are killed or interrupted: resumed, they are the runs that nothing disturbed, bit for bit."""

import importlib.util
import os
import signal
from pathlib import Path

import pytest

from treetune.core import ckpt
from treetune.core.run import recorder

spec = importlib.util.spec_from_file_location("grpo_runs", Path(__file__).with_name("test_grpo.py"))
runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)
learn = runs.learn  # the fixture

STEPS = 7
RUN = ["--max-steps", STEPS, "--save-steps", 2, "--micro-batch-size", 1, "--gradient-accumulation-steps", 2, "--output-dir", "run"]
FULL = ["--adapter", "none", "--learning-rate", 1e-3]
KINDS = {
    "lora": ["--lora-dropout", 0.2],
    "full": FULL,
    "held out": ["--val-set-size", 6, "--eval-steps", 3],
    "passes and steps": ["--num-iterations", 2, "--steps-per-generation", 2],
    "replay": ["--reward-funcs", "digits", "--replay-buffer-size", 4],
    "re-roll": ["--reward-funcs", "digits", "--reroll-start-fraction", 0.2, "--reroll-max-groups", 2],
    "dynamic": ["--reward-funcs", "digits", "--dynamic-sampling"],
    "in parts": ["--streaming-partial-batch", "--steps-per-generation", 2],
    "adaptive entropy": ["--use-adaptive-entropy", "--entropy-target", 9, "--entropy-coef-delta", 0.01],
    "reference that moves": [*FULL, "--beta", 0.1, "--sync-ref-model", "--ref-model-sync-steps", 2, "--ref-model-mixup-alpha", 0.3],
    "everything": [
        "--reward-funcs", "digits", "--advantage", "gdpo", "--num-iterations", 2, "--steps-per-generation", 2,
        "--replay-buffer-size", 4, "--reroll-start-fraction", 0.2, "--dynamic-sampling", "--use-adaptive-entropy", "--entropy-target", 9,
        "--beta", 0.1, "--sync-ref-model", "--ref-model-sync-steps", 2, "--ref-model-mixup-alpha", 1, "--lora-dropout", 0.2,
        "--streaming-partial-batch",
    ],
}  # fmt: skip
USED = {"replay": "replayed", "re-roll": "failed_queue", "dynamic": "refills", "everything": "refills"}


def left(kit, root) -> tuple:
    """All that a finished run leaves, without times."""
    weights = root / ("adapter/adapter_model.safetensors" if (root / "adapter").exists() else "model/model.safetensors")
    return kit.state(root, STEPS), kit.tensors(weights), runs.stable(kit, root), kit.samples(root), rollout(kit, root)


def rollout(kit, root) -> list:
    """The feed in the last checkpoint."""
    return ckpt.read_meta(ckpt.steps(root / "checkpoints")[-1])["rollout"]


def at_step(step, signum):
    """Patch the loop to raise a signal right after the weights of this step have changed."""

    def prepare():
        push = recorder.Recorder.push

        def patched(self, index, metrics):
            done = push(self, index, metrics)
            if index == step:
                os.kill(os.getpid(), signum)
            return done

        recorder.Recorder.push = patched

    return prepare


def assert_same(kit, one, other):
    assert kit.same(one[0], other[0]) and kit.same(one[1], other[1])
    assert one[2:] == other[2:]


FAST = ("everything",)


@pytest.mark.parametrize("kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS])
def test_killed_run_resumes_bit_for_bit(kind, kit, tiny, here, tune, learn, forked):
    """Killed in step 3 and, once resumed, in step 6: in the middle of a generation, and between two."""
    assert learn(*RUN, *KINDS[kind], "--output-dir", "whole").code == 0
    args = runs.arguments(tiny, *RUN, *KINDS[kind])
    assert forked(at_step(3, signal.SIGKILL), "grpo", *args).code == -signal.SIGKILL
    assert forked(at_step(6, signal.SIGKILL), "grpo", *args, "--resume", "auto").code == -signal.SIGKILL
    done = tune("grpo", *args, "--resume", "auto")
    assert done.code == 0, done.err
    one, other = left(kit, here / "run"), left(kit, here / "whole")
    assert_same(kit, one, other)
    assert kind not in USED or sum(record[f"rollout/{USED[kind]}"] for record in one[2]) > 0, "what this kind is about happened"
    assert (one[4]["stream"]["drawn"] > one[4]["stream"]["taken"]) == (kind in ("re-roll", "everything"))


@pytest.mark.parametrize(
    ("kind", "signum"), [("replay", signal.SIGINT), pytest.param("passes and steps", signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_interrupted_run_leaves_in_good_order_and_resumes_bit_for_bit(kind, signum, kit, tiny, here, tune, learn, forked):
    assert learn(*RUN, *KINDS[kind], "--output-dir", "whole").code == 0
    args = runs.arguments(tiny, *RUN, *KINDS[kind])
    done = forked(at_step(3, signum), "grpo", *args)
    assert done.code == 128 + signum and "Traceback" not in done.err
    assert "interrupted: continue with --resume auto" in " ".join(done.out.split())
    assert ckpt.steps(here / "run/checkpoints")[-1].name == "step_000003"
    assert tune("grpo", *args, "--resume", "auto").code == 0
    assert_same(kit, left(kit, here / "run"), left(kit, here / "whole"))


def test_a_run_goes_on_beyond_its_end(kit, tiny, here, tune, learn):
    assert learn(*RUN, "--output-dir", "whole").code == 0
    assert learn(*RUN, "--max-steps", 4).code == 0
    assert tune("grpo", *runs.arguments(tiny, *RUN), "--resume", "auto").code == 0
    assert_same(kit, left(kit, here / "run"), left(kit, here / "whole"))


AHEAD = [*RUN, "--max-steps", 10, "--async-prefetch", "--prefetch-depth", 2]


def times(kit, root) -> dict[str, int]:
    """{prompt: completions of it that were trained on}."""
    found: dict[str, int] = {}
    for row in kit.samples(root):
        found[row["prompt"]] = found.get(row["prompt"], 0) + 1
    return found


IN_PARTS = ["--streaming-partial-batch", "--steps-per-generation", 2]


@pytest.mark.parametrize(
    ("signum", "args"),
    [(signal.SIGKILL, [])]
    + [
        pytest.param(*case, marks=pytest.mark.slow) for case in ((signal.SIGINT, []), (signal.SIGKILL, IN_PARTS), (signal.SIGINT, IN_PARTS))
    ],
)
def test_sampling_ahead_loses_and_doubles_no_prompt(signum, args, kit, tiny, here, tune, learn, forked):
    """20 prompts, two of which a step trains on: ten steps, however often interrupted, see each of them once."""
    assert learn("--max-steps", 1, "--output-dir", "rows").code == 0  # writes the rows
    args = runs.arguments(tiny, *AHEAD, *args)
    for step in (3, 6):
        done = forked(at_step(step, signum), "grpo", *args, "--resume", "auto")
        assert done.code == (-signum if signum == signal.SIGKILL else 128 + signum), done.err
    done = tune("grpo", *args, "--resume", "auto")
    assert done.code == 0, done.err
    assert times(kit, here / "run") == {runs.prompt(i)["prompt"]: 4 for i in range(20)}
    stale = [record["rollout/staleness_max"] for record in kit.metrics(here / "run")]
    assert 0 < max(stale) <= 2 * 2 + 1, "older than the weights, but no more than the generations that are ahead"
    assert max(record["sampling/sampling_logp_difference/max"] for record in kit.metrics(here / "run")) > 1e-4


def test_ahead_of_the_weights_nothing_is_lost_to_the_end_of_a_run(kit, here, learn):
    """The end does not wait for a generation that nobody will train on."""
    done = learn(*AHEAD, "--max-steps", 2)
    assert done.code == 0, done.err
    assert len(kit.samples(here / "run")) == 2 * 2 * 4


CHANGED = {
    "seed": (["--seed", 7], "seed 7 instead of 42"),
    "prompts of a step": (["--gradient-accumulation-steps", 4], "gradient_accumulation_steps 4 instead of 2"),
    "steps of a generation": (["--steps-per-generation", 2], "steps_per_generation 2 instead of 1"),
    "passes": (["--num-iterations", 2], "num_iterations 2 instead of 1"),
    "rank": (["--lora-r", 2], "lora_r 2 instead of"),
}


def test_resuming_as_another_run_is_one_line(kit, tiny, here, tune, learn):
    assert learn(*RUN, "--max-steps", 2).code == 0
    before = kit.listing(here / "run"), kit.metrics(here / "run")
    for args, *words in CHANGED.values():
        kit.refused(tune("grpo", *runs.arguments(tiny, *RUN, *args), "--resume", "auto"), *words)
        assert (kit.listing(here / "run"), kit.metrics(here / "run")) == before


def test_resuming_with_other_prompts_is_one_line(kit, tiny, here, learn):
    assert learn(*RUN, "--max-steps", 2).code == 0
    rows = [runs.prompt(i) for i in range(20)]
    rows[3], rows[4] = rows[4], rows[3]  # as many, of the same sizes
    kit.refused(learn(*RUN, "--resume", "auto", rows=rows), "other documents to train on than it was made with")


def test_a_run_of_another_method_is_not_resumed(kit, tiny, here, tune, learn):
    assert learn("--max-steps", 1, "--output-dir", "rows").code == 0
    assert tune("sft", *kit.basics(tiny, "--output-dir", "run", "--max-steps", 1)).code == 0
    kit.refused(tune("grpo", *runs.arguments(tiny, *RUN), "--resume", "auto"), "run")
