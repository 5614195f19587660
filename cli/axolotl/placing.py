"""Where processes, weights and activations are: keys of axolotl's files as options. Imports no torch."""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from treetune.cli.axolotl import keys
from treetune.cli.axolotl.file import File, Unsupported, Values, write
from treetune.core import registry
from treetune.core.data import yamlvalues

ON_DEVICE = "a run without offload; optim_args: {paged: true} keeps moments in the memory of the host, activation_offloading activations"


def processes() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def _checkpointing(value: Any, file: File) -> Values:
    if value == "offload_disk":
        return {"gradient_checkpointing": write("full"), "activation_offloading": write("disk")}
    return {"gradient_checkpointing": write("full" if value == "unsloth" else value)}


def _activations(value: Any, file: File) -> Values:
    return {"activation_offloading": write("cpu" if value in ("legacy", "hidden_states") else value)}


def _offloaded(file: File, place: str = "cpu") -> Values:
    """Weights in the memory of the host: those that are frozen. Errors: Unsupported where all weights train."""
    if file.value("adapter") is None or "layer_offloading" not in file.options:
        raise Unsupported(ON_DEVICE)
    return {"layer_offloading": write(place)}


def _paged(file: File) -> Values:
    """Moments in the memory of the host, by the optimiser. Errors: Unsupported of one that keeps none there."""
    name = str(file.value("optimizer", "adamw"))
    entry = registry.OPTIMIZERS.get(keys.OPTIMIZERS.get(name, registry.OPTIMIZER_ALIASES.get(name, name)))
    if entry is not None and entry.bound.get("paged"):
        return {}
    if entry is None or "paged" not in entry.takes or "optim_args" not in file.options:
        raise Unsupported(ON_DEVICE)
    return {"optim_args": write(with_pages(optim_args(file.value("optim_args", {})), file))}


def with_pages(args: dict[str, Any], file: File) -> dict[str, Any]:
    """Arguments of the optimiser, and that moments are in the memory of the host where DeepSpeed's section says so."""
    section = file.value("deepspeed")
    return args | {"paged": True} if section and _offloads(section)[0] == "cpu" else args


def optim_args(value: Any) -> dict[str, Any]:
    """Arguments of an optimiser: a mapping, or NAME=VALUE texts between commas. Numbers may be texts: YAML reads 1e-6 as one."""
    if isinstance(value, str):
        value = dict(pair.strip().split("=", 1) for pair in value.split(",") if "=" in pair)
    return numbers(value)


def numbers(value: Any) -> Any:
    """A mapping whose texts that write numbers are numbers."""
    if not isinstance(value, dict):
        return value
    read = {name: yamlvalues.numeral(item) if isinstance(item, str) else None for name, item in value.items()}
    return {name: item if read[name] is None else read[name] for name, item in value.items()}


def _fsdp(value: Any, file: File) -> Values:
    words = value if isinstance(value, list) else str(value).split()
    return (_offloaded(file) if "offload" in words else {}) | placed(file)


def _fsdp_config(value: Any, file: File) -> Values:
    if not isinstance(value, dict):
        raise Unsupported("a mapping")
    bare = _bare(value)
    if str(bare.get("sharding_strategy", "FULL_SHARD")).upper() not in STRATEGIES:
        raise Unsupported("sharding_strategy: FULL_SHARD")
    out = (_offloaded(file) if _is_on(bare.get("offload_params")) else {}) | placed(file)
    if _is_on(bare.get("activation_checkpointing")) and not file.value("gradient_checkpointing"):
        out["gradient_checkpointing"] = write("full")
    return out


