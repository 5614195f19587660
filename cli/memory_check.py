"""Whether a run can fit into the memory of its device, before its weights are loaded: by formulas alone, in milliseconds."""

from pathlib import Path
from typing import Any, NamedTuple

from treetune.cli import memory_ladder
from treetune.cli.options import meshes
from treetune.cli.run import TrainConfig
from treetune.models import MODELS, fetch, hf
from treetune.models.memory import shown

SURE = 0.9  # of an estimate: formulas are within 10 % of what is measured


class Need(NamedTuple):
    """Bytes at the peak of a device, those held throughout (weights, gradients, states), and those that there are."""

    peak: int
    held: int
    capacity: int
    gpu: bool

    @property
    def beyond(self) -> bool:
        """Whether it cannot fit. On a CPU rows may be shorter than the options allow, and pages go to a disk: what is held decides."""
        return SURE * (self.peak if self.gpu else self.held) > self.capacity


def need(config: TrainConfig, device: str, ranks: int = 1) -> Need | None:
    """What a run needs of its device.

    None where formulas do not tell: a model that is not here, in GGUF or of transformers' modules, parts of a model that train.
    """
    options: Any = config
    if getattr(getattr(options, "adapter", None), "unfrozen_parameters", ()) or not _native(options.model):
        return None
    table = memory_ladder.table_of(config, device)
    what = meshes.sharding(config.run)
    shared = ranks if what == "full" else 1
    tensor = meshes.sizes(config.run).get("tensor", 1) if meshes.processes(config.run) > 1 else 1
    held = table.held // (shared * tensor)
    if what in ("moments", "gradients"):
        held -= (table.optimiser + (table.gradients if what == "gradients" else 0)) * (ranks - 1) // ranks
    return Need(held + table.peak - table.held, held, memory_ladder.capacity(device), device == "cuda")


def _native(options: Any) -> bool:
    """Whether the sizes of the model are here, and of a family that formulas are of."""
    try:
        shape = getattr(options, "from_config", None)
        path = fetch.here(options.model) if shape is None else Path(shape)
        file = None if path is None else path / "config.json" if path.is_dir() else path
        return file is not None and file.suffix == ".json" and file.is_file() and dict.__contains__(MODELS, hf.read_config(file)[0])
    except (ValueError, OSError):  # loading says what is wrong
        return False


def check(config: TrainConfig, device: str, ranks: int = 1) -> str:
    """A line where memory may be short; empty where it is not, or is to be ignored. Errors: ValueError for a run that cannot fit."""
    if config.run.ignore_memory or (needed := need(config, device, ranks)) is None or needed.peak <= needed.capacity:
        return ""
    room = f"{shown(needed.capacity)} of memory"
    if not needed.beyond:
        return f"this run may need about {shown(needed.peak)} at its peak, and there are {room}: treetune plan says what would need less"
    first = memory_ladder.first(memory_ladder.climb(config, device)).partition(", or further down")[0]
    raise ValueError(
        f"this run needs about {shown(needed.peak)} at its peak, and there are {room}: {first}; treetune plan lists what fits, and "
        "--ignore-memory starts it all the same"
    )
