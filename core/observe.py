"""What a run says about itself: metrics.jsonl, health rules, and the search for a number that is not finite.

The only place that moves a number off the device. Metrics are read one step late, so a step never waits for them.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from treetune.core import check, online_health, records, shard, tree
from treetune.core.grad import value_and_grad
from treetune.core.state import Batch, Objective, Plan, TrainState

Record = dict[str, float]


class Event(NamedTuple):
    """A health rule that fired: its name, what was seen, and what to do about it."""

    rule: str
    seen: str
    fix: str


class Recorder:
    """Appends one JSON object per step to metrics.jsonl; `push` returns the step before as floats, after `derive`."""

    def __init__(self, path: Path | None, derive: Callable[[Record], Record] = dict):
        self.path, self.derive, self.pending, self.history = path, derive, None, []

    def push(self, step: int, metrics: dict[str, Tensor | float]) -> Record | None:
        """Hand over a step's metrics; the record of the previous push comes back, written."""
        done = self.flush()
        self.pending = {"step": step} | metrics
        return done

    def flush(self) -> Record | None:
        """Read and write what was pushed last."""
        if self.pending is None:
            return None
        record = self.derive({key: value.item() if isinstance(value, Tensor) else value for key, value in self.pending.items()})
        self.pending = None
        self.history.append(record)
        self._write(record)
        return record

    def note(self, record: Record) -> None:
        """Write a record of plain numbers at once (an evaluation)."""
        self.history.append(record)
        self._write(record)

    def _write(self, record: Record) -> None:
        if self.path is not None:
            records.append(self.path, record)


# Rules run at every step, so none but those of an evaluation may look at all of a long history.
_RECENT, _EARLY = 60, 400


def _series(history: list[Record], key: str) -> list[float]:
    return [record[key] for record in history if key in record]


def _grad_spike(history: list[Record]) -> str | None:
    norm = _series(history[-_RECENT:], "grad_norm")[-1:]
    return f"grad_norm {norm[0]:.1f} is above 100" if norm and norm[0] > 100 else None


def sampled(record: Record) -> bool:
    """Whether a record is of a step on sampled texts, whose loss says nothing by itself."""
    return "reward" in record or "ebft/mean_reward" in record


def _no_gradient(history: list[Record]) -> str | None:
    norm = _series(history[-_RECENT:], "grad_norm")[-1:]
    online = bool(history) and sampled(history[-1])  # completions may all have the same reward
    return "grad_norm is 0" if norm and norm[0] == 0 and not online else None


def _loss_spike(history: list[Record]) -> str | None:
    if history and sampled(history[-1]):
        return None
    loss = _series(history[-_RECENT:], "train/loss")
    usual = statistics.median(loss[-21:-1]) if len(loss) > 10 else float("inf")
    return f"train/loss jumped to {loss[-1]:.3f} from about {usual:.3f}" if len(loss) > 10 and loss[-1] > 2 * usual > 0.1 else None


def _plateau(history: list[Record]) -> str | None:
    loss = _series(history[: _EARLY + 1], "train/loss")
    if len(history) > _EARLY or len(loss) < 60 or len(loss) % 20 or sampled(history[-1]):
        return None
    first, last = statistics.mean(loss[:20]), statistics.mean(loss[-20:])
    return f"train/loss has not fallen in {len(loss)} steps ({first:.3f} -> {last:.3f})" if last >= first else None


def _vanished(history: list[Record]) -> str | None:
    loss = [record["train/loss"] for record in history[-_RECENT:] if "train/loss" in record and not sampled(record)][-3:]
    return f"train/loss is {loss[-1]:.4f}" if len(loss) == 3 and max(loss) < 0.01 else None


