"""The frozen network whose features compare texts: hidden states of the model that a run starts from, pooled over sequences.

N rows of B sequences in a stream, H hidden size, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from treetune.core import partition, quant, shard, strided, tree
from treetune.core.param import Params
from treetune.core.state import Batch, TrainState
from treetune.models import Model, decoder_attention, features, together
from treetune.models.dense import Config
from treetune.models.policy import Policy, weights
from treetune.ops.attention import Plan

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

COPY = "features"  # the frozen tree that is the network where the model itself trains


class SequenceRows(NamedTuple):
    """Where sequences stand in a stream: rows at [N] of each in turn, seq [N], lens [B]; the first prompt_lens [B] rows are its prompt."""

    at: Tensor
    seq: Tensor
    lens: Tensor
    prompt_lens: Tensor


class Pooled(Protocol):
    """Features [B, D] of sequences in a stream, float32 at least."""

    def __call__(self, frozen: Params, batch: Batch, plan: Plan, rows: SequenceRows, /) -> Tensor:
        """[B, D]."""
        ...


class FeatureNetwork(NamedTuple):
    """phi(frozen, batch, plan, rows) -> features [B, D], and the policy with the frozen tree that it needs.

    computed(frozen): the model that a pass computes, as it is placed, up to its deepest layer.
    """

    phi: Pooled
    policy: Policy
    computed: Callable[[Params], Model]


class Recipe(NamedTuple):
    """layers: of which hidden states are taken. norm: L times [N, H] -> [N, D]. pool: [N, D], seq, lens and prompt_lens -> [B, D]."""

    layers: Sequence[int]
    norm: Callable[[list[Tensor]], Tensor]
    pool: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def sequence_rows(lens: Tensor, at: Tensor, prompt_lens: Tensor | None = None) -> SequenceRows:
    """Sequences of these lengths [B], whose rows are at [N]; without prompt_lens nothing of them is a prompt."""
    seq = torch.arange(lens.shape[0], device=lens.device).repeat_interleave(lens, output_size=at.shape[0])
    return SequenceRows(at, seq, lens, torch.zeros_like(lens) if prompt_lens is None else prompt_lens)


def build(policy: Policy, recipe: Recipe, *, on_cpu: bool = False, hosts: DeviceMesh | None = None) -> FeatureNetwork:
    """The network that a run starts from, without its adapter: the frozen base itself under LoRA, else a frozen copy.

    on_cpu: a copy in the memory of the host, which computes there, too. hosts: the ranks of the run as a mesh of CPUs; of leaves in
    parts each host has its rank's.
    """
    family, cfg, depth = policy.family, policy.cfg, max(recipe.layers, default=0)
    if on_cpu:
        alone = replace(cfg, context=None) if getattr(cfg, "context", None) else cfg  # ranks exchange what is on their devices
        copy = _host_copy(_base(policy), cfg, hosts)
        model = Model(family, alone, copy | {"layers": copy["layers"][:depth]})
        return FeatureNetwork(lambda frozen, *stream: _pool(recipe, family, alone, copy, *stream), policy, lambda frozen: model)
    name = COPY if policy.lora is None else "model"
    if policy.lora is None:
        policy = policy._replace(frozen=policy.frozen | {COPY: _copy(_base(policy), cfg)})

    def computed(frozen: Params) -> Model:
        return Model(family, cfg, frozen[name] | {"layers": frozen[name]["layers"][:depth]})

    return FeatureNetwork(lambda frozen, *stream: _pool(recipe, family, cfg, frozen[name], *stream), policy, computed)


def of_prompts(network: FeatureNetwork, frozen: Params) -> Callable[[Batch, Plan, Tensor, Tensor, Tensor], Tensor]:
    """The network of a frozen tree, as (batch, plan, lens, at, prompt_lens) -> features: a collective where ranks have parts of it."""
    return lambda batch, plan, lens, at, prompt_lens: network.phi(frozen, batch, plan, sequence_rows(lens, at, prompt_lens))


def most(network: FeatureNetwork, frozen: Params, passes: int) -> int:
    """Passes of the rank that makes most of them, of those that compute the network together: a collective."""
    return together.most(network.computed(frozen), passes)


def idle(network: FeatureNetwork, frozen: Params) -> None:
    """A pass of which nothing is used."""
    model = network.computed(frozen)
    together.idle(model, model.params, None)


def of_blocks(phi: Pooled, n: int, state: TrainState, grown: Batch, plan: Plan, layout: strided.Layout, /) -> tuple[Tensor, Tensor]:
    """Features of n rollouts from each anchor [M, n, D] and of the true blocks [M, D]; every block is read by itself."""
    at, device = torch.cat([layout.generated, layout.truth]), grown["tokens"].device  # [R + M, G]
    lens = torch.full((at.shape[0],), at.shape[1], device=device)
    vectors = phi(state.frozen, grown, plan, sequence_rows(lens, at.flatten().to(device)))
    own, true = vectors.split([layout.generated.shape[0], layout.truth.shape[0]])
    return own.view(true.shape[0], n, own.shape[1]), true


def _base(policy: Policy) -> Params:
    return weights(policy.params, policy.frozen) if policy.lora is None else policy.frozen["model"]


def _copy(params: Params, cfg: Config) -> Params:
    def one(leaf: Any) -> Any:
        return leaf.moved(torch.clone) if quant.quantised(leaf) else leaf.detach().to(cfg.dtype, copy=True)

    return tree.map(one, params)


def _host_copy(params: Params, cfg: Config, hosts: DeviceMesh | None) -> Params:
    """A copy in the memory of the host: of each leaf in parts that of its rank."""

    def one(leaf: Any) -> Any:
        leaf = shard.full(leaf) if hosts is None else leaf
        return leaf.moved(partial(_on_host, hosts, None)) if quant.quantised(leaf) else _on_host(hosts, cfg.dtype, leaf)

    return tree.map(one, params)


def _on_host(hosts: DeviceMesh | None, dtype: torch.dtype | None, part: Tensor) -> Tensor:
    """A copy of a tensor there, in a dtype or its own: of one that is split this rank's part."""

    def put(own: Tensor) -> Tensor:
        return own.detach().to("cpu", dtype, copy=True)

    return put(part) if hosts is None or not shard.distributed(part) else partition.placed_on(hosts, put, part)


def _pool(recipe: Recipe, family: str, cfg: Config, weights: Params, batch: Batch, plan: Plan, rows: SequenceRows) -> Tensor:
    device, network_device = rows.at.device, weights["embed_tokens"].device
    if network_device != device:
        batch = {key: value.to(network_device) for key, value in batch.items()}
        # The plan's masks live where the attention runs, and are made from a batch on the host.
        plan = decoder_attention.plan({key: value.cpu() for key, value in batch.items()}, cfg, device=network_device)
    hidden = features.hidden(family, cfg, weights, batch, plan, rows.at.to(network_device), layers=recipe.layers)
    return recipe.pool(recipe.norm(hidden).to(device), rows.seq, rows.lens, rows.prompt_lens)
