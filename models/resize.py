"""Rows of the embedding and of the head for a vocabulary that has grown.

V rows before, R rows after, D hidden. Every new row is the mean of the V old ones, of the embedding and of the head each: a new
token then takes at most the average token's share of the next-token probability, and the others hardly change. Nothing is drawn
at random, so a base model that is resized again, for loading or resuming, has the same rows bit for bit.
Source: Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021 (transformers draws around the same mean,
with a covariance scaled by 1e-9).
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from treetune.core import partition
from treetune.core.param import Params
from treetune.models import Model

LEAVES = ("embed_tokens", "lm_head")  # what has a row per token
_ROWS = 4096  # rows summed at a time in float64


def target(rows: int, size: int, multiple: int | None = None) -> int:
    """Rows that hold `size` tokens: never fewer than `rows`, rounded up to `multiple`. Raises ValueError for a multiple below 1."""
    if multiple is not None and multiple < 1:
        raise ValueError(f"the vocabulary is to have a multiple of {multiple} rows; expected a whole number from 1 up")
    needed = max(rows, size)
    return needed if multiple is None else -(-needed // multiple) * multiple


def resize(model: Model, size: int, *, multiple: int | None = None) -> Model:
    """The model with room for `size` tokens: embedding and head [R, D] with R = `target`, `cfg.vocab_size` = R.

    A tied model stays tied. A model that has the rows already, as one with a padded vocabulary does, comes back as it is.
    """
    rows = target(model.cfg.vocab_size, size, multiple)
    if rows == model.cfg.vocab_size:
        return model
    return model._replace(cfg=replace(model.cfg, vocab_size=rows), params=grown(model.params, rows))


def cut(model: Model, rows: int) -> Model:
    """The model with only the first `rows` of its vocabulary, as views: what an adapter of a smaller vocabulary was trained on."""
    if rows >= model.cfg.vocab_size:
        return model
    leaves = {name: partition.changed(lambda leaf: leaf[:rows], model.params[name]) for name in LEAVES if name in model.params}
    return model._replace(cfg=replace(model.cfg, vocab_size=rows), params=model.params | leaves)


def grown(params: Params, rows: int) -> Params:
    """A tree whose embedding and head, where it has them, have `rows` rows."""
    return params | {name: partition.changed(partial(_grown, rows=rows), params[name]) for name in LEAVES if name in params}


def _grown(leaf: Tensor, rows: int) -> Tensor:
    """[V, D] -> [R, D]."""
    new = rows - leaf.shape[0]
    return leaf if new <= 0 else torch.cat([leaf, _mean(leaf).expand(new, -1)])


def _mean(leaf: Tensor) -> Tensor:
    """[V, D] -> [1, D], summed in float64 so that the device does not show in the rounded mean."""
    total = torch.zeros_like(leaf[:1], dtype=torch.float64)
    for part in leaf.detach().split(_ROWS):
        total = total + part.double().sum(0, keepdim=True)
    return (total / leaf.shape[0]).to(leaf.dtype)
