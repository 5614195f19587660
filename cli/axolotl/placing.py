"""Where processes, weights and activations are: keys of axolotl's files as options. Imports no torch."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from treetune.cli.axolotl.file import File, Unsupported, Values, write

ON_DEVICE = "a run without offload; optim_args: {paged: true} keeps moments in the memory of the host, activation_offloading activations"
ALONE = "1, with sharding: full for models that one device does not hold"


def processes() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def _checkpointing(value: Any, file: File) -> Values:
    if value == "offload_disk":
        return {"gradient_checkpointing": write("full"), "activation_offloading": write("disk")}
    return {"gradient_checkpointing": write("full" if value == "unsloth" else value)}


def _activations(value: Any, file: File) -> Values:
    return {"activation_offloading": write("cpu" if value in ("legacy", "hidden_states") else value)}


def sharded() -> Values:
    """Sharding of everything, which one process has nothing to do with."""
    return {"sharding": write("full")} if processes() > 1 else {}


def _offloaded(file: File) -> Values:
    """Weights in the memory of the host: those that are frozen. Errors: Unsupported where all weights train."""
    if file.value("adapter") is None or "layer_offloading" not in file.options:
        raise Unsupported(ON_DEVICE)
    return {"layer_offloading": write("cpu")}


def _fsdp(value: Any, file: File) -> Values:
    words = value if isinstance(value, list) else str(value).split()
    if any("hybrid" in str(word) for word in words):
        raise Unsupported("fsdp: full_shard")
    out = _offloaded(file) if "offload" in words else {}
    return out if not value or "no_shard" in words else out | sharded()


def _fsdp_config(value: Any, file: File) -> Values:
    if not isinstance(value, dict):
        raise Unsupported("a mapping")
    bare = {name.removeprefix("fsdp_"): item for name, item in value.items() if str(item).lower() != "false"}
    strategy = str(bare.get("sharding_strategy", "FULL_SHARD")).upper()
    if strategy not in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "1", "2", "3"):
        raise Unsupported("sharding_strategy: FULL_SHARD")
    out = _offloaded(file) if bare.get("offload_params") else {}
    out |= {} if not value or strategy in ("NO_SHARD", "3") else sharded()
    if bare.get("activation_checkpointing") and not file.value("gradient_checkpointing"):
        out["gradient_checkpointing"] = write("full")
    return out


def _fsdp_version(value: Any, file: File) -> Values:
    return sharded()


def _deepspeed(value: Any, file: File) -> Values:
    if not value:
        return {}
    section = _section(value)
    if section is None:
        offloads = "offload" in str(value)  # files of axolotl's are named after what is in them
    else:
        places = [section.get(name) or {} for name in ("offload_optimizer", "offload_param")]
        offloads = any(isinstance(place, dict) and place.get("device", "none") != "none" for place in places)
    return (_offloaded(file) if offloads else {}) | sharded()


def _section(value: Any) -> Mapping[str, Any] | None:
    """What DeepSpeed's own file says of places, where it is on this machine."""
    if not isinstance(value, dict):
        try:
            value = json.loads(Path(str(value)).read_bytes())
        except (OSError, ValueError):
            return None
    section = value.get("zero_optimization", value) if isinstance(value, dict) else {}
    return section if isinstance(section, dict) else {}


def _alone(value: Any, file: File) -> Values:
    if isinstance(value, bool) or value not in (0, 1):
        raise Unsupported(ALONE)
    return {}


def _shards(value: Any, file: File) -> Values:
    """dp_shard_size: as many processes as hold a part each, which are all that there are."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise Unsupported("a whole number")
    if value > 1 and file.value("dp_replicate_size", 1) > 1:
        raise Unsupported("dp_shard_size or dp_replicate_size, not both")
    if value > 1 and processes() not in (1, value):
        raise Unsupported(f"dp_shard_size: {processes()}, as torchrun has started so many processes")
    return sharded() if value > 1 else {}


def _replicas(value: Any, file: File) -> Values:
    if isinstance(value, bool) or not isinstance(value, int):
        raise Unsupported("a whole number")
    return {}


FUNCTIONS: Mapping[str, Callable[[Any, File], Values]] = {
    "gradient_checkpointing": _checkpointing, "activation_checkpointing": _checkpointing, "activation_offloading": _activations,
    "fsdp": _fsdp, "fsdp_config": _fsdp_config, "fsdp_version": _fsdp_version, "deepspeed": _deepspeed,
    **dict.fromkeys(("sequence_parallel_degree", "context_parallel_size", "tensor_parallel_size", "expert_parallel_size"), _alone),
    "dp_shard_size": _shards, "dp_replicate_size": _replicas,
}  # fmt: skip
