"""Health rules of reinforcement learning: what was seen in the records of a run, and what to do about it."""

import math
import statistics
from collections.abc import Callable

Record = dict[str, float]
EARLY, RECENT = 20, 10  # steps before the first judgement, and those that one looks at
FIRST = 3  # steps after which a run that has trained nothing at all is told


def _recent(history: list[Record], key: str) -> float | None:
    """The mean of the last values that are known, once a run has had time."""
    if not history or "reward" not in history[-1]:
        return None
    values = [record[key] for record in history[-3 * EARLY :] if math.isfinite(record.get(key, math.nan))]
    return statistics.mean(values[-RECENT:]) if len(values) >= EARLY else None


def _beyond(key: str, bound: float, *, above: bool = True) -> Callable[[list[Record]], str | None]:
    """A rule that fires when the recent mean of a metric lies beyond a bound."""

    def rule(history: list[Record]) -> str | None:
        value = _recent(history, key)
        wrong = value is not None and (value > bound if above else value < bound)
        return f"{key} is {value:.3g} on average over {RECENT} steps" if wrong else None

    return rule


def _no_reward(history: list[Record]) -> str | None:
    value, spread = _recent(history, "reward"), _recent(history, "reward_std")
    if value == 0 and spread == 0:
        return f"no completion of the last {RECENT} steps had a reward"
    none = _since_start(history, reward=0.0, reward_std=0.0)
    return f"no completion of the first {none} steps had a reward, so nothing has been trained" if none else None


def _no_signal(history: list[Record]) -> str | None:
    if often := _beyond("frac_reward_zero_std", 0.9)(history):
        return often
    still = _since_start(history, frac_reward_zero_std=1.0)
    if not still or _no_reward(history):
        return None
    return f"in all of the first {still} steps the completions of each prompt had the same reward, so nothing has been trained"


def _since_start(history: list[Record], **values: float) -> int:
    """How many steps there were, if at least FIRST and at each of them these metrics had these values; else 0."""
    records = [record for record in history[: EARLY + 1] if "reward" in record]
    always = all(record.get(key) == value for record in records for key, value in values.items())
    return len(records) if always and FIRST <= len(records) <= EARLY else 0


RULES: dict[str, tuple[Callable[[list[Record]], str | None], str]] = {
    "no_reward": (_no_reward, "try the rewards with treetune rollout: the task may be too hard, or the reward may miss its column"),
    "no_signal": (
        _no_signal,
        "completions of a prompt all have the same reward: easier or harder prompts, more num_generations, or dynamic_sampling",
    ),
    "entropy_collapse": (_beyond("entropy", 0.01, above=False), "raise temperature or entropy_coef, or lower learning_rate"),
    "far_from_reference": (_beyond("kl", 2.0), "raise beta, or lower learning_rate"),
    "stale_sampler": (
        _beyond("sampling/sampling_logp_difference/mean", 1.0),
        "sync more often (vllm_sync_interval), and check that the server has this model",
    ),
    "lost_weight": (
        _beyond("sampling/importance_sampling_ratio/min", 1e-3, above=False),
        "samples are off-policy: sync more often, or set off_policy_mask_threshold",
    ),
    "clipped_updates": (_beyond("clip_ratio/region_mean", 0.3), "lower learning_rate, num_iterations or steps_per_generation"),
    "cut_completions": (_beyond("completions/clipped_ratio", 0.8), "raise max_completion_length: most completions are cut off"),
}
