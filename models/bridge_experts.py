"""Experts of bridged models: transformers' interface over our grouped products, in which no row depends on the others of its expert.

T tokens, k experts of each, E experts, D features, r rank. transformers holds stacks [E, O, I], or [E, I, O] where a class says so.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from treetune.core.param import Params
from treetune.ops import grouped_linear, routing

NAME = "treetune"
ADAPTED = "_treetune_adapted"  # the attribute of a module of experts that holds its `Adapted`


class Adapted(NamedTuple):
    """Low-rank pairs {"A": [E, r, I], "B": [E, O, r]} by the name of their stack, and their scale."""

    pairs: Params
    scale: float = 1.0


def stacks(module: nn.Module) -> tuple[str, ...]:
    """The names of the stacks of a module of experts that may have an adapter; none where inputs come before outputs."""
    if not hasattr(module, "has_gate") or getattr(module, "is_transposed", True):
        return ()
    names = (_up(module), "down_proj")
    return names if all(module._parameters.get(name) is not None for name in names) else ()


def _up(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


@functools.cache
def register() -> None:
    """Make the experts known to transformers."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(NAME, forward)


def forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls: hidden states [T, D], experts and weights [T, k] -> [T, D]."""
    # An index beyond the experts stands for none.
    weights = torch.where(top_k_index < module.num_experts, top_k_weights, 0)
    way = routing.route(top_k_index.clamp(max=module.num_experts - 1), module.num_experts)
    rows = routing.dispatch(hidden_states, way, top_k_index.shape[-1])
    rows = _projected(module, _up(module), rows, way.ends)
    rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    rows = _projected(module, "down_proj", rows, way.ends)
    if getattr(module, "has_post_expert_norm", False):
        rows = module.post_expert_norm(rows)
    return routing.combine(rows, weights, way).to(hidden_states.dtype)


def _projected(module: Any, name: str, rows: Tensor, ends: Tensor) -> Tensor:
    weight, adapted = getattr(module, name), getattr(module, ADAPTED, Adapted({}))
    weight = weight.transpose(1, 2) if module.is_transposed else weight
    y = grouped_linear.grouped_linear(rows, weight, ends, adapted.pairs.get(name), scale=adapted.scale)
    return grouped_linear.grouped_bias(y, getattr(module, f"{name}_bias"), ends) if module.has_bias else y
