"""Adapters on experts and routers, which are no linear layers: PEFT adapts them as parameters by name (`target_parameters`).

E experts, r rank, I inputs, O outputs. A stack of experts has A [E, r, I] and B [E, O, r]; PEFT's file has [E r, I], expert by expert, and
[O, r E], the numbers of all experts side by side. Two adapted parameters of one module are wrapped one in the other, the later one outside.
"""

import functools
from collections.abc import Callable, Sequence

from treetune.core import lora
from treetune.core.param import Params
from treetune.models import hf
from treetune.models.adapter_config import AdapterConfig

# Of a layer, in the order of transformers' modules. Those of experts may stand inside other modules: `mlp.experts.gate_up_proj`.
NAMES = ("router", "experts.gate_up_proj", "experts.up_proj", "experts.down_proj")
# Names of modules of transformers 4 that PEFT takes for these parameters in all layers, whatever the names in front of them.
REWRITTEN = {"mixtral": ("gate", "w1", "w2", "w3"), "qwen3_moe": ("gate", "gate_proj", "up_proj", "down_proj")}
# Those of other families, by the conversion that transformers makes of their files and PEFT follows.
CONVERSIONS = {"mixtral": REWRITTEN["mixtral"], "qwen2_moe": REWRITTEN["qwen3_moe"]}
NO_OUT_PROJ = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")  # PEFT refuses an adapter there
STACKS = ("gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias")
INSIDE = ".base_layer"


def is_parameter(path: str) -> bool:
    """Whether PEFT adapts this leaf as a parameter."""
    return _name(path) in NAMES


def _name(path: str) -> str:
    """The name of a leaf in its layer, from its experts on where it has some."""
    parts = path.split(".")[2:]
    return ".".join(parts[parts.index("experts") :] if "experts" in parts else parts)


def rewritten(family: str, name: str) -> bool:
    """Whether PEFT takes this name of a module for a parameter of experts."""
    return name.rpartition(".")[2] in REWRITTEN.get(family, ())


@functools.cache
def takes_none(kind: str) -> tuple[str, ...]:
    """Last names of linear modules on which PEFT puts no adapter in a model of transformers of this `model_type`."""
    from transformers import conversion_mapping

    pattern = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {}).get(kind, "")
    return CONVERSIONS.get(pattern, ()) + (("out_proj",) if kind in NO_OUT_PROJ else ())


def check(family: str, adapted: Sequence[str], *, dropout: float) -> None:
    """Raise ValueError when PEFT cannot hold adapters on these leaves with this dropout."""
    parameters = [path for path in adapted if is_parameter(path)]
    if parameters and dropout:
        raise ValueError(
            f"dropout of adapters must be 0 where {parameters[0]} has one, got {dropout:g}: PEFT holds no dropout on experts and routers"
        )
    modules = [path for path in adapted if not is_parameter(path)]
    if taken := [path for path in modules if rewritten(family, hf.hf_key(family, path).rpartition(".")[0])]:
        raise ValueError(
            f"{taken[0]} takes no adapter: PEFT would read the name of its module as that of experts; leave it out of the targets"
        )


def check_config(config: AdapterConfig, family: str) -> None:
    """Raise ValueError for targets of modules that PEFT would rewrite into parameters of experts."""
    if family not in REWRITTEN:
        return
    if isinstance(config.targets, str):
        raise ValueError(f"{config.source}: target_modules must be a list of names for a {family} model: PEFT rewrites expressions there")
    if taken := [name for name in config.targets if rewritten(family, name)]:
        raise ValueError(
            f"{config.source}: target_modules names {taken[0]}, which PEFT takes for experts or routers of a {family} model; load the "
            "adapter in PEFT and save it again, which names them in target_parameters"
        )


def names(family: str, parameters: Sequence[str], other: Callable[[str], str]) -> Callable[[str], str]:
    """A function of paths: what holds the pair of a leaf in a file that adapts these parameters; `other` names all other leaves."""
    prefix = _prefixes(family, parameters)
    return lambda path: prefix.get(path) or other(path)


def target(family: str, path: str) -> str:
    """What a leaf is called as the target of an adapter: its module in transformers, or the parameter of it."""
    key = hf.hf_key(family, path)
    return key.removesuffix(".weight") if is_parameter(path) or ".experts." in path else key.rpartition(".")[0]


def _prefixes(family: str, paths: Sequence[str]) -> dict[str, str]:
    named, outside = {}, {}
    for path in sorted(paths, key=lambda path: NAMES.index(_name(path)), reverse=True):
        module = hf.hf_key(family, path).rpartition(".")[0]
        named[path] = module + INSIDE * outside.get(module, 0)
        outside[module] = outside.get(module, 0) + 1
    return named


def flat(adapter: Params) -> Params:
    """An adapter tree with pairs of experts as PEFT's files have them."""
    pairs = lora.pairs(adapter).items()
    shaped = {path: (a, b) if a.ndim == 2 else (a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)) for path, (a, b) in pairs}
    return lora.of(shaped, adapter)


def stacked(adapter: Params, sizes: Params) -> Params:
    """The inverse of `flat`, for leaves of the shapes in `sizes` by path."""
    shaped = {}
    for path, (a, b) in lora.pairs(adapter).items():
        count = sizes[path].shape[0] if len(sizes[path].shape) == 3 else None
        shaped[path] = (a, b) if count is None else (a.unflatten(0, (count, -1)), b.unflatten(1, (-1, count)).permute(2, 0, 1).contiguous())
    return lora.of(shaped, adapter)
