"""What options of the learning rate must be for the schedule that is chosen. Importing this imports no torch."""

from collections.abc import Mapping
from typing import Any, Protocol

from treetune.core import option_pairs, registry
from treetune.core.config import checks
from treetune.core.config.marks import Unused, Values
from treetune.core.config.ranges import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, PART, POSITIVE, Range

FACTOR = Range(1, 1e12, above=True)
# Parameters that `lr_scheduler_kwargs` sets: the range, the words to choose from, or bool.
KWARGS: Mapping[str, Range | tuple[str, ...] | type[bool]] = {
    "num_cycles": POSITIVE, "min_lr": NOT_NEGATIVE, "min_lr_rate": PART, "power": POSITIVE, "lr_end": NOT_NEGATIVE, "timescale": POSITIVE,
    "beta": Range(0, 1, below=True), "num_decay_steps": COUNT, "num_stable_steps": COUNT_OR_NONE, "min_lr_ratio": PART,
    "warmup_type": ("linear", "cosine", "1-sqrt"), "decay_type": ("linear", "cosine", "1-sqrt"), "pct_start": PART,
    "anneal_strategy": ("cos", "linear"), "div_factor": FACTOR, "final_div_factor": FACTOR, "three_phase": bool,
}  # fmt: skip
# Of these parameters a schedule needs one.
NEEDED = {"cosine_with_min_lr": ("min_lr", "min_lr_rate"), "warmup_stable_decay": ("num_decay_steps",)}


class RateOptions(Protocol):
    """Options of the learning rate."""

    @property
    def lr_scheduler(self) -> str:
        """Its shape."""
        ...

    @property
    def lr_scheduler_kwargs(self) -> tuple[str, ...]:
        """Parameters of that shape."""
        ...

    @property
    def cosine_min_lr_ratio(self) -> float:
        """The end of a cosine over the peak."""
        ...

    @property
    def cosine_constant_lr_ratio(self) -> float | None:
        """The part of the run in which a cosine falls."""
        ...

    @property
    def lr_div_factor(self) -> float | None:
        """The peak of one_cycle over its start."""
        ...

    @property
    def warmup_steps(self) -> int | None:
        """Steps of warm-up."""
        ...

    @property
    def warmup_ratio(self) -> float | None:
        """Part of the run that is warm-up."""
        ...


def takes(name: str) -> tuple[str, ...]:
    """Parameters of a schedule that lr_scheduler_kwargs sets."""
    row = registry.SCHEDULES.get(name, registry.Entry(""))
    return tuple(one for one in row.takes if one not in registry.SCHEDULE_GIVEN)


def _without_kwargs(values: Values) -> str:
    name = values["lr_scheduler"]
    if name in registry.SCHEDULES:
        return "" if takes(name) else f"{name} takes none"
    return "options of your own function go behind its name: FILE.py:FUNCTION?name=value"


def _rises_alone(values: Values) -> str:
    if "warmup" in registry.SCHEDULES.get(values["lr_scheduler"], registry.Entry("")).takes:
        return f"{values['lr_scheduler']} rises in its own way"
    return "there is no warm-up" if 0 in (values["warmup_steps"], values["warmup_ratio"]) else ""


KWARGS_TAKEN, LINEAR_RISE = Unused(_without_kwargs), Unused(_rises_alone)


def conflicts(options: RateOptions) -> None:
    """Raise ValueError for two ways of saying one thing, and for parameters that the schedule does not take or cannot use."""
    if options.warmup_steps is not None and options.warmup_ratio is not None:
        raise ValueError("give warmup_steps or warmup_ratio, not both")
    name, given = options.lr_scheduler, option_pairs.named_values(options.lr_scheduler_kwargs, "lr-scheduler-kwargs")
    checks.check_named(given, "lr-scheduler-kwargs", name, takes(name), KWARGS)
    if name in NEEDED and not given.keys() & set(NEEDED[name]):
        words, example = " or ".join(NEEDED[name]), f"{NEEDED[name][-1]}={'100' if name == 'warmup_stable_decay' else '0.1'}"
        raise ValueError(f"lr_scheduler {name} needs {words}: give lr_scheduler_kwargs {example}")
    _check_pairs(options, given)


def _check_pairs(options: RateOptions, given: dict[str, Any]) -> None:
    if {"min_lr", "min_lr_rate"} <= given.keys():
        raise ValueError("lr_scheduler_kwargs: give min_lr or min_lr_rate, not both")
    if options.lr_div_factor is not None and "div_factor" in given:
        raise ValueError("give lr_div_factor or the div_factor of lr_scheduler_kwargs, not both")
    if "pct_start" in given and (options.warmup_steps is not None or options.warmup_ratio is not None):
        raise ValueError(
            "give pct_start of lr_scheduler_kwargs or the warm-up, not both: it is the part of the run in which the rate rises"
        )
    if options.cosine_constant_lr_ratio is not None and options.cosine_min_lr_ratio == 0:
        raise ValueError(
            f"after {options.cosine_constant_lr_ratio:g} of the run the learning rate would be 0, and nothing would train: give "
            "cosine_min_lr_ratio a value, or leave out cosine_constant_lr_ratio"
        )
