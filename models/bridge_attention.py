"""Attention of bridged models: transformers' interface over a plan, or over a sampler's cache.

T tokens, H heads, K key/value heads, d width of queries and keys, e width of values. transformers hands over [1, H, T, d].
transformers also asks for a mask of each kind. What it gets back says which kind that was, and comes to the attention of each layer by the
model's own ways: a mask of another kind, or one that the model has changed on the way, is refused, so no layer sees what it should not.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from treetune.ops import attention

NAME = "treetune"
CALL = "_treetune_call"  # attribute of a bound module: how its attention is computed in this forward pass
# Arguments of transformers' attention functions without an effect here: the plan says the same, or dropout that evaluation has not.
SILENT = frozenset({
    "cache", "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "dropout", "max_length_k", "max_length_q", "output_attentions",
    "output_hidden_states", "output_router_logits", "past_key_value", "past_key_values", "position_embeddings", "position_ids",
    "return_dict", "seq_idx", "sliding_window", "use_cache",
})  # fmt: skip


class Rule(NamedTuple):
    """Which keys a mask of transformers lets be seen: all before, or those of a window in tokens; `other` names what it asks besides."""

    window: int | None = None
    other: str = ""


class Heads(NamedTuple):
    """One call of attention: q [T, H, d], k [T, K, d], v [T, K, e], and what transformers asks of it."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


class OwnMask(ValueError):
    """A model makes a mask of its own."""


Attend = Callable[[Heads], Tensor]  # -> [T, H, e]


@functools.cache
def register() -> None:
    """Make attention and masks known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)


def mask(*_: Any, mask_function: Callable, device: torch.device | str = "cpu", **__: Any) -> Tensor:
    """What stands for a mask: of four dimensions, as models expect, and marked with its rule."""
    marked = torch.zeros(1, 1, 1, 1, device=device)
    marked.treetune_rule = rule(mask_function)  # pyright: ignore[reportAttributeAccessIssue]
    return marked


def rule(function: Callable) -> Rule:
    """The rule of one of transformers' mask functions: they are compositions, whose parts their closures hold."""
    name = getattr(function, "__qualname__", repr(function)).split(".")[0]
    inside = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
    if name in ("causal_mask_function", "packed_sequence_mask_function"):
        return Rule()  # documents are told apart by the plan
    if name == "sliding_window_overlay":
        return Rule(inside["sliding_window"])
    if name == "remap_positions_for_packed_sequence":
        return rule(inside["mask_function"])
    if name == "and_masks":
        parts = [rule(part) for part in inside["mask_functions"]]
        windows = [part.window for part in parts if part.window is not None]
        return Rule(min(windows, default=None), next((part.other for part in parts if part.other), ""))
    return Rule(other=name)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: [1, H, T, d] -> [1, T, H, e]. Errors: ValueError for what is not computed, naming it."""
    compute: Attend | None = getattr(module, CALL, None)
    if compute is None:
        raise ValueError(f"{type(module).__name__} runs outside a forward pass of treetune")
    q, k, v = (side[0].transpose(0, 1) for side in (query, key, value))
    window = _window(module, attention_mask)
    softcap, sinks = options.pop("softcap", None), options.pop("s_aux", None)
    if options.pop("is_causal", None) is False:
        raise ValueError(f"{type(module).__name__} attends to later tokens")
    if odd := [name for name, option in options.items() if option is not None and name not in SILENT]:
        raise ValueError(f"{type(module).__name__} asks its attention for {odd[0]}, which is not computed over a packed stream")
    if query.shape[0] != 1 or k.shape[0] != q.shape[0]:
        raise ValueError(f"{type(module).__name__} has {k.shape[0]} keys for {q.shape[0]} tokens")
    scale = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return compute(Heads(q, k, v, scale, window, softcap, sinks))[None], None


def _window(module: nn.Module, attention_mask: Tensor | None) -> int | None:
    marked = getattr(attention_mask, "treetune_rule", None)
    if marked is None:
        if attention_mask is None:
            raise ValueError(f"{type(module).__name__} gives its attention no mask")
        raise OwnMask(f"{type(module).__name__} gives its attention a mask that it makes itself")
    if marked.other:
        raise ValueError(f"{type(module).__name__} has a mask of the kind {marked.other}")
    return marked.window


def over_plan(heads: Heads, plan: attention.Plan) -> Tensor:
    """Attention of a packed stream: [T, H, e]."""
    return attention.attention(heads.q, heads.k, heads.v, plan, scale=heads.scale)
