"""Curves in a line of text: the values of a metric over the steps of a run, as blocks of eight heights."""

import math
from collections.abc import Sequence
from typing import NamedTuple

BLOCKS, PLAIN = "▁▂▃▄▅▆▇█", "_.-~=+*#"  # PLAIN: for terminals without Unicode
BROKEN = "x"  # where no value of a stretch is finite


class Frame(NamedTuple):
    """What a curve is drawn in: its first and last step, its lowest and highest value. Curves in one frame can be compared."""

    first: float
    last: float
    low: float
    high: float


def frame(*curves: Sequence[tuple[float, float]]) -> Frame | None:
    """The frame around all curves of points (step, value); None where no value is finite."""
    points = [point for curve in curves for point in curve if math.isfinite(point[1])]
    if not points:
        return None
    steps, values = zip(*points, strict=True)
    return Frame(min(steps), max(steps), min(values), max(values))


def draw(curve: Sequence[tuple[float, float]], width: int, *, inside: Frame | None = None, plain: bool = False) -> str:
    """A curve of points (step, value) in at most `width` characters, each the mean of a stretch of steps; inside a frame in all of them.

    Blanks stand before the first and behind the last value of a curve that does not fill its frame; `x` where values are not finite.
    """
    count = width if inside is not None else min(width, len(curve))
    inside = frame(curve) if inside is None else inside
    if inside is None or count < 1:
        return BROKEN if curve and width else ""
    return "".join(_levels(_stretches(curve, count, inside), inside, PLAIN if plain else BLOCKS))


def _stretches(curve: Sequence[tuple[float, float]], count: int, inside: Frame) -> list[float | None]:
    """The mean of each stretch: nan where it has values and none is finite; a stretch without a value has that of the one before."""
    bins: list[list[float]] = [[] for _ in range(count)]
    span = inside.last - inside.first
    for step, value in curve:
        place = (step - inside.first) / span if span else 0.0
        bins[min(max(int(place * count), 0), count - 1)].append(value)
    means = [_mean(values) for values in bins]
    known = [i for i, mean in enumerate(means) if mean is not None]
    for i in range(known[0], known[-1]) if known else ():
        if means[i + 1] is None:
            means[i + 1] = means[i]
    return means


def _mean(values: list[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan if values else None


def _levels(means: list[float | None], inside: Frame, blocks: str) -> list[str]:
    span = inside.high - inside.low
    out = []
    for mean in means:
        if mean is None:
            out.append(" ")
        elif math.isnan(mean):
            out.append(BROKEN)
        else:
            out.append(blocks[round((mean - inside.low) / span * (len(blocks) - 1)) if span else len(blocks) // 2])
    return out
