"""A plan in words: a table of devices or of terms, and the line that says whether the run fits."""

from collections.abc import Sequence
from typing import Any

from treetune.cli.planning.advice import TIGHT, Advice
from treetune.cli.planning.estimate import Estimate, Place
from treetune.core.config import table
from treetune.models.memory import shown

HEADER = ("device", "memory", "peak", "of it held", "step", "tokens/s", "")


def title(method: str, config: Any, model: str, tokens: int) -> str:
    """What the plan is of, in a line."""
    values = table.flatten(config)
    trained = f"lora r {values['lora_r']}" if values.get("adapter") == "lora" else "the whole model"
    kept = f" on {values['quant']}" if values["quant"] not in ("auto", "none") else ""
    remat = values["gradient_checkpointing"]
    steps = values["gradient_accumulation_steps"]
    return (
        f"{method} of {model}: {trained}{kept}, {values['optimizer']}, gradient checkpointing {remat}, "
        f"{steps} micro-batch{'es' * (steps > 1)} a step of up to {tokens} tokens"
    )


def verdict(one: Estimate, place: Place) -> str:
    """Whether it fits, in a word or three."""
    share = one.peak / place.device.room
    return "fits" if share <= TIGHT else "tight" if share <= 1 else "does not fit"


def grid(plans: Sequence[tuple[Place, Estimate]]) -> list[list[str]]:
    """A row for each device, as `HEADER` names its columns."""
    return [
        [_device(place), *map(shown, (place.device.memory, one.peak, held(one))), seconds(one.step), rate(one), verdict(one, place)]
        for place, one in plans
    ]


def held(one: Estimate) -> int:
    """Bytes that are there between micro-batches."""
    return sum(size for name, size in one.memory.items() if name not in ("activations", "sampler", "gathered layers"))


def terms(plans: Sequence[tuple[Place, Estimate]]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of memory and time by term, a column for each device."""
    names = list(dict.fromkeys(name for _, one in plans for name in one.memory))
    times = list(dict.fromkeys(name for _, one in plans for name in one.seconds))

    def row(name: str, values: list[str]) -> list[str]:
        return [name, *values]

    rows = [row("peak memory", [f"{shown(one.peak)} of {shown(place.device.room)}" for place, one in plans])]
    rows += [row(f"  {name}", [shown(one.memory[name]) if name in one.memory else "-" for _, one in plans]) for name in names]
    rows += [row("a step", [f"{seconds(one.step)}, {rate(one)} tokens/s" for _, one in plans])]
    rows += [row(f"  {name}", [seconds(one.seconds[name]) if name in one.seconds else "-" for _, one in plans]) for name in times]
    return ["", *(_device(place) for place, _ in plans)], rows


def _device(place: Place) -> str:
    return place.device.title if place.ranks == 1 else f"{place.ranks} x {place.device.title}, each"


def line(one: Estimate, place: Place) -> str:
    """The verdict in a sentence."""
    word, device = verdict(one, place), _device(place)
    need, room = shown(one.peak), shown(place.device.room)
    if word == "fits":
        return f"fits on {device}: {need} of {room} at the peak, about {seconds(one.step)} a step"
    if word == "tight":
        return f"may fit on {device}, with little to spare: {need} of {room} at the peak"
    return f"does not fit on {device}: {need} at the peak, and there are {room}"


def advice(changes: Sequence[Advice]) -> list[str]:
    """Lines about what would make it fit."""
    if not changes:
        return ["no one or two options make it fit: take a larger device, a smaller model, or more devices (--nproc N --sharding full)"]
    width = max(len(one.change.flags) for one in changes)
    taken = [f"{shown(one.estimate.peak)}, {seconds(one.estimate.step)} a step" for one in changes]
    lines = [f"  {one.change.flags:{width}}  {text} ({one.change.cost})" for one, text in zip(changes, taken, strict=True)]
    return ["to make it fit, the fastest first:", *lines]


def seconds(value: float) -> str:
    """Seconds in a unit that leaves digits before the point."""
    if value >= 90:
        return f"{value / 60:.1f} min"
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.0f} ms" if value >= 0.01 else f"{1e3 * value:.1f} ms"


def rate(one: Estimate) -> str:
    """Tokens in a second."""
    value = one.tokens / max(one.step, 1e-9)
    return f"{value:,.0f}" if value < 1e4 else f"{value / 1e3:,.0f}k"
