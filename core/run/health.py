"""Health of a run: rules over the records of its steps and evaluations, each with what it saw and what to do about it.

The one table of rules is `RULES`. Bounds lie outside of what healthy runs show (the tables of docs/training.md, docs/preferences.md and
docs/online.md), whatever their model and data, so that a warning is worth reading; a rule that fires stops nothing.
"""

import math
import statistics
from collections.abc import Callable, Set
from typing import NamedTuple

from treetune.core.records import JsonRecord as Record

Rule = Callable[[list[Record]], str | None]  # the history -> what is wrong with its last record, None for nothing


class Event(NamedTuple):
    """A health rule that fired: its name, what was seen, and what to do about it."""

    rule: str
    seen: str
    fix: str


# Rules run at every step, so none but those of an evaluation may look at all of a long history.
WINDOW = 60  # records at the end of the history that a rule looks at
RISEN = 0.01  # share of the lowest held-out loss by which it has risen
SWAPPED = "check that chosen and rejected are not swapped; lower learning_rate where it has fallen, raise it where it has not moved"
PLATEAU_STEPS = 400  # records from the start within which a plateau is looked for


def _series(history: list[Record], key: str) -> list[float]:
    return [record[key] for record in history if key in record]


def _grad_spike(history: list[Record]) -> str | None:
    norm = _series(history[-WINDOW:], "grad_norm")[-1:]
    return f"grad_norm {norm[0]:.1f} is above 100" if norm and norm[0] > 100 else None


def sampled(record: Record) -> bool:
    """Whether a record is of a step on sampled texts, whose loss says nothing by itself."""
    return "reward" in record or "ebft/mean_reward" in record


def _no_gradient(history: list[Record]) -> str | None:
    norm = _series(history[-WINDOW:], "grad_norm")[-1:]
    online = bool(history) and sampled(history[-1])  # completions may all have the same reward
    return "grad_norm is 0" if norm and norm[0] == 0 and not online else None


def _loss_spike(history: list[Record]) -> str | None:
    if history and sampled(history[-1]):
        return None
    loss = _series(history[-WINDOW:], "train/loss")
    if len(loss) <= 10:
        return None
    usual, highest = statistics.median(loss[-21:-1]), max(loss[-21:-1])
    beyond = loss[-1] - usual > 1.5 * (highest - usual)  # losses of small batches vary, and more so where the median is low
    return f"train/loss jumped to {loss[-1]:.3f} from about {usual:.3f}" if beyond and loss[-1] > 2 * usual > 0.1 else None


def _plateau(history: list[Record]) -> str | None:
    loss = _series(history[: PLATEAU_STEPS + 1], "train/loss")
    if len(history) > PLATEAU_STEPS or len(loss) < 60 or len(loss) % 20 or sampled(history[-1]):
        return None
    first, last = statistics.mean(loss[:20]), statistics.mean(loss[-20:])
    return f"train/loss has not fallen in {len(loss)} steps ({first:.3f} -> {last:.3f})" if last >= first else None


def _vanished(history: list[Record]) -> str | None:
    loss = [record["train/loss"] for record in history[-WINDOW:] if "train/loss" in record and not sampled(record)][-3:]
    return f"train/loss is {loss[-1]:.4f}" if len(loss) == 3 and max(loss) < 0.01 else None


