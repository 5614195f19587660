"""How often a run evaluates and saves: keys of axolotl's files as options. Imports no torch."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from treetune.cli.axolotl.file import File, Unsupported, Values, write

PARTS = {"save_steps": "saves_per_epoch", "eval_steps": "evals_per_epoch"}


def _steps(name: str) -> Callable[[Any, File], Values]:
    """save_steps or eval_steps: a number of steps, or below 1 a part of all of them."""

    def function(value: Any, file: File) -> Values:
        if not isinstance(value, float) or not 0 < value < 1:
            return {name: write(value)} if value else {}
        if (steps := file.value("max_steps")) is not None:
            return {name: write(math.ceil(value * steps))}
        each = 1 / (value * file.value("num_epochs", 1))
        if each < 0.999 or abs(each - round(each)) > 1e-3 * each:
            raise Unsupported(f"{PARTS[name]}, or a whole number of steps")
        return {PARTS[name]: write(round(each))}

    return function


def _each_epoch(name: str) -> Callable[[Any, File], Values]:
    """saves_per_epoch or evals_per_epoch, which of a stream are parts of max_steps, as its length is not known."""

    def function(value: Any, file: File) -> Values:
        steps, streams = file.value("max_steps"), file.value("pretraining_dataset") or file.value("streaming")
        if not value or steps is None or not streams:
            return {PARTS[name]: write(value)}
        return {name: write(max(1, math.ceil(steps / (value * file.value("num_epochs", 1)))))}

    return function


def _strategy(name: str) -> Callable[[Any, File], Values]:
    def function(value: Any, file: File) -> Values:
        if value == "best":
            raise Unsupported("save_strategy: steps; the best checkpoint is kept besides the newest")
        if value in (False, "no"):
            return {PARTS[name]: write(0)}
        return {PARTS[name]: write(1)} if value == "epoch" and not file.value("pretraining_dataset") else {}

    return function


FUNCTIONS: Mapping[str, Callable[[Any, File], Values]] = {
    **{steps: _steps(steps) for steps in PARTS},
    **{parts: _each_epoch(steps) for steps, parts in PARTS.items()},
    "eval_strategy": _strategy("eval_steps"), "evaluation_strategy": _strategy("eval_steps"), "save_strategy": _strategy("save_steps"),
}  # fmt: skip
