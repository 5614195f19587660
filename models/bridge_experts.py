"""Experts of bridged models: transformers' interface over our grouped products, in which no row depends on the others of its expert.

T tokens, k experts of each, E experts, D features. transformers holds stacks [E, O, I], or [E, I, O] where a class says so.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from treetune.ops import grouped_linear, routing

NAME = "treetune"


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
    rows = _projected(module, "gate_up_proj" if module.has_gate else "up_proj", rows, way.ends)
    rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    rows = _projected(module, "down_proj", rows, way.ends)
    if getattr(module, "has_post_expert_norm", False):
        rows = module.post_expert_norm(rows)
    return routing.combine(rows, weights, way).to(hidden_states.dtype)


def _projected(module: Any, name: str, rows: Tensor, ends: Tensor) -> Tensor:
    weight = getattr(module, name)
    y = grouped_linear.grouped_linear(rows, weight.transpose(1, 2) if module.is_transposed else weight, ends)
    return grouped_linear.grouped_bias(y, getattr(module, f"{name}_bias"), ends) if module.has_bias else y
