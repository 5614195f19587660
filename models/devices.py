"""Devices that a run may be planned for: memory, rates and links, from data sheets; those of this CPU are measured.

The rates of GPUs are the peaks of NVIDIA's data sheets (H100 SXM, H200 SXM, A100 SXM 80 and 40 GB, L4) and of the Ada architecture's white
paper (RTX 4090), dense products, sums in float32; memory is what the driver leaves to a program.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from treetune.core import machine
from treetune.models.memory import GIB

# What part of a peak is reached: large products and kernels of attention, and passes over memory. With the H200's peaks these are the 0.85
# of 790 TFLOP/s, 370 TFLOP/s, and 0.85 of 4.3 TB/s that its users measure.
PRODUCTS, ATTENTION, PASSES = 0.68, 0.35, 0.76
LAUNCH_S, HOST_S = 2.5e-6, 20e-6  # that a kernel takes at least, and that Python takes to launch it
RUNTIME = GIB  # what CUDA and its libraries take beside tensors


class Device(NamedTuple):
    """memory: bytes. low, wide: products in 16 and 32 bits, FLOP/s. bandwidth, link: bytes/s, of memory and to other devices one way.

    latency: seconds of a message between devices. launch, host: seconds of an op on the device, and in Python beside it. runtime: bytes
    that are taken beside tensors.
    products, attention, passes: parts of these rates that are reached.
    """

    name: str
    title: str
    memory: int
    low: float
    wide: float
    bandwidth: float
    link: float
    latency: float = 25e-6
    launch: float = LAUNCH_S
    host: float = HOST_S
    runtime: int = RUNTIME
    products: float = PRODUCTS
    attention: float = ATTENTION
    passes: float = PASSES
    gpu: bool = True

    @property
    def room(self) -> int:
        """Bytes that tensors may take."""
        return self.memory - self.runtime


def _gpu(name: str, title: str, gib: float, tera: tuple[float, float], giga: tuple[float, float]) -> Device:
    return Device(name, title, int(gib * GIB), tera[0] * 1e12, tera[1] * 1e12, giga[0] * 1e9, giga[1] * 1e9)


# Name, memory in GiB, TFLOP/s in bfloat16 and float32, GB/s of memory and of the link to other devices.
GPUS = {
    one.name: one
    for one in (
        _gpu("h200", "H200", 139.8, (989, 67), (4800, 450)),
        _gpu("h100", "H100", 79.1, (989, 67), (3350, 450)),
        _gpu("a100-80", "A100 80 GB", 79.1, (312, 19.5), (2039, 300)),
        _gpu("a100-40", "A100 40 GB", 39.4, (312, 19.5), (1555, 300)),
        _gpu("4090", "RTX 4090", 23.5, (165, 82.6), (1008, 25)),
        _gpu("l4", "L4", 22.0, (121, 30.3), (300, 25)),
    )
}
NAMES = (*GPUS, "cpu")


def named(name: str) -> Device:
    """The device of a name, in any case; this CPU is measured. Errors: ValueError for a name that is none."""
    key = name.lower().removeprefix("rtx").strip(" -_")
    if key == "cpu":
        return cpu()
    if key not in GPUS:
        raise ValueError(f"{name!r} is no device that is known: expected one of {', '.join(NAMES)}")
    return GPUS[key]


def here(device: torch.device) -> Device:
    """The device of this machine that a run would be on, with the memory that it has."""
    if device.type != "cuda":
        return cpu()
    title = torch.cuda.get_device_name(device)
    memory = torch.cuda.get_device_properties(device).total_memory
    like = next((one for one in GPUS.values() if one.name.split("-")[0] in title.lower()), GPUS["a100-40"])
    return like._replace(title=title, memory=memory)


def cpu() -> Device:
    """This machine's CPU: its memory, and rates that are measured in a quarter of a second."""
    small, rows, square = torch.ones(8), torch.ones(256, 1024), torch.ones(2048, 1024)
    low, low_square = rows.bfloat16(), square.bfloat16()
    large = torch.ones(1 << 22)
    out = torch.empty_like(large)
    flops = 2.0 * rows.numel() * square.shape[0]
    return Device(
        "cpu",
        "this CPU",
        system_memory(),
        low=flops / _best(lambda: torch.mm(low, low_square.T)),
        wide=flops / _best(lambda: torch.mm(rows, square.T)),
        bandwidth=2 * large.nbytes / _best(lambda: out.copy_(large)),
        link=1e9,
        latency=100e-6,
        launch=_best(lambda: small.add(1.0), 50),
        host=0.0,
        runtime=0,
        products=0.9,
        attention=0.5,
        passes=0.8,
        gpu=False,
    )


def _best(run: Callable[[], object], rounds: int = 4) -> float:
    """Seconds of the fastest of some rounds: other work on the machine only ever slows one down."""
    best = float("inf")
    for _ in range(rounds + 1):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return max(best, 1e-9)


def system_memory() -> int:
    """Bytes of this machine, or of the container that the process is in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else GIB
    try:
        return min(total, int(Path(machine.CONTAINER / "memory.max").read_text()))
    except (OSError, ValueError):  # no limit is "max"
        return total