def _overfit(history: list[Record]) -> str | None:
    if not history or "eval/loss" not in history[-1] or "eval/ebft/mean_reward" in history[-1]:
        return None
    held, loss = _series(history, "eval/loss")[-3:], _series(history, "train/loss")
    rising = len(held) == 3 and held[0] < held[1] < held[2]
    falling = len(loss) > 1 and statistics.mean(loss[-len(loss) // 2 :]) < statistics.mean(loss[: len(loss) // 2])
    return f"eval/loss rose twice in a row to {held[-1]:.3f} while train/loss fell" if rising and falling else None


def _mean_of_last(history: list[Record], key: str, count: int = 20) -> float | None:
    """The mean of the last `count` values, once a run has had time to learn something."""
    values = _series(history[-_RECENT:], key)
    return statistics.mean(values[-count:]) if len(values) >= 2 * count else None


def _prefers_rejected(history: list[Record]) -> str | None:
    margin = _mean_of_last(history, "rewards/margins")
    return f"rewards/margins is {margin:.3f} on average over 20 steps" if margin is not None and margin < 0 else None


def _ranks_badly(history: list[Record]) -> str | None:
    for key in ("rewards/accuracies", "accuracy"):
        share = _mean_of_last(history, key)
        if share is not None and share < 0.5:
            return f"{key} is {share:.2f} on average over 20 steps, below chance"
    return None


def _both_fall(history: list[Record]) -> str | None:
    sides = [_series(history[-_RECENT:], f"rewards/{name}") for name in ("chosen", "rejected")]
    if not history or "kl" not in history[-1] or min(map(len, sides)) < 10:
        return None
    chosen, rejected = (statistics.mean(side[-10:]) for side in sides)
    return f"rewards/chosen is {chosen:.2f} and rewards/rejected {rejected:.2f}: both fall" if chosen < -2 and rejected < -2 else None


RULES: dict[str, tuple[Callable[[list[Record]], str | None], str]] = {
    "grad_spike": (_grad_spike, "lower learning_rate 2 to 5 times, or lengthen the warm-up"),
    "no_gradient": (_no_gradient, "check that something is trainable and that rows have supervised tokens"),
    "loss_spike": (_loss_spike, "look for a malformed row in this step, or lower learning_rate"),
    "plateau": (_plateau, "raise learning_rate 2 to 5 times, and check what is supervised"),
    "vanished": (_vanished, "the rows are memorised or leak their answer: use fewer epochs or check the data"),
    "prefers_rejected": (_prefers_rejected, "check that chosen and rejected are not swapped, and lower learning_rate"),
    "ranks_badly": (_ranks_badly, "check that chosen and rejected are not swapped, and lower learning_rate"),
    "both_fall": (_both_fall, "lower learning_rate, raise rl_beta, or add rpo_alpha 1, which holds the chosen side up"),
    "overfit": (_overfit, "stop earlier, use fewer epochs, a smaller lora_r, or some lora_dropout"),
}


HEALTH = RULES | online_health.RULES


def health(history: list[Record], *, quiet: set[str] = frozenset()) -> list[Event]:
    """The rules that fire on the last record, except those in `quiet`."""
    events = []
    for name, (rule, fix) in HEALTH.items():
        if name not in quiet and (seen := rule(history)):
            events.append(Event(name, seen, fix))
    return events


def find_not_finite(objective: Objective, state: TrainState, micro_batches: list[tuple[Batch, Plan]]) -> str:
    """Replay a skipped step and name what is not finite: weights, the rows whose loss is not, or the gradient's leaves."""
    if bad := check.not_finite(state.params) or check.not_finite(state.frozen):
        return f"weights are not finite: {', '.join(bad[:3])}"
    found = [_replay(objective, state, batch, plan) for batch, plan in micro_batches]
    # A sharded gradient is summed over ranks, so where a loss is bad the gradients of innocent rows are too.
    losses, grads = ([text for text in side if text] for side in zip(*found, strict=True))
    bad_loss = shard.any_flag(bool(losses), state.step.device) if torch.distributed.is_initialized() else bool(losses)
    return "; ".join(losses if bad_loss else grads) or "no micro-batch here shows it: one of another rank does, or the sum overflowed"


@torch.no_grad()
def find_not_finite_loss(objective: Objective, state: TrainState, micro_batches: list[tuple[Batch, Plan]]) -> str:
    """The rows whose loss is not finite, empty where all is well. All ranks must do the same work."""
    values = [sum(objective.terms(state.params, state.frozen, batch, plan)[0].values()) for batch, plan in micro_batches]
    texts = [
        f"the loss of rows {sorted(set(batch['row'].tolist()))} is {value.item()}"
        for (batch, _), value in zip(micro_batches, values, strict=True)
        if not torch.isfinite(value)
    ]
    bad = shard.any_flag(bool(texts), state.step.device) if torch.distributed.is_initialized() else bool(texts)
    return "; ".join(texts) or "the loss of another rank is not finite" * bad


def _replay(objective: Objective, state: TrainState, batch: Batch, plan: Plan) -> tuple[str | None, str | None]:
    """What is wrong with the loss, and with the gradient, of a micro-batch. All ranks must do the same work: sharded leaves meet."""

    def total(params):
        terms, _ = objective.terms(params, state.frozen, batch, plan)
        return sum(terms.values()), None

    (value, _), grads = value_and_grad(total)(state.params)
    rows, bad = sorted(set(batch["row"].tolist())), check.not_finite(grads)
    loss = None if torch.isfinite(value) else f"the loss of rows {rows} is {value.item()}"
    return loss, f"rows {rows} give a gradient that is not finite in {', '.join(bad[:3])}" if bad else None


def dead_leaves(objective: Objective, state: TrainState, micro_batches: list[tuple[Batch, Plan]]) -> list[str]:
    """Paths of the trainable leaves that get no gradient from these micro-batches."""
    alive: set[str] = set()
    for batch, plan in micro_batches:
        _, grads = value_and_grad(lambda p, b=batch, s=plan: (sum(objective.terms(p, state.frozen, b, s)[0].values()), None))(state.params)
        alive |= {path for path, leaf in tree.items(grads) if bool((leaf != 0).any())}
    return [path for path, _ in tree.items(state.params) if path not in alive]
