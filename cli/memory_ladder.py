"""What to try where memory has run out: changes of this run, one after another, and the peak that each would have."""

import dataclasses
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from treetune.cli.memory_rows import sizes
from treetune.cli.options import meshes
from treetune.cli.options.optim import OptimOptions, build
from treetune.cli.run import TrainConfig
from treetune.core.config import table
from treetune.models import MODELS, describe, fetch, hf, memory, quantised
from treetune.models.memory import GIB, Setup, shown

FITS = 0.8  # of the memory of a device: the rest is for the library, and for what fragments
WORTH = 0.99  # of the peak before: what saves less is left out
Values = dict[str, Any]


class Rung(NamedTuple):
    """A change as flags of the command line, what it costs, and the peak in bytes with it and those before."""

    flags: str
    cost: str
    peak: int


class Ladder(NamedTuple):
    """The estimated peak of the run as it was, and the rungs in order."""

    peak: int
    rungs: list[Rung]


def climb(config: TrainConfig, device: str, *, held: int | None = None) -> Ladder:
    """The ladder of a run. held: bytes of all the weights that it has, a reference model and other extras among them, where known.

    Errors: ValueError for a model that is not there.
    """
    abstract, cfg = _model(config, device)
    values = table.flatten(config)
    plain = memory.table(abstract, cfg, _setup(config, values, device))
    extra = 0 if held is None else max(0, held - plain.weights - plain.adapter)

    def peak(values: Values) -> int:
        return memory.table(abstract, cfg, _setup(config, values, device)).peak + extra

    now = start = peak(values)
    rungs = []
    for flags, cost, changed in changes(values, device):
        if (then := peak(values | changed)) < WORTH * now:
            values, now = values | changed, then
            rungs.append(Rung(flags, cost, then))
    return Ladder(start, rungs)


def table_of(config: TrainConfig, device: str) -> memory.Table:
    """The memory of the run by term. Errors: ValueError for a model that is not there."""
    abstract, cfg = _model(config, device)
    return memory.table(abstract, cfg, _setup(config, table.flatten(config), device))


def _model(config: TrainConfig, device: str) -> tuple[Any, Any]:
    """The leaves and the sizes of the model of a run, in the dtype that it computes in."""
    options = config.model
    shape = getattr(options, "from_config", None)
    if shape is not None:
        family, cfg = hf.read_config(Path(shape) / "config.json" if Path(shape).is_dir() else Path(shape))
    else:
        family, cfg = describe.read_sizes(fetch.resolve(options.model, revision=options.revision))
    cfg = dataclasses.replace(cfg, dtype=_dtype(options.dtype, device))
    return MODELS[family].abstract(cfg), cfg


def _dtype(name: str, device: str) -> Any:
    import torch

    from treetune.models import loading

    return loading.compute_dtype(name, torch.device(device))


def _setup(config: TrainConfig, values: Values, device: str) -> Setup:
    count, rows, slots = sizes(values)
    changed = {name: values[name] for name in ("gradient_checkpointing", "activation_offloading", "layer_offloading")}
    chosen = dataclasses.replace(config.optim, **changed)
    return Setup(
        count,
        rank=values["lora_r"] if values.get("adapter") == "lora" else 0,
        scheme=quantised.of(dataclasses.replace(config.model, quant=values["quant"])),
        state_bytes=state_bytes(values["optimizer"]),
        remat=chosen.remat,
        device=device,
        rows=rows,
        slots=slots,
        nucleus=values.get("top_p", 1.0) < 1,
        layers=chosen.layer_offloading,
        paged=values["optimizer"].startswith("paged_"),
    )


@cache
def state_bytes(optimizer: str) -> float:
    """Bytes of an optimiser's state, by its name, for each number that trains."""
    return memory.state_bytes(build(OptimOptions(optimizer=optimizer)))


def changes(values: Values, device: str) -> Iterator[tuple[str, str, Values]]:
    """(flags, what it costs, changed values) of what may be tried, what costs least first; each is made of the run as it was."""
    size, steps = values["micro_batch_size"], values["gradient_accumulation_steps"]
    for smaller in [part for part in _halves(size) if size % part == 0]:
        more = steps * size // smaller
        flags = f"--micro-batch-size {smaller} --gradient-accumulation-steps {more}"
        yield flags, "the same step, in more passes", {"micro_batch_size": smaller, "gradient_accumulation_steps": more}
    if values["gradient_checkpointing"] == "none":
        yield "--gradient-checkpointing selective", "a little slower", {"gradient_checkpointing": "selective"}
    if values["gradient_checkpointing"] in ("none", "selective"):
        yield "--gradient-checkpointing full", "about a third slower", {"gradient_checkpointing": "full"}
    place = "disk" if device == "cpu" else "cpu"
    if values["activation_offloading"] == "none":
        yield f"--activation-offloading {place}", "slower by what it copies", {"activation_offloading": place}
    if values["optimizer"] in ("adamw", "lion"):
        name = f"{values['optimizer']}_8bit"
        yield f"--optimizer {name}", "moments in 8 bits", {"optimizer": name}
    if values.get("adapter") == "none" and not values.get("from_config") and "lora_r" in values:
        yield "--adapter lora", "trains matrices of low rank beside the model", {"adapter": "lora"}
    if values["quant"] in ("auto", "none") and not values.get("from_config"):
        yield "--quant nf4", "frozen weights in 4 bits", {"quant": "nf4"}
    if values["layer_offloading"] == "none" and values.get("adapter") != "none" and "tensor" not in meshes.read(values.get("shard") or ()):
        yield f"--layer-offloading {place}", "frozen layers are read twice a pass", {"layer_offloading": place}
    yield from _shorter(values)


def _shorter(values: Values) -> Iterator[tuple[str, str, Values]]:
    """Shorter texts: other rows are read, or other completions sampled."""
    for name, cost in (
        ("max_completion_length", "longer completions are cut off"),
        ("sequence_len", "longer rows are dropped, cut or split"),
        ("max_prompt_len", "longer prompts are dropped"),
    ):
        if values.get(name):
            half = max(1, values[name] // 2)
            yield f"--{name.replace('_', '-')} {half}", cost, {name: half}


def _halves(number: int) -> Iterator[int]:
    while number > 1:
        number //= 2
        yield number


def first(ladder: Ladder) -> str:
    """The first rung in words, or what is left where there is none."""
    if not ladder.rungs:
        return "take a smaller model or a larger device: no option of this run would need less"
    rung = ladder.rungs[0]
    more = f", or further down the list of {len(ladder.rungs)} above" if len(ladder.rungs) > 1 else ""
    return f"try {rung.flags}, about {shown(rung.peak)} instead of {shown(ladder.peak)}{more}"


def lines(ladder: Ladder, capacity: int) -> list[str]:
    """The ladder in words. capacity: bytes of the device."""
    room = f"{shown(capacity)} of memory"
    need = f"this run needs about {shown(ladder.peak)} at its peak"
    enough = ladder.peak < FITS * capacity
    out = [f"{need}, and there are {room}: look for what else takes memory" if enough else f"{need}, of {room}"]
    out[0] += "; to need less, in this order, each with those before it:" if ladder.rungs else ""
    reached = None if enough else next((i for i, rung in enumerate(ladder.rungs) if rung.peak < FITS * capacity), None)
    for i, rung in enumerate(ladder.rungs):
        out.append(f"{i + 1}. {rung.flags}: about {shown(rung.peak)} ({rung.cost})" + (", which fits" if i == reached else ""))
    return out


def capacity(device: str) -> int:
    """Bytes of the device, or of this machine."""
    import os

    import torch

    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else GIB
