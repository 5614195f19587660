"""How often things happen in a run of so many steps: its learning rate, its pauses, and what would never come about.

The fields of the records here have the names of the options that set them, and are told to users by these names.
"""

import math
from typing import NamedTuple

import torch

from treetune.core import optim, registry
from treetune.core.run.loop import PAUSES

WARMUP_RATIO = 0.03  # of a run that says nothing of its warm-up


class Rate(NamedTuple):
    """The learning rate over a run. cosine_min_lr_ratio: of the schedules that take a `min_ratio`."""

    peak: float
    total_steps: int
    lr_scheduler: str = "constant"
    cosine_min_lr_ratio: float = 0.0
    warmup_steps: int | None = None
    warmup_ratio: float | None = None

    @property
    def warmup(self) -> int:
        """Steps of warm-up."""
        ratio = WARMUP_RATIO if self.warmup_ratio is None else self.warmup_ratio
        return self.warmup_steps if self.warmup_steps is not None else round(ratio * self.total_steps)

    @property
    def final(self) -> float:
        """The learning rate of the last step."""
        return schedule(self)(torch.tensor(max(self.total_steps - 1, 0))).item()


def schedule(rate: Rate) -> optim.Schedule:
    """Warm-up, then the shape of this name, over the steps of the run."""
    rest = max(rate.total_steps - rate.warmup, 1)
    shape = registry.bind(registry.choose(registry.SCHEDULES, rate.lr_scheduler), min_ratio=rate.cosine_min_lr_ratio)
    return optim.warmup(shape(rate.peak, rest), rate.warmup)


def describe(rate: Rate) -> str:
    """The learning rate of a run in words, with that of its last step."""
    rise = f" after {rate.warmup} step{'s' * (rate.warmup > 1)} of warm-up" if rate.warmup else ""
    return f"peak learning rate {rate.peak:g}{rise}, {rate.lr_scheduler}, {rate.final:.3g} at the last step"


class Intervals(NamedTuple):
    """What of a run is counted in steps and evaluations; None: nothing of the kind happens, or only at the ends of epochs."""

    eval_steps: int | None = None
    save_steps: int | None = None
    early_stopping_patience: int | None = None
    loss_watchdog_threshold: float | None = None
    loss_watchdog_patience: int | None = None
    num_epochs: int = 1
    max_steps: int | None = None
    sync_ref_model: bool = False
    ref_model_sync_steps: int | None = None
    use_vllm: bool = False
    vllm_sync_interval: int | None = None
    steps_per_generation: int | None = None

    def evaluations(self, total: int) -> int:
        """Evaluations after the start of a run of `total` steps; at the ends of epochs, the most that there may be."""
        if self.eval_steps is not None:
            return math.ceil(total / self.eval_steps)
        epochs = self.num_epochs if self.max_steps is None else total
        return max(1, min(PAUSES, total, math.ceil(epochs)))


def warnings(rate: Rate, intervals: Intervals, *, evaluated: bool) -> list[str]:
    """What the options ask for that the run never reaches, with the fix. evaluated: whether anything is held out."""
    total = rate.total_steps
    patience = _patience(intervals, total) if evaluated else []
    return [*_warmup(rate), *_never(intervals, total, evaluated), *patience]


def _warmup(rate: Rate) -> list[str]:
    warm, total = rate.warmup, rate.total_steps
    if warm < max(total, 1):
        return []
    given = f"warmup_steps {warm}" if rate.warmup_steps is not None else f"warmup_ratio {rate.warmup_ratio:g}"
    return [
        f"{given} is {'longer than' if warm > total else 'all of'} the run of {_steps(total)}: the learning rate only rises, to "
        f"{rate.final:.3g} of {rate.peak:g} at the last step; set warmup_steps below {total}; without it 3 % of the run"
    ]


def _never(asked: Intervals, total: int, evaluated: bool) -> list[str]:
    """Intervals that are past the end."""
    values = {
        "eval_steps": (asked.eval_steps if evaluated else None, "it is evaluated before and after, and not in between"),
        "save_steps": (asked.save_steps, "the only checkpoint is that of the last step"),
        "loss_watchdog_patience": (asked.loss_watchdog_patience if asked.loss_watchdog_threshold else None, "the watchdog never stops it"),
        "ref_model_sync_steps": (asked.ref_model_sync_steps if asked.sync_ref_model else None, "the reference never moves"),
        "vllm_sync_interval": (
            asked.vllm_sync_interval if asked.use_vllm else None,
            "the server samples from the untrained weights to the end",
        ),
        "steps_per_generation": (asked.steps_per_generation, "some of what is sampled is never trained on"),
    }
    return [
        f"{name} {value} is longer than the run of {_steps(total)}: {what}; set it to at most {max(1, total // 2)}, or train longer"
        for name, (value, what) in values.items()
        if value is not None and value > total
    ]


def _patience(asked: Intervals, total: int) -> list[str]:
    """Early stopping needs as many evaluations without a new best, and one more step to spare."""
    patience, count = asked.early_stopping_patience, asked.evaluations(total)
    if patience is None or patience < count:
        return []
    every = max(1, total // (2 * (patience + 1)))
    return [
        f"early_stopping_patience {patience} never stops this run: it is evaluated {count} time{'s' * (count != 1)} after the start; "
        f"set eval_steps to about {every}, or a lower patience"
    ]


def _steps(total: int) -> str:
    return f"{total} step{'s' * (total != 1)}"