def _overfit(history: list[Record]) -> str | None:
    if not history or "eval/loss" not in history[-1] or "eval/ebft/mean_reward" in history[-1]:
        return None
    eval_loss, train_loss = _series(history, "eval/loss")[-3:], _series(history, "train/loss")
    rising = len(eval_loss) == 3 and eval_loss[0] < eval_loss[1] < eval_loss[2]
    falling = len(train_loss) > 1 and statistics.mean(train_loss[-len(train_loss) // 2 :]) < statistics.mean(
        train_loss[: len(train_loss) // 2]
    )
    lowest = min(_series(history, "eval/loss"))
    above = rising and eval_loss[-1] - lowest > RISEN * abs(lowest)  # the last numbers of a flat loss go up and down by chance
    return f"eval/loss rose twice in a row to {eval_loss[-1]:.3f} while train/loss fell" if above and falling else None


def _stays_below(history: list[Record], key: str, bound: float, count: int = 20) -> float | None:
    """The mean of the last `count` values, if it is below a bound and not rising, both by more than its noise.

    None before a run has had time to learn something. Without a reference, a model may begin on the wrong side and still learn.
    """
    values = [value for value in _series(history[-WINDOW:], key) if math.isfinite(value)]
    if len(values) < 2 * count:
        return None
    mean, noise = statistics.mean(values[-count:]), 2 * statistics.stdev(values[-count:]) / math.sqrt(count)
    return mean if mean + noise < bound and mean - statistics.mean(values[:count]) <= noise else None


def _prefers_rejected(history: list[Record]) -> str | None:
    margin = _stays_below(history, "rewards/margins", 0.0)
    return f"rewards/margins is {margin:.3g} on average over 20 steps" if margin is not None else None


def _ranks_badly(history: list[Record]) -> str | None:
    for key in ("rewards/accuracies", "accuracy"):
        share = _stays_below(history, key, 0.5)
        if share is not None:
            return f"{key} is {share:.2f} on average over 20 steps, below chance"
    return None


def _both_fall(history: list[Record]) -> str | None:
    sides = [_series(history[-WINDOW:], f"rewards/{name}") for name in ("chosen", "rejected")]
    if not history or "kl" not in history[-1] or min(map(len, sides)) < 10:
        return None
    chosen, rejected = (statistics.mean(side[-10:]) for side in sides)
    return f"rewards/chosen is {chosen:.2f} and rewards/rejected {rejected:.2f}: both fall" if chosen < -2 and rejected < -2 else None


# Of runs that learn from sampled completions, whose metrics are too noisy to judge one step by itself.
ONLINE_WARMUP = 20  # steps before the first judgement
ONLINE_WINDOW = 10  # steps whose mean is judged
UNTRAINED_STEPS = 3  # steps after which a run that has trained nothing at all is told


def _online_mean(history: list[Record], key: str) -> float | None:
    """The mean of the last values that are known, once a run has had time."""
    if not history or "reward" not in history[-1]:
        return None
    values = [record[key] for record in history[-3 * ONLINE_WARMUP :] if math.isfinite(record.get(key, math.nan))]
    return statistics.mean(values[-ONLINE_WINDOW:]) if len(values) >= ONLINE_WARMUP else None


def _beyond(key: str, bound: float, *, above: bool = True) -> Callable[[list[Record]], str | None]:
    """A rule that fires when the recent mean of a metric lies beyond a bound."""

    def rule(history: list[Record]) -> str | None:
        value = _online_mean(history, key)
        wrong = value is not None and (value > bound if above else value < bound)
        return f"{key} is {value:.3g} on average over {ONLINE_WINDOW} steps" if wrong else None

    return rule


def _no_reward(history: list[Record]) -> str | None:
    value, spread = _online_mean(history, "reward"), _online_mean(history, "reward_std")
    if value == 0 and spread == 0:
        return f"no completion of the last {ONLINE_WINDOW} steps had a reward"
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
    """How many steps there were, if at least UNTRAINED_STEPS and at each of them these metrics had these values; else 0."""
    records = [record for record in history[: ONLINE_WARMUP + 1] if "reward" in record]
    always = all(record.get(key) == value for record in records for key, value in values.items())
    return len(records) if always and UNTRAINED_STEPS <= len(records) <= ONLINE_WARMUP else 0


RULES: dict[str, tuple[Rule, str]] = {
    "grad_spike": (_grad_spike, "lower learning_rate 2 to 5 times, or lengthen the warm-up"),
    "no_gradient": (_no_gradient, "check that something is trainable and that rows have supervised tokens"),
    "loss_spike": (_loss_spike, "look for a malformed row in this step, or lower learning_rate"),
    "plateau": (_plateau, "raise learning_rate 2 to 5 times, and check what is supervised"),
    "vanished": (_vanished, "the rows are memorised or leak their answer: use fewer epochs or check the data"),
    "prefers_rejected": (_prefers_rejected, SWAPPED),
    "ranks_badly": (_ranks_badly, SWAPPED),
    "both_fall": (_both_fall, "lower learning_rate, raise rl_beta, or add rpo_alpha 1, which holds the chosen side up"),
    "overfit": (_overfit, "stop earlier or use fewer epochs; of an adapter, also a smaller lora_r or some lora_dropout"),
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


def events(history: list[Record], *, quiet: Set[str] = frozenset()) -> list[Event]:
    """The rules that fire on the last record, except those in `quiet`."""
    fired = []
    for name, (rule, fix) in RULES.items():
        if name not in quiet and (seen := rule(history)):
            fired.append(Event(name, seen, fix))
    return fired