def _bare(section: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of fsdp_config without the prefix that older files give them."""
    return {name.removeprefix("fsdp_"): item for name, item in section.items()}


def _is_on(value: Any) -> bool:
    return bool(value) and str(value).lower() != "false"


def _deepspeed(value: Any, file: File) -> Values:
    if not value:
        return {}
    moments, weights = _offloads(value)
    if moments not in ("none", "cpu") or weights not in PLACES:
        raise Unsupported("offload_optimizer with device cpu, offload_param with device cpu or nvme")
    return (_paged(file) if moments == "cpu" else {}) | (_offloaded(file, PLACES[weights]) if weights != "none" else {}) | placed(file)


def _offloads(value: Any) -> tuple[str, str]:
    """The devices that DeepSpeed's own file, or its name, says of moments and of weights."""
    section = _section(value)
    if section is None:  # files of axolotl's are named after what is in them
        named = re.search(r"offload_?(\w*)", str(value))
        return ("none" if named is None or named[1].startswith("param") else "cpu", "none" if named is None else "cpu")
    places = [section.get(name) for name in ("offload_optimizer", "offload_param")]
    moments, weights = (str(place.get("device", "none")) if isinstance(place, dict) else "none" for place in places)
    return moments, weights


def _section(value: Any) -> Mapping[str, Any] | None:
    """What DeepSpeed's own file says of places, where it is on this machine."""
    if not isinstance(value, dict):
        try:
            value = json.loads(Path(str(value)).read_bytes())
        except (OSError, ValueError):
            return None
    section = value.get("zero_optimization", value) if isinstance(value, dict) else {}
    return section if isinstance(section, dict) else {}


class Split(NamedTuple):
    """What is split among ranks, as of --sharding; hybrid: among those of one machine."""

    sharding: str
    hybrid: bool = False


# Strategies of FSDP by their names and numbers.
STRATEGIES: Mapping[str, Split] = {
    "FULL_SHARD": Split("full"), "1": Split("full"), "SHARD_GRAD_OP": Split("gradients"), "2": Split("gradients"),
    "NO_SHARD": Split("none"), "3": Split("none"), "HYBRID_SHARD": Split("full", True), "4": Split("full", True),
    "HYBRID_SHARD_ZERO2": Split("gradients", True), "_HYBRID_SHARD_ZERO2": Split("gradients", True), "5": Split("gradients", True),
}  # fmt: skip
STAGES = ("none", "moments", "gradients", "full")  # of ZeRO
PLACES = {"none": "none", "cpu": "cpu", "nvme": "disk"}
SIZES = {"data": "dp_shard_size", "replicate": "dp_replicate_size", "tensor": "tensor_parallel_size", "context": "context_parallel_size"}


def placed(file: File) -> Values:
    """What all keys of a file together say of several processes: what is split, and the sizes of their axes. Nothing in one process."""
    if processes() == 1:
        return {}
    sizes = {axis: _number(file.value(key)) for axis, key in SIZES.items()}
    sizes["context"] = max(sizes["context"], _number(file.value("sequence_parallel_degree")))
    split = _split(file)
    if split is None:
        split = Split("full" if sizes["data"] > 1 else "none")
    if split.hybrid and sizes["data"] == 1 and (own := int(os.environ.get("LOCAL_WORLD_SIZE", processes()))) > 1:
        sizes["data"] = own
    if split.sharding == "none":
        sizes["replicate"] = 1  # data parallel without parts is what `data` is, too
    several = [f"{axis}={size}" for axis, size in sizes.items() if size > 1]
    shard = {} if not several or several == [f"data={processes()}"] else {"shard": write(several)}
    return {"sharding": write(split.sharding)} | shard


def _number(value: Any) -> int:
    """A size; 1 for what the key itself is refused for."""
    return value if isinstance(value, int) and value > 0 else 1


def _split(file: File) -> Split | None:
    """What the sections of FSDP and DeepSpeed say; None without any."""
    if deepspeed := file.value("deepspeed"):
        section, named = _section(deepspeed), re.search(r"zero[_-]?([0-3])", str(deepspeed).lower())
        stage = (section or {}).get("stage", named[1] if named else 3 if section is None else 0)
        return Split(STAGES[int(stage)] if str(stage) in "0123" else "full")
    words, config = file.value("fsdp") or [], file.value("fsdp_config") or {}
    words = words if isinstance(words, list) else str(words).split()
    bare = _bare(config) if isinstance(config, dict) else {}
    strategy = bare.get("sharding_strategy") or next((word for word in words if str(word).upper() in STRATEGIES), None)
    if not words and not config and not file.value("fsdp_version"):
        return None
    split = STRATEGIES.get(str(strategy).upper(), Split("full"))
    # Weights that stay whole from one pass to the other are what each rank needs the room for.
    stays = str(bare.get("reshard_after_forward", True)).lower() == "false"
    return split._replace(sharding="gradients") if stays and split.sharding == "full" else split


def _fsdp_version(value: Any, file: File) -> Values:
    return placed(file)


def _size(value: Any, file: File) -> Values:
    if isinstance(value, bool) or not isinstance(value, int):
        raise Unsupported("a whole number")
    return placed(file) if value > 1 else {}


def _experts(value: Any, file: File) -> Values:
    if isinstance(value, bool) or value not in (0, 1):
        raise Unsupported("tensor_parallel_size, along which experts are split, too")
    return {}


def _timeout(value: Any, file: File) -> Values:
    return {"rank_timeout": write(value)} if processes() > 1 else {}


def _workers(value: Any, file: File) -> Values:
    if isinstance(value, bool) or not isinstance(value, int):
        raise Unsupported("a whole number")
    return {"nproc": write(value)}


FUNCTIONS: Mapping[str, Callable[[Any, File], Values]] = {
    "gradient_checkpointing": _checkpointing, "activation_checkpointing": _checkpointing, "activation_offloading": _activations,
    "fsdp": _fsdp, "fsdp_config": _fsdp_config, "fsdp_version": _fsdp_version, "deepspeed": _deepspeed,
    "ddp_timeout": _timeout, "ray_num_workers": _workers, "expert_parallel_size": _experts,
    **dict.fromkeys(("sequence_parallel_degree", *SIZES.values()), _size),
}  # fmt: skip
