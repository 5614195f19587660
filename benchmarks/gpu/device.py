"""The device of a part: CUDA, or in a dry run the CPU with tiny shapes. All that exists on CUDA alone is called here."""

import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

DRY = os.environ.get("GPU_DRY") == "1"
if not DRY and not torch.cuda.is_available():
    raise SystemExit("no CUDA GPU: use benchmarks/gpu.sh --dry for a run on the CPU")
DEVICE = torch.device("cpu") if DRY else torch.device("cuda", torch.cuda.current_device())
DTYPE = torch.float32 if DRY else torch.bfloat16  # that models compute in
if DRY:
    torch.set_num_threads(1)


def report(name: str, **values: Any) -> None:
    """A result for the driver; ok=False says that something is wrong, `text` is a table for people."""
    print("RESULT " + json.dumps({"name": name} | values, default=str), flush=True)


def synchronize() -> None:
    if not DRY:
        torch.cuda.synchronize()


def free() -> None:
    """Give unused memory back, and measure its peak anew."""
    if not DRY:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def no_syncs() -> Iterator[None]:
    """Inside, whatever makes the host wait for the device raises RuntimeError."""
    if DRY:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def interpreted() -> None:
    """In a dry run, run Triton kernels in the interpreter on the CPU."""
    from treetune.ops import backend

    if DRY and backend.triton is not None:
        backend.use_triton = lambda x: x.dtype != torch.float64


def milliseconds(fn: Callable[[], Any], *, repeats: int = 20) -> float:
    """The median time of a call on the device, after two calls that do not count."""
    repeats = 2 if DRY else repeats
    fn(), fn()
    times = []
    for _ in range(repeats):
        if DRY:
            begun = time.perf_counter()
            fn()
            times.append(1e3 * (time.perf_counter() - begun))
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        end.record()
        times.append((start, end))
    synchronize()
    return statistics.median(times if DRY else [start.elapsed_time(end) for start, end in times])


def step_seconds(step: Callable[[int], Any], *, steps: int, warm: int) -> float:
    """The time of a step, step(number), of so many in a row, of which the first do not count."""
    free()
    begun = time.perf_counter()
    for number in range(steps):
        if number == warm:
            synchronize()
            begun = time.perf_counter()
        step(number)
    synchronize()
    return (time.perf_counter() - begun) / (steps - warm)


def profiled(fn: Callable[[], Any]) -> tuple[str, dict[str, float]]:
    """The table of a call's kernels by their time on the device, and how many there were and how long they ran together."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (not DRY)
    with profile(activities=activities) as seen:
        fn()
        synchronize()
    kind = "cpu" if DRY else "device"
    events = seen.key_averages()
    table = events.table(sort_by=f"self_{kind}_time_total", row_limit=30, max_name_column_width=70)
    key = f"self_{kind}_time_total"
    kernels = [event for event in events if getattr(event, key) > 0 and (DRY or event.device_type == torch.autograd.DeviceType.CUDA)]
    return table, {"kernels": sum(event.count for event in kernels), "kernel_ms": sum(getattr(event, key) for event in kernels) / 1e3}
