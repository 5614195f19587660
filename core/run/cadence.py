"""How often things happen in a run of so many steps: its learning rate, its pauses, and what would never come about.

The fields of the records here have the names of the options that set them, and are told to users by these names.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch

from treetune.core import optim, option_pairs, registry
from treetune.core.run import pauses

WARMUP_RATIO = 0.03  # of a run that says nothing of its warm-up
UNWARMED_TIMESCALE = 10_000  # of inverse_sqrt without a warm-up, as transformers has it
NOT_BETWEEN, LAST_ONLY = "it is evaluated before and after, and not in between", "the only checkpoint is that of the last step"


class Rate(NamedTuple):
    """The learning rate over a run. cosine_min_lr_ratio: of the schedules that take a `min_ratio`. relora: as of `optim.restarting`."""

    peak: float
    total_steps: int
    lr_scheduler: str = "constant"
    cosine_min_lr_ratio: float = 0.0
    cosine_constant_lr_ratio: float | None = None
    lr_scheduler_kwargs: Sequence[str] = ()
    lr_div_factor: float | None = None
    warmup_steps: int | None = None
    warmup_ratio: float | None = None
    lr_quadratic_warmup: bool = False
    relora_steps: int | None = None
    relora_warmup_steps: int | None = None
    relora_anneal_steps: int = 0

    @property
    def restart_warmup(self) -> int:
        """Steps of warm-up after a restart."""
        return self.relora_warmup_steps if self.relora_warmup_steps is not None else (self.relora_steps or 0) // 10

    @property
    def warmup(self) -> int:
        """Steps of warm-up."""
        ratio = WARMUP_RATIO if self.warmup_ratio is None else self.warmup_ratio
        return self.warmup_steps if self.warmup_steps is not None else round(ratio * self.total_steps)

    @property
    def decayed(self) -> int:
        """The step from which the rate stays at its least."""
        ratio = self.cosine_constant_lr_ratio
        return self.total_steps if ratio is None else int(self.total_steps * ratio)

    @property
    def final(self) -> float:
        """The learning rate of the last step."""
        return schedule(self)(torch.tensor(max(self.total_steps - 1, 0))).item()


def schedule(rate: Rate) -> optim.Schedule:
    """Warm-up, then the shape of this name, over the steps of the run, which rises again after each restart of the adapter.

    Errors: ValueError for numbers of lr_scheduler_kwargs that a run of this length and rate cannot have.
    """
    if rate.relora_steps is None:
        return _once(rate)
    return optim.restarting(_once(rate), rate.relora_steps, rate.restart_warmup, rate.relora_anneal_steps)


def _once(rate: Rate) -> optim.Schedule:
    """Without restarts; a shape that takes `warmup` rises by itself."""
    shape = registry.bind(registry.choose(registry.SCHEDULES, rate.lr_scheduler), **_parameters(rate))
    if rate.lr_scheduler in registry.SCHEDULES and "warmup" in registry.SCHEDULES[rate.lr_scheduler].takes:
        return shape(rate.peak, rate.total_steps)
    rest = max(rate.decayed - rate.warmup, 1)
    return optim.warmup(shape(rate.peak, rest), rate.warmup, power=2 if rate.lr_quadratic_warmup else 1)


def _parameters(rate: Rate) -> dict[str, Any]:
    """What options set of a shape; of a function of the user's none but min_ratio, where it takes that."""
    if rate.lr_scheduler not in registry.SCHEDULES:
        return {"min_ratio": rate.cosine_min_lr_ratio}
    options: dict[str, Any] = {"warmup": rate.warmup, "timescale": rate.warmup or UNWARMED_TIMESCALE, "min_ratio": rate.cosine_min_lr_ratio}
    options |= {} if rate.lr_div_factor is None else {"div_factor": rate.lr_div_factor}
    return options | option_pairs.named_values(tuple(rate.lr_scheduler_kwargs), "lr-scheduler-kwargs")


