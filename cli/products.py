"""Which matrix products a run computes with on a CPU: measured once on each machine, recorded in checkpoints, taken from there on resuming.

The choice is kept under `$TREETUNE_HOME/products` by processor, torch version and threads, so that runs of one machine agree.
"""

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from treetune.core import ckpt
from treetune.models import fetch
from treetune.ops import product

KEY = "products"  # of a checkpoint's meta
Share = Callable[[Callable[[], Any]], Any]  # runs a function on one rank and gives its result to all


def call(fn: Callable[[], Any]) -> Any:
    """`Share` of a process that is alone."""
    return fn()


def settle(resume: Path | None, dtype: torch.dtype, on: torch.device, *, share: Share = call, say: Callable[[str], None] = print) -> None:
    """Choose the products for this process: those of the checkpoint to go on from, else those of the machine; one choice for all ranks."""
    product.choose(product.Choice())  # whatever ran in this process before may have had another
    if on.type != "cpu" or dtype != torch.float32:
        return
    own = share(_of_machine)
    recorded = None if resume is None else product.Choice(**ckpt.read_meta(resume).get(KEY, product.Choice()._asdict()))
    product.choose(own if recorded is None else recorded)
    if recorded is not None and recorded != own:
        say(f"products: {_words(recorded)}, as in {resume.name}; on this machine {_words(own)} would be faster")


def record() -> dict[str, dict[str, str]]:
    """What a checkpoint keeps of the choice."""
    return {KEY: product.chosen()._asdict()}


def _words(choice: product.Choice) -> str:
    return f"{choice.few} for few rows and {choice.many} for many"


def _of_machine() -> product.Choice:
    """The choice kept for this machine, measured when there is none; where nothing can be written, each start measures."""
    name = f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    path = fetch.home() / "products" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
    if (kept := _read(path)) is None:
        kept = measured = product.measure()
        _write(path, {"machine": name, **measured._asdict()})
        kept = _read(path) or measured  # another process may have been first, and all must agree
    return kept


def _read(path: Path) -> product.Choice | None:
    try:
        kept = json.loads(path.read_text())
        choice = product.Choice(kept["few"], kept["many"])
        return choice if set(choice) <= product.CANDIDATES.keys() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, kept: dict) -> None:
    """Write the file unless there is a sound one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(kept, indent=1))
        if _read(path) is None:
            path.unlink(missing_ok=True)
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
