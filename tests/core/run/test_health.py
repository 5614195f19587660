"""The health rules."""

import math
import re
from pathlib import Path

import pytest

from treetune.core.run import health


def _steps(losses, *, norm=1.0, held=()):
    """Training records, then evaluations."""
    history = [{"step": i + 1, "train/loss": loss, "grad_norm": norm} for i, loss in enumerate(losses)]
    return history + [{"step": len(losses), "eval/loss": loss} for loss in held]


def _with(**numbers):
    """Forty steps that also report these."""
    return [record | numbers for record in _steps(FALLING[:40])]


def _online(**values: float) -> list[dict]:
    """A healthy run of reinforcement learning, with other values of some metrics at every step."""
    usual = {"reward": 0.3, "reward_std": 0.2, "frac_reward_zero_std": 0.3, "entropy": 0.3, "kl": 0.1, "completions/clipped_ratio": 0.1}
    return [record | usual | values for record in _steps([0.01 * (i % 3) for i in range(25)])]


FALLING = [2.0 * 0.98**i for i in range(80)]
HEALTHY = (
    [_steps(FALLING[:n]) for n in (1, 2, 3, 12, 60, 80)]
    + [
        [],
        _steps(FALLING[:40], held=(2.0, 1.8, 1.7)),
        _steps(FALLING[:40], held=(1.6, 1.7)),
        _steps(FALLING[:40], held=(1.8, 1.6, 1.7)),
        _steps(FALLING[:40], held=(1.6, 1.601, 1.6, 1.601, 1.602)),  # a flat loss, by chance up twice
        _steps(FALLING[:40], norm=99.9),
        _steps([2.0] * 11 + [3.9]),
        _steps([1.0] * 12 + [2.1, *[1.0] * 4, 2.3]),  # no further than losses of small batches have been before
        _steps([0.02] * 11 + [0.045]),  # a jump between losses that are small anyway
        _steps([0.009, 0.009, 0.011]),
        _with(**{"rewards/margins": 0.1, "rewards/accuracies": 0.6, "rewards/chosen": -1.0, "rewards/rejected": -4.0, "kl": -0.2}),
        _with(**{"rewards/margins": -0.1, "rewards/accuracies": 0.4})[:39],  # early, a run may still prefer the wrong side
        [record | {"rewards/margins": 0.1 * (-1) ** i - 0.01, "accuracy": 0.49 + 0.1 * (-1) ** i} for i, record in enumerate(_with())],
        [record | {"rewards/margins": 0.01 * i - 0.6} for i, record in enumerate(_with())],  # it learns, from the wrong side
        _with(**{"rewards/chosen": -9.0, "rewards/rejected": -11.0}),  # no reference: rewards are plain log-probs
    ]
)
SICK = {
    "grad_spike": (_steps([1.0], norm=101.0), "101.0", "learning_rate"),
    "no_gradient": (_steps([1.0], norm=0.0), "0", "trainable"),
    "loss_spike": (_steps([2.0] * 11 + [4.1]), "4.100 from about 2.000", "malformed"),
    "plateau": (_steps([2.0 + 0.1 * math.sin(i) for i in range(59)] + [2.5]), "60 steps", "learning_rate"),
    "vanished": (_steps([0.5, 0.009, 0.008, 0.007]), "0.0070", "memorised"),
    "overfit": (_steps(FALLING[:40], held=(1.5, 1.6, 1.7)), "1.700", "fewer epochs"),
    "prefers_rejected": (_with(**{"rewards/margins": -0.1, "rewards/accuracies": 0.6}), "-0.1", "swapped"),
    "ranks_badly": (_with(accuracy=0.4), "accuracy is 0.40", "swapped"),
    "both_fall": (_with(**{"rewards/chosen": -3.0, "rewards/rejected": -4.0, "kl": 0.5}), "-3.00", "rpo_alpha"),
    "no_reward": (_online(reward=0.0, reward_std=0.0), "no completion", "rollout"),
    "no_signal": (_online(frac_reward_zero_std=0.95), "0.95", "dynamic_sampling"),
    "entropy_collapse": (_online(entropy=0.005), "0.005", "temperature"),
    "far_from_reference": (_online(kl=2.5), "2.5", "beta"),
    "stale_sampler": (_online(**{"sampling/sampling_logp_difference/mean": 1.5}), "1.5", "vllm_sync_interval"),
    "lost_weight": (_online(**{"sampling/importance_sampling_ratio/min": 1e-4}), "0.0001", "off_policy_mask_threshold"),
    "clipped_updates": (_online(**{"clip_ratio/region_mean": 0.4}), "0.4", "num_iterations"),
    "cut_completions": (_online(**{"completions/clipped_ratio": 0.9}), "0.9", "max_completion_length"),
}


