"""What `treetune grpo` records and tells of steps from which nothing can be learned."""

import importlib.util
from pathlib import Path

spec = importlib.util.spec_from_file_location("grpo_runs", Path(__file__).with_name("test_grpo.py"))
runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)
learn = runs.learn  # the fixture

COMPUTED = runs.CLIPS | {"entropy"} | runs.SAMPLING  # of what a step trains on
SMALL = ["--micro-batch-size", 1, "--gradient-accumulation-steps", 1, "--num-generations", 2, "--max-completion-length", 3]
SIGNAL = "\ndef pleased(completions, please):\n    return [p * x for p, x in zip(please, spread(completions))]\n"


def records(kit, here):
    return [record for record in kit.metrics(here / "run") if "train/loss" in record]


def test_a_run_without_signal_is_told_at_its_third_step_and_records_nothing_that_was_not_computed(kit, here, learn):
    done = learn("--reward-funcs", "rewards.py:same", *SMALL, "--max-steps", 22)
    assert done.code == 0, done.err
    found = records(kit, here)
    assert len(found) == 22
    for record in found:
        assert record["frac_reward_zero_std"] == 1 and record["train/loss"] == 0
        assert not COMPUTED & record.keys() and not [key for key in record if key.startswith("clip_ratio/")]
    said = " ".join((done.out + done.err).split())
    assert said.count("in all of the first 3 steps the completions of each prompt had the same reward") == 1
    assert said.count("had the same reward") == 1 and "entropy" not in said and "raise temperature" not in said


def test_only_steps_with_signal_have_what_is_computed_of_it(kit, here, learn):
    """One prompt a step, half of them without signal: the others are no mean with their zeros."""
    (here / "rewards.py").write_text(runs.REWARDS + SIGNAL)
    rows = [runs.prompt(i) | {"please": i % 2} for i in range(20)]
    done = learn("--reward-funcs", "rewards.py:pleased", *SMALL, "--max-steps", 8, rows=rows)
    assert done.code == 0, done.err
    found = records(kit, here)
    flat = [record for record in found if record["frac_reward_zero_std"] == 1]
    assert 0 < len(flat) < len(found)
    for record in found:
        assert COMPUTED & record.keys() == (set() if record in flat else COMPUTED)
        assert record in flat or record["entropy"] > 1, "of random weights"
