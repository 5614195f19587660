"""Which matrix products a run computes with on a CPU: measured once on each machine, recorded in checkpoints, taken from there on resuming.

The choice is stored under `$TREETUNE_HOME/products` by processor, torch version and threads, so that runs of one machine agree.
"""

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.utils.deterministic

from treetune.models import fetch
from treetune.models.fetch import Say, silent
from treetune.ops import fp8_linear, product

TF32_PARTS: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)  # each has its own switch
MEMORY: Any = torch.utils.deterministic  # whether memory is filled before it is written
KEY = "products"  # of a checkpoint's meta
Share = Callable[[Callable[[], Any]], Any]  # runs a function on one rank and gives its result to all


def settle(
    dtype: torch.dtype,
    device: torch.device,
    *,
    meta: Mapping[str, Any] | None = None,
    source: str = "",
    share: Share | None = None,
    say: Say = silent,
) -> None:
    """Choose the products for this process: those recorded in a checkpoint to go on from, else those of the machine.

    meta: of that checkpoint, with what `record` gave; one without was computed with the default. source: the checkpoint's name.
    share: runs a function on rank 0 and gives its result to all ranks, which must agree.
    """
    product.choose(product.Choice())  # whatever ran in this process before may have had another
    if device.type != "cpu" or dtype != torch.float32:
        return
    fastest = measured() if share is None else share(measured)
    # Another product changes the last bits of every result: a resumed run keeps its own, though it may be the slower one here.
    choice = fastest if meta is None else product.Choice(**meta.get(KEY, {}))
    product.choose(choice)
    if choice != fastest:
        say(f"products: {_describe(choice)}, as in {source}; on this machine {_describe(fastest)} would be faster")


@contextlib.contextmanager
def tf32(device: torch.device, *, on: bool, say: Say = silent) -> Iterator[None]:
    """Inside, CUDA multiplies float32 numbers as they are, or rounded to TF32; a line where the device has none."""
    lacks = _without_tf32(device)
    if on and lacks:
        say(f"tf32: {lacks}; float32 numbers are multiplied as they are")
    before = [part.allow_tf32 for part in TF32_PARTS]
    try:
        for part in TF32_PARTS:
            part.allow_tf32 = on and not lacks
        yield
    finally:
        for part, value in zip(TF32_PARTS, before, strict=True):
            part.allow_tf32 = value


@contextlib.contextmanager
def deterministic(device: torch.device, *, on: bool, say: Say = silent) -> Iterator[None]:
    """Inside, CUDA takes those of its algorithms that give the same bits each time, and warns where it has none; a line on a CPU."""
    if not on or device.type != "cuda":
        if on:
            say(f"deterministic: the run is on {device.type}, which gives the same bits each time as it is")
        yield
        return
    # Read when a thread first uses cuBLAS. The other value that makes it repeatable, :16:8, has less memory and is slower.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = MEMORY.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        MEMORY.fill_uninitialized_memory = False  # a pass over all that is allocated, for programs that read it unwritten
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        MEMORY.fill_uninitialized_memory = filled


def _without_tf32(device: torch.device) -> str:
    """Why a device has no TF32; empty for one that has."""
    if device.type != "cuda":
        return f"the run is on {device.type}, which has no TF32"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"TF32 needs compute capability 8.0, and this GPU has {major}.{minor}"


def without_float8(device: torch.device) -> str:
    """A line about a device that multiplies no float8; empty for one that does. Errors: ValueError for a GPU that does not."""
    if fp8_linear.native(device):
        return ""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        raise ValueError(f"fp8_products needs a GPU of compute capability 8.9 or more, and this one has {major}.{minor}: leave it out")
    return f"fp8 products: {device.type} multiplies no float8; the same numbers are multiplied in float32, which is slower than without"


def record() -> dict[str, dict[str, str]]:
    """What a checkpoint keeps of the choice."""
    return {KEY: product.chosen()._asdict()}


def _describe(choice: product.Choice) -> str:
    return f"{choice.few} for few rows and {choice.many} for many"


def measured() -> product.Choice:
    """The choice that is stored for this machine, measured when there is none; where nothing can be written, each start measures."""
    name = f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    path = fetch.home() / "products" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
    if (stored := _read(path)) is not None:
        return stored
    choice = product.measure()
    _write(path, {"machine": name, **choice._asdict()})
    return _read(path) or choice  # another process may have been first, and all must agree


def _read(path: Path) -> product.Choice | None:
    try:
        stored = json.loads(path.read_text())
        choice = product.Choice(stored["few"], stored["many"])
        return choice if set(choice) <= product.CANDIDATES.keys() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, entry: dict[str, str]) -> None:
    """Write the file unless there is a sound one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(entry, indent=1))
        if _read(path) is None:
            path.unlink(missing_ok=True)
        # A link and not a rename: it fails where another process was first, whose choice then holds for all.
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    with contextlib.suppress(OSError):
        draft.unlink(missing_ok=True)


def processor() -> str:
    """The name of the CPU with the instruction set that torch uses on it."""
    try:
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        name = ""
    return f"{name or platform.processor() or platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
