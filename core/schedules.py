"""Further shapes of the learning rate, beside those of `optim`: each is that of transformers or torch, over the steps after the warm-up.

A shape is `shape(peak, steps, **options) -> Schedule`. One that takes `warmup` rises in its own way: its `steps` are those of the whole
run. Rates are float64, and functions of the step alone: a resumed run goes on with the rates of the whole.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from treetune.core.optim import Schedule, progress


def cosine_with_restarts(peak: float, steps: int, *, num_cycles: float = 1) -> Schedule:
    """Half cosines from peak to 0, `num_cycles` of them in `steps`. Source: Loshchilov & Hutter, arXiv 1608.03983, section 3."""

    def lr(step: Tensor) -> Tensor:
        passed = progress(step, steps)
        return torch.where(passed < 1, peak * 0.5 * (1 + torch.cos(math.pi * ((num_cycles * passed) % 1.0))), 0.0)

    return lr


def cosine_with_min_lr(
    peak: float, steps: int, *, min_lr: float | None = None, min_lr_rate: float | None = None, num_cycles: float = 0.5
) -> Schedule:
    """`num_cycles` waves of a cosine from peak down to min_lr, or to min_lr_rate * peak."""
    low = (min_lr or 0.0) / peak if min_lr_rate is None else min_lr_rate
    return lambda step: peak * (low + (1 - low) * 0.5 * (1 + torch.cos(2 * math.pi * num_cycles * progress(step, steps))))


def polynomial(peak: float, steps: int, *, power: float = 1.0, lr_end: float = 1e-7) -> Schedule:
    """lr_end + (peak - lr_end) (1 - step / steps)^power. Errors: ValueError for an end that is not below the peak."""
    if not peak > lr_end:
        raise ValueError(f"lr_end {lr_end:g} of lr_scheduler_kwargs must be below the peak learning rate {peak:g}")
    return lambda step: lr_end + (peak - lr_end) * (1 - progress(step, steps)) ** power


def inverse_sqrt(peak: float, steps: int, *, timescale: float = 10_000) -> Schedule:
    """peak sqrt(timescale / (timescale + step)), whatever the `steps`. Source: Zhai et al., arXiv 2106.04560, section 3.5."""
    return lambda step: peak / ((step.double() + timescale) / timescale).sqrt()


def rex(peak: float, steps: int, *, min_ratio: float = 0.0, beta: float = 0.9) -> Schedule:
    """A reflected exponential: from peak to min_ratio * peak as z / (1 - beta + beta z), z = 1 - step / steps.

    Source: Chen et al., arXiv 2107.04197, eq. 2, where beta is 1/2; 0.9, which stays high for longer, is what other tools take.
    """

    def lr(step: Tensor) -> Tensor:
        left = 1 - progress(step, steps)
        return peak * (min_ratio + (1 - min_ratio) * left / (1 - beta + beta * left))

    return lr


# Parts from 0 to 1 -> how far a rise has come; a decay is 1 less that.
RISES: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "linear": lambda passed: passed,
        "cosine": lambda passed: 0.5 * (1 - torch.cos(math.pi * passed)),
        "1-sqrt": lambda passed: 1 - (1 - passed).sqrt(),
    }
)


def risen(step: Tensor, warmup: int) -> Tensor:
    """The part of the warm-up that step has come to: (step + 1) / (warmup + 1), so that the rate of step 0 is above 0; 1 after it."""
    return ((step.double() + 1) / (warmup + 1)).clamp(max=1.0)


def warmup_stable_decay(
    peak: float,
    steps: int,
    *,
    warmup: int,
    num_decay_steps: int,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
) -> Schedule:
    """A rise, the peak, and a decay to min_lr_ratio * peak over the last num_decay_steps, or after num_stable_steps.

    Source: Hu et al., arXiv 2404.06395, section 4.2. Errors: ValueError for a rise and a decay that are longer than the run.
    """
    stable = steps - warmup - num_decay_steps if num_stable_steps is None else num_stable_steps
    if stable < 0:
        raise ValueError(
            f"num_decay_steps {num_decay_steps} of lr_scheduler_kwargs and {warmup} of warm-up are more than the {steps} steps of the run"
        )
    falls: dict[str, Callable[[Tensor], Tensor]] = {
        "linear": lambda passed: 1 - passed,
        "cosine": lambda passed: 0.5 * (1 + torch.cos(math.pi * passed)),
        "1-sqrt": lambda passed: 1 - passed.sqrt(),
    }

    def lr(step: Tensor) -> Tensor:
        passed = progress(step - warmup - stable, num_decay_steps)
        factor = falls[decay_type](passed) * RISES[warmup_type](risen(step, warmup))
        return peak * (factor * (1 - min_lr_ratio) + min_lr_ratio)

    return lr


def one_cycle(
    peak: float,
    steps: int,
    *,
    warmup: int,
    pct_start: float | None = None,
    anneal_strategy: str = "cos",
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    three_phase: bool = False,
) -> Schedule:
    """From peak / div_factor up to peak in the steps of warm-up (or pct_start of all), and down to peak / div_factor / final_div_factor.

    three_phase: down to where it began in as many steps as it rose, and then to the end. Momentum does not move.
    Source: Smith & Topin, arXiv 1708.07120; phases as of torch.optim.lr_scheduler.OneCycleLR. Errors: ValueError for a rise of more than
    half of the steps with three phases.
    """
    part = warmup / max(steps, 1) if pct_start is None else pct_start
    if three_phase and 2 * part > 1:
        raise ValueError(f"three_phase of lr_scheduler_kwargs rises and falls in {part:g} of the run each: at most 0.5")
    start, up = peak / div_factor, part * steps - 1
    low = start / final_div_factor
    ends = [(up, peak), (2 * part * steps - 2, start), (steps - 1.0, low)] if three_phase else [(up, peak), (steps - 1.0, low)]
    anneal = {"cos": RISES["cosine"], "linear": RISES["linear"]}[anneal_strategy]

    def lr(step: Tensor) -> Tensor:
        here, value, before, rate = step.double(), None, 0.0, start
        for end, target in ends:
            # A rise of one step or less has no first step below the peak.
            passed = ((here - before) / (end - before)).clamp(0, 1) if end > before else torch.ones_like(here)
            now = rate + (target - rate) * anneal(passed)
            value = now if value is None else torch.where(here > before, now, value)
            before, rate = end, target
        assert value is not None
        return value

    return lr
