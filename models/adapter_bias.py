"""Biases that train beside an adapter: `bias` of PEFT's config, none, all, or lora_only for those of adapted modules.

PEFT saves the bias of an adapted module below its adapter, `q_proj.base_layer.bias`, and any other under its own key.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from treetune.models import adapter_parameters, hf

NONE, ALL, OWN = "none", "all", "lora_only"
ENDING, BELOW = ".bias", ".base_layer.bias"


def paths(family: str, leaves: Mapping[str, Any], adapted: Sequence[str], kind: str) -> list[str]:
    """Paths of the biases of this kind among the leaves, which are `Param`s."""
    if kind == NONE:
        return []
    owners = {_module(family, path) for path in adapted}
    biases = [path for path, leaf in leaves.items() if leaf.trains and hf.hf_key(family, path).endswith(ENDING)]
    return [path for path in biases if kind == ALL or _module(family, path) in owners]


def names(family: str, biases: Sequence[str], adapted: Sequence[str]) -> dict[str, str]:
    """{path: PEFT's key of its bias, without the prefix}."""
    owners = {_module(family, path) for path in adapted}
    keys = {path: hf.hf_key(family, path) for path in biases}
    return {path: key.removesuffix(ENDING) + BELOW if _module(family, path) in owners else key for path, key in keys.items()}


def alone(family: str, whole: Sequence[str], kind: str) -> list[str]:
    """Those of the leaves trained whole that are biases without their modules."""
    keys = {path: hf.hf_key(family, path) for path in whole}
    modules = {key.removesuffix(".weight") for key in keys.values() if key.endswith(".weight")}
    return [path for path, key in keys.items() if kind != NONE and key.endswith(ENDING) and key.removesuffix(ENDING) not in modules]


def check(family: str, adapted: Sequence[str], kind: str) -> None:
    """Raise ValueError for a kind that goes with no adapter on these leaves."""
    if kind != NONE and (odd := next((path for path in adapted if adapter_parameters.is_parameter(path)), None)):
        raise ValueError(f"lora_bias {kind} and an adapter on {odd}: biases beside adapters on experts and routers are not computed")


def _module(family: str, path: str) -> str:
    return hf.hf_key(family, path).rpartition(".")[0]
