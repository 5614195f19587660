"""Ranks that run a model of which each has parts: layers are gathered inside the forward pass, so that all ranks make as many passes.

A rank with nothing more to compute makes passes over one token until no other has anything left.
"""

from collections.abc import Callable

import torch

from treetune.core import gathers, shard, tree
from treetune.core.lora import Lora
from treetune.core.param import Params
from treetune.models import MODELS, Model, decoder_attention, dense, families


def most(model: Model, passes: int) -> int:
    """Passes over streams of the rank that makes most of them, of those that compute the model together: a collective."""
    return gathers.most(tree.leaves(model.params), passes)


def agreed(model: Model) -> Callable[[bool], bool]:
    """goes_on -> whether any rank goes on, of those that compute the model together: a collective; itself where one computes it alone."""
    if not families.in_parts(model):
        return lambda goes_on: goes_on
    device = model.params["embed_tokens"].device
    return lambda goes_on: shard.any_flag(goes_on, device)


@torch.no_grad()
def idle(model: Model, weights: Params, lora: Lora | None) -> None:
    """A pass over one token, of which nothing is used."""
    device = weights["embed_tokens"].device
    batch = dense.single(torch.zeros(1, dtype=torch.int64))
    plan = decoder_attention.plan(batch, model.cfg, device=device)
    batch = {name: value.to(device) for name, value in batch.items()}
    MODELS[model.family].forward(weights, batch, plan, model.cfg, lora=lora)
