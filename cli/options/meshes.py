"""The axes along which the processes of a run share rows, weights and work, and what is split along `data`. Imports no torch."""

import os
from collections.abc import Mapping
from typing import Protocol

from treetune.core.config.marks import EqualsTexts

# From the outermost, whose ranks are farthest apart; ranks along the last one are neighbours.
AXES = ("tensor", "replicate", "context", "data")
HINTS: Mapping[str, str] = {"expert": "; experts are split along tensor"}


class Placing(Protocol):
    """The options that say where a run takes place."""

    @property
    def shard(self) -> tuple[str, ...]:
        """AXIS=SIZE texts."""
        ...

    @property
    def sharding(self) -> str | None:
        """What is split along `data`."""
        ...

    @property
    def nproc(self) -> int:
        """Processes on this machine."""
        ...

    @property
    def nnodes(self) -> int:
        """Machines."""
        ...


def read(texts: tuple[str, ...], option: str = "shard") -> dict[str, int]:
    """AXIS=SIZE texts, each with one or several of them between commas, as a mapping. Errors: ValueError for what is none."""
    out: dict[str, int] = {}
    for text in [part.strip() for one in texts for part in one.split(",")]:
        axis, _, size = (part.strip() for part in text.partition("="))
        if axis not in AXES:
            raise ValueError(f"--{option} takes AXIS=SIZE with an axis of {', '.join(AXES)}, got {text!r}{HINTS.get(axis, '')}")
        if axis in out:
            raise ValueError(f"--{option} takes each axis once, got {axis} twice")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"--{option} takes whole numbers of at least 1 as sizes, got {text!r}")
        out[axis] = int(size)
    return out


SIZES = EqualsTexts(read, named=True, values=True)


def processes(options: Placing) -> int:
    """Processes that train together: those that torchrun has started, else those that the options ask for."""
    return int(os.environ.get("WORLD_SIZE", 0)) or options.nproc * options.nnodes


def sizes(options: Placing) -> dict[str, int]:
    """{axis: size} of axes with several ranks, in the order of AXES; the size of one that is not named follows: of data, then replicate.

    Errors: ValueError where the sizes do not multiply to the number of processes.
    """
    given, count = read(options.shard), processes(options)
    product = 1
    for size in given.values():
        product *= size
    open_axis = next((axis for axis in ("data", "replicate") if axis not in given), None)
    if count % product or (open_axis is None and product != count):
        shown = ",".join(f"{axis}={size}" for axis, size in given.items())
        raise ValueError(f"shard {shown} is for {product} processes{' or a multiple' * (open_axis is not None)}, and there are {count}")
    complete = given | ({} if open_axis is None else {open_axis: count // product})
    return {axis: complete[axis] for axis in AXES if complete.get(axis, 1) > 1}


def sharding(options: Placing) -> str:
    """What is split along `data`: what the options say, else everything where shard names data or replicate, else nothing."""
    if options.sharding is not None:
        return options.sharding
    return "full" if {"data", "replicate"} & read(options.shard).keys() else "none"


def sharing(options: Placing) -> int:
    """Ranks that share the tokens of each stream."""
    return sizes(options).get("context", 1) if processes(options) > 1 else 1


def conflicts(options: Placing) -> None:
    """Raise ValueError, one line, for sizes that do not fit the processes, and for axes that would change nothing or cannot be."""
    if processes(options) == 1:
        return  # refused as options that one process would ignore
    found, what = sizes(options), sharding(options)
    if what != "none" and "data" not in found:
        raise ValueError(f"sharding {what} splits along data, which has one rank: give it more, or sharding none")
    if what == "none" and "replicate" in found:
        raise ValueError("shard replicate is for weights or moments that are split along data, and sharding none splits nothing: give data")
