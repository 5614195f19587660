"""Modules of a skeleton bound to weights: copies that hold our tensors, so that nothing is swapped in what other threads share.

A copy costs a dictionary per module. A rematerialised layer binds its weights again in the backward pass, where a parameter that was
swapped in would be gone.
T tokens, I inputs, O outputs, r rank.
"""

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from treetune.core import shard
from treetune.models import bridge_experts, bridge_skeleton
from treetune.models.bridge_attention import CALL, Attend
from treetune.models.bridge_experts import ADAPTED, Adapted
from treetune.models.bridge_skeleton import EMBEDDING, HEAD_BIAS, Skeleton
from treetune.ops import lora_linear, noise

Fill = Callable[[nn.Module, nn.Module], None]  # (module, its copy)


class Adapters(NamedTuple):
    """Low-rank pairs by path, of a stack of experts a pair for each; their scale; the rate and the keys [T] of their dropout, None where
    there is none.
    """

    pairs: Mapping[str, dict[str, Tensor]]
    scale: float = 1.0
    rate: float = 0.0
    key: Tensor | None = None


class Binding(NamedTuple):
    """What fills the modules of a skeleton: whole tensors by path, adapters, noise [T, D] on the embeddings, attention."""

    skeleton: Skeleton
    tensors: Mapping[str, Tensor]
    adapters: Adapters
    attend: Attend | None = None
    noise: Tensor | None = None


class Reader(nn.Module):
    """What stands in place of an output matrix: it keeps its input [1, T, D], and gives a column of it."""

    states: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[1, T, D] -> [1, T, 1]."""
        self.states = x
        return x[..., :1]


def copied(module: nn.Module, fill: Fill, copies: dict[int, Any] | None = None) -> Any:
    """A copy of a module and of all inside it; one that stands in two places is copied once. The copy shares all other attributes."""
    copies = {} if copies is None else copies
    if id(module) in copies:
        return copies[id(module)]
    copy = copies[id(module)] = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy.__dict__["_modules"] = {name: None if child is None else copied(child, fill, copies) for name, child in module._modules.items()}
    fill(module, copy)
    return copy


def bound(module: nn.Module, binding: Binding, copies: dict[int, Any] | None = None) -> Any:
    """A copy of a module of the skeleton that computes with the tensors of a binding, around `copies` that there are of modules inside."""
    return copied(module, partial(_fill, binding), dict(copies or {}))


def _fill(binding: Binding, module: nn.Module, copy: nn.Module) -> None:
    paths, tensors = binding.skeleton.paths, binding.tensors
    inside = copy.__dict__
    # A model that scores has no bias of the output matrix, which some models hold beside that matrix as well.
    absent = {id(binding.skeleton.head.bias)} if HEAD_BIAS not in tensors else set()
    held = {name: None if id(leaf) in absent else leaf for name, leaf in module._parameters.items()}
    inside["_parameters"] = {name: leaf if leaf is None else tensors[paths[id(leaf)]] for name, leaf in held.items()}
    # What a file holds of the buffers takes part in choices only, as the bias of a router does: no gradient reaches it.
    inside["_buffers"] = {name: tensors[paths[id(leaf)]].detach() if id(leaf) in paths else leaf for name, leaf in module._buffers.items()}
    if "longrope" in str(getattr(module, "rope_type", "")):  # which writes its frequencies in place: other threads read these
        inside["_buffers"] = {name: leaf if leaf is None else leaf.clone() for name, leaf in inside["_buffers"].items()}
    inside[CALL] = binding.attend
    # What stands in `forward` does not hold the copy: a cycle would keep a layer's whole weights until the collector of cycles runs.
    if names := bridge_experts.stacks(module):
        inside[ADAPTED] = _on_experts({name: paths[id(module._parameters[name])] for name in names}, binding)
    if module is binding.skeleton.embedding:
        inside["forward"] = partial(_embed, weakref.ref(copy), binding)
    elif bridge_skeleton.is_linear(module):
        inside["forward"] = partial(_linear, inside["_parameters"], binding.skeleton.paths[id(module.weight)], binding)


def _on_experts(stacks: Mapping[str, str], binding: Binding) -> Adapted:
    """The adapters of the stacks of experts, whose paths are given by name."""
    adapters = binding.adapters
    pairs = {name: adapters.pairs[path] for name, path in stacks.items() if path in adapters.pairs}
    if pairs and adapters.key is not None:
        raise ValueError(f"the adapter has dropout {adapters.rate} and sits on experts, where dropout is not computed")
    return Adapted({name: shard.gather_all(pair) for name, pair in pairs.items()}, adapters.scale)


def _linear(tensors: Mapping[str, Tensor | None], path: str, binding: Binding, x: Tensor) -> Tensor:
    """x [..., I] -> [..., O], with the adapter of this path."""
    rows, adapters = x.reshape(-1, x.shape[-1]), binding.adapters
    pair, u = adapters.pairs.get(path), None
    if pair is not None:
        pair = shard.gather_all(pair)
        if adapters.key is not None:
            u = _dropped(rows, path, binding)
    weight, bias = tensors["weight"], tensors.get("bias")
    assert weight is not None
    y = lora_linear.lora_linears(rows, [weight], [pair], scale=adapters.scale, u=u)[0]
    return (y if bias is None else y + bias).view(*x.shape[:-1], -1)


def _dropped(rows: Tensor, path: str, binding: Binding) -> Tensor:
    key = binding.adapters.key
    assert key is not None
    if rows.shape[0] != key.shape[0]:
        raise ValueError(f"{path} sees {rows.shape[0]} rows of {key.shape[0]} tokens: dropout of its adapter is not computed, set it to 0")
    return noise.dropout(rows, key, rate=binding.adapters.rate, stream=binding.skeleton.numbers[path])


def _embed(copy: Callable[[], Any], binding: Binding, tokens: Tensor) -> Tensor:
    """Embeddings [1, T, D], with an adapter in the scale that the model gives its embeddings, and with noise."""
    module = copy()
    x, pair = type(module).forward(module, tokens), binding.adapters.pairs.get(EMBEDDING)
    if pair is not None:
        pair = shard.gather_all(pair, x.dtype)
        low = F.embedding(tokens, pair["A"].T) @ pair["B"].T
        x = x + binding.adapters.scale * getattr(module, "embed_scale", 1.0) * low
    return x if binding.noise is None else x + binding.noise
