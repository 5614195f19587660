"""How often things happen in a run of so many steps: its learning rate, its pauses, and what would never come about."""

import math
from typing import Any

import torch

from treetune.cli.options.optim import OptimOptions
from treetune.core import optim, registry
from treetune.core.run.loop import PAUSES


def warmup_steps(options: OptimOptions, steps: int) -> int:
    """Steps of warm-up in a run of `steps` steps."""
    ratio = 0.03 if options.warmup_ratio is None else options.warmup_ratio
    return options.warmup_steps if options.warmup_steps is not None else round(ratio * steps)


def schedule(options: OptimOptions, peak: float, steps: int) -> optim.Schedule:
    """Warm-up, then the shape that the options name, over `steps` optimiser steps."""
    warm = warmup_steps(options, steps)
    rest = max(steps - warm, 1)
    shape = registry.bind(registry.choose(registry.SCHEDULES, options.lr_scheduler), min_ratio=options.cosine_min_lr_ratio)
    return optim.warmup(shape(peak, rest), warm)


def describe(options: OptimOptions, peak: float, total: int) -> str:
    """The learning rate of a run in words, with that of its last step."""
    warm, last = warmup_steps(options, total), final(options, peak, total)
    rise = f" after {warm} step{'s' * (warm > 1)} of warm-up" if warm else ""
    return f"peak learning rate {peak:g}{rise}, {options.lr_scheduler}, {last:.3g} at the last step"


def final(options: OptimOptions, peak: float, total: int) -> float:
    """The learning rate of the last step."""
    return schedule(options, peak, total)(torch.tensor(max(total - 1, 0))).item()


def warnings(config: Any, peak: float, total: int, *, evaluated: bool) -> list[str]:
    """What the options ask for that a run of `total` steps never reaches, with the fix. evaluated: whether anything is held out."""
    return [*_warmup(config.optim, peak, total), *_never(config, total, evaluated), *(_patience(config, total) if evaluated else ())]


def _warmup(options: OptimOptions, peak: float, total: int) -> list[str]:
    warm = warmup_steps(options, total)
    if warm < max(total, 1):
        return []
    given = f"warmup_steps {warm}" if options.warmup_steps is not None else f"warmup_ratio {options.warmup_ratio:g}"
    return [
        f"{given} is {'longer than' if warm > total else 'all of'} the run of {_steps(total)}: the learning rate only rises, to "
        f"{final(options, peak, total):.3g} of {peak:g} at the last step; set warmup_steps below {total}; without it 3 % of the run"
    ]


def _never(config: Any, total: int, evaluated: bool) -> list[str]:
    """Options that count in steps and are past the end."""
    run = config.run
    reference, pipe = getattr(config, "reference", None), getattr(config, "pipeline", None)
    asked = {
        "eval_steps": (run.eval_steps if evaluated else None, "it is evaluated before and after, and not in between"),
        "save_steps": (run.save_steps, "the only checkpoint is that of the last step"),
        "loss_watchdog_patience": (run.loss_watchdog_patience if run.loss_watchdog_threshold else None, "the watchdog never stops it"),
        "ref_model_sync_steps": (_synced(reference), "the reference never moves"),
        "vllm_sync_interval": (_interval(config), "the server samples from the untrained weights to the end"),
        "steps_per_generation": (pipe.steps_per_generation if pipe else None, "some of what is sampled is never trained on"),
    }
    return [
        f"{name} {value} is longer than the run of {_steps(total)}: {what}; set it to at most {max(1, total // 2)}, or train longer"
        for name, (value, what) in asked.items()
        if value is not None and value > total
    ]


def _synced(reference: Any) -> int | None:
    return reference.ref_model_sync_steps if getattr(reference, "sync_ref_model", False) else None


def _interval(config: Any) -> int | None:
    engine = getattr(config, "engine", None)
    return config.pipeline.vllm_sync_interval if getattr(engine, "use_vllm", False) else None


def _patience(config: Any, total: int) -> list[str]:
    """Early stopping needs as many evaluations without a new best, and one more step to spare."""
    patience, count = config.run.early_stopping_patience, evaluations(config, total)
    if patience is None or patience < count:
        return []
    every = max(1, total // (2 * (patience + 1)))
    return [
        f"early_stopping_patience {patience} never stops this run: it is evaluated {count} time{'s' * (count != 1)} after the start; "
        f"set eval_steps to about {every}, or a lower patience"
    ]


def evaluations(config: Any, total: int) -> int:
    """Evaluations after the start of a run of `total` steps; at the ends of epochs, the most that there may be."""
    if config.run.eval_steps is not None:
        return math.ceil(total / config.run.eval_steps)
    epochs = config.optim.num_epochs if config.optim.max_steps is None else total
    return max(1, min(PAUSES, total, math.ceil(epochs)))


def _steps(total: int) -> str:
    return f"{total} step{'s' * (total != 1)}"