def test_a_run_that_trains_nothing_is_told_at_its_third_step():
    flat = _online(reward=0.5, reward_std=0.0, frac_reward_zero_std=1.0)
    fired = [[event.rule for event in health.events(flat[:n])] for n in range(1, 6)]
    assert fired[:2] == [[], []] and fired[2:] == [["no_signal"]] * 3
    failed = _online(reward=0.0, reward_std=0.0, frac_reward_zero_std=1.0)
    assert [event.rule for event in health.events(failed[:3])] == ["no_reward"]
    (event,) = health.events(failed[:3])
    assert "first 3 steps" in event.seen and "treetune rollout" in event.fix
    assert health.events([flat[0] | {"frac_reward_zero_std": 0.5}, *flat[1:6]]) == [], "one step with signal"


def test_rules_pass_over_what_was_not_computed():
    """Steps without signal have no entropy, so that it cannot have collapsed."""
    hollow = [{key: value for key, value in record.items() if key not in ("entropy", "kl")} for record in _online()]
    assert health.events(hollow) == []


def test_what_sampled_completions_may_do_is_left_in_peace():
    """A loss of 0 or one that jumps, and steps without a gradient, where all completions had the same reward."""
    still = [record | {"train/loss": 0.0, "grad_norm": 0.0} for record in _online()]
    jumps = [record | {"train/loss": 10.0 * (i % 2)} for i, record in enumerate(_online())]
    assert health.events(still) == health.events(jumps) == health.events(_online()) == []


@pytest.mark.parametrize("history", HEALTHY)
def test_healthy_runs_are_left_in_peace(history):
    assert health.events(history) == []


@pytest.mark.parametrize("losses", [[0.5, 0.009, 0.008, 0.007], [0.1] * 20 + [0.9], [0.2] * 60])
def test_the_loss_of_sampled_texts_says_nothing_by_itself(losses):
    """It is around 0 and jumps, for rewards of functions and of feature matching alike; the same losses of texts are told."""
    history = _steps(losses)
    assert health.events(history)
    for key in ("reward", "ebft/mean_reward"):
        assert health.events([record | {key: 0.3} for record in history]) == []


@pytest.mark.parametrize("rule", health.RULES)
def test_every_rule_fires_with_what_was_seen_and_the_fix(rule):
    history, seen, fix = SICK[rule]
    events = health.events(history)
    assert [event.rule for event in events] == [rule]
    assert seen in events[0].seen and fix in events[0].fix
    assert health.events(history, quiet={rule}) == []


def test_rules_still_fire_late_in_a_long_run():
    long = _steps([1.0 + 1e-3 * math.sin(i) for i in range(3000)])
    assert health.events(long) == [], "a flat tail late in a run is no plateau"
    assert [event.rule for event in health.events([*long, {"step": 3001, "train/loss": 1.0, "grad_norm": 500.0}])] == ["grad_spike"]
    assert [event.rule for event in health.events([*long, {"step": 3001, "train/loss": 2.1, "grad_norm": 1.0}])] == ["loss_spike"]


def test_the_page_about_troubles_has_what_each_rule_sees_and_advises():
    page = (Path(__file__).parents[3] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    section = page.partition("## It runs")[2].partition("## It stopped")[0]
    seen = {name: next(one for one in health.events(history) if one.rule == name) for name, (history, *_) in SICK.items()}
    told = set()
    for row in (line for line in section.splitlines() if line.startswith("| `")):
        for text in re.findall(r"`([^`]+)`", row.split(" | ")[0]):
            pattern = ".*".join(re.escape(piece.strip()) for piece in re.split(r"\.\.+", text))
            rules = [name for name, event in seen.items() if re.search(pattern, event.seen)]
            assert rules, text
            told |= set(rules)
            for name in re.findall(r"[a-z]+(?:_[a-z]+)+", " ".join(seen[rule].fix for rule in rules)):
                assert f"--{name.replace('_', '-')}" in row, (text, name)
    assert told == health.RULES.keys()