def describe(rate: Rate) -> str:
    """The learning rate of a run in words, with that of its last step."""
    rise = f" after {rate.warmup} step{'s' * (rate.warmup > 1)} of warm-up" if rate.warmup else ""
    again = "" if rate.relora_steps is None else f", rising again after every {rate.relora_steps} steps"
    return f"peak learning rate {rate.peak:g}{rise}, {rate.lr_scheduler}{again}, {rate.final:.3g} at the last step"


class Intervals(NamedTuple):
    """What of a run is counted in steps, epochs and evaluations; None: nothing of the kind happens, or only at the ends of epochs.

    passed: passes over the data in the whole run, where they are known.
    """

    eval_steps: int | None = None
    save_steps: int | None = None
    evals_per_epoch: int | None = None
    saves_per_epoch: int | None = None
    passed: Fraction | None = None
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
    relora_steps: int | None = None

    def evaluations(self, total: int) -> int:
        """Evaluations after the start of a run of `total` steps; at the ends of epochs, the most that there may be."""
        if self.eval_steps is not None:
            return math.ceil(total / self.eval_steps)
        if self.evals_per_epoch and self.passed is not None:
            return min(total, math.ceil(self.passed * self.evals_per_epoch))
        epochs = self.num_epochs if self.max_steps is None else total
        return max(1, min(pauses.MOST, total, math.ceil(epochs)))


def warnings(rate: Rate, intervals: Intervals, *, evaluated: bool) -> list[str]:
    """What the options ask for that the run never reaches, with the fix. evaluated: whether anything is held out."""
    total = rate.total_steps
    patience = _patience(intervals, total) if evaluated else []
    return [*_warmup(rate), *_never(intervals, total, evaluated), *_parts(intervals, total, evaluated), *patience]


def _warmup(rate: Rate) -> list[str]:
    warm, total = rate.warmup, rate.total_steps
    if warm < max(total, 1):
        return []
    given = f"warmup_steps {warm}" if rate.warmup_steps is not None else f"warmup_ratio {rate.warmup_ratio:g}"
    return [
        f"{given} is {'longer than' if warm > total else 'all of'} the run of {_steps(total)}: the learning rate only rises, to "
        f"{rate.final:.3g} of {rate.peak:g} at the last step; set warmup_steps below {total}; without it 3 % of the run"
    ]


def _parts(asked: Intervals, total: int, evaluated: bool) -> list[str]:
    """Parts of epochs that are past the end of the run, or shorter than a step."""
    given = {
        "evals_per_epoch": (asked.evals_per_epoch if evaluated else None, NOT_BETWEEN, "evaluated"),
        "saves_per_epoch": (asked.saves_per_epoch, LAST_ONLY, "saved"),
    }
    out = []
    for name, (count, never, done) in given.items():
        if not count or asked.passed is None:
            continue
        if count * asked.passed < 1:
            least = math.ceil(1 / asked.passed)
            out.append(f"{name} {count} is longer than the run of {_steps(total)}: {never}; set it to at least {least}, or train longer")
        elif count * asked.passed > total:
            out.append(f"{name} {count} is more than the {float(total / asked.passed):g} steps of an epoch: it is {done} after every step")
    return out


def _never(asked: Intervals, total: int, evaluated: bool) -> list[str]:
    """Intervals that are past the end."""
    values = {
        "eval_steps": (asked.eval_steps if evaluated else None, NOT_BETWEEN),
        "save_steps": (asked.save_steps, LAST_ONLY),
        "loss_watchdog_patience": (asked.loss_watchdog_patience if asked.loss_watchdog_threshold else None, "the watchdog never stops it"),
        "ref_model_sync_steps": (asked.ref_model_sync_steps if asked.sync_ref_model else None, "the reference never moves"),
        "vllm_sync_interval": (
            asked.vllm_sync_interval if asked.use_vllm else None,
            "the server samples from the untrained weights to the end",
        ),
        "relora_steps": (asked.relora_steps, "the adapter never starts anew"),
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
