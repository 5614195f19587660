"""The frozen network of energy-based fine-tuning, and what its features say of rollouts: pooled vectors, scores, advantages.

N rows of B sequences in a stream; P groups (a prompt, or an anchor of a document) of n rollouts; D features.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treetune.cli import setup
from treetune.cli.methods.ebft import EbftOptions
from treetune.core import tree
from treetune.core.state import Params
from treetune.losses import ebft
from treetune.models import Model, bare, features
from treetune.ops import attention

NORMS = {"per_layer": ebft.per_layer, "joint": ebft.joint, "raw": ebft.raw}
WHITEN = {"features": ebft.whiten_features, "rows": ebft.whiten_rows}
COPY = "features"  # the frozen tree that is the network where the model itself trains


class Rows(NamedTuple):
    """Where sequences stand in a stream: rows at [N] of each in turn, seq [N], lens [B]; the first prompt_lens [B] rows are its prompt."""

    at: Tensor
    seq: Tensor
    lens: Tensor
    prompt_lens: Tensor


class Network(NamedTuple):
    """phi(frozen, batch, plan, rows) -> features [B, D] of sequences in a stream, float32 at least; the run's trees with its own."""

    phi: Callable[[Params, dict, Any, Rows], Tensor]
    trees: setup.Trees


def rows(lens: Tensor, at: Tensor, prompt_lens: Tensor | None = None) -> Rows:
    """Sequences of these lengths [B], whose rows are at [N]; without prompt_lens nothing of them is a prompt."""
    seq = torch.arange(lens.shape[0], device=lens.device).repeat_interleave(lens)
    return Rows(at, seq, lens, torch.zeros_like(lens) if prompt_lens is None else prompt_lens)


def build(options: EbftOptions, model: Model, used: setup.Trees) -> Network:
    """The network that a run starts from, without its adapter: the frozen base itself under LoRA, else a frozen copy."""
    layers = ebft.layers(options.feature_layers, model.cfg.num_layers)
    pooled = partial(_pooled, options, bare(model), layers)
    if options.feature_device == "cpu":
        kept = tree.map(lambda leaf: leaf.detach().to("cpu", model.cfg.dtype, copy=True), model.params)
        return Network(lambda frozen, *stream: pooled(kept, *stream), used)
    if used.lora is not None:
        return Network(lambda frozen, *stream: pooled(frozen["model"], *stream), used)
    own = tree.map(lambda leaf: leaf.detach().to(model.cfg.dtype, copy=True), model.params)
    return Network(lambda frozen, *stream: pooled(frozen[COPY], *stream), used._replace(frozen=used.frozen | {COPY: own}))


def _pooled(options: EbftOptions, model: Model, layers: tuple[int, ...], weights: Params, batch: dict, plan: Any, where: Rows) -> Tensor:
    here, there = where.at.device, tree.leaves(weights)[0].device
    if there != here:
        batch = {key: value.to(there) for key, value in batch.items()}
        cut = {key: value.cpu() for key, value in batch.items()}
        plan = attention.plan(cut, window=model.cfg.window, device=there, dtype=model.cfg.dtype)
    hidden = features.hidden(model.family, model.cfg, weights, batch, plan, where.at.to(there), layers=layers)
    x = NORMS[norm(options)](hidden).to(here)
    pool = getattr(ebft, options.embed_method)
    more = (where.prompt_lens,) if options.embed_method == "completion_mean" else ()
    return pool(x, where.seq, where.lens, *more)


def norm(options: EbftOptions) -> str:
    """How hidden states are scaled at each token."""
    return options.feature_norm or ("per_layer" if options.mode == "strided" else "raw")


def scores(options: EbftOptions, phi: Tensor, y: Tensor) -> ebft.Scores:
    """Rewards of rollouts [P, n, D] against the truth [P, D], whitened or as they are; structured mode compares vectors of length 1."""
    if options.use_whitening:
        phi, y = WHITEN[options.whitening_space](phi, y)
    elif options.mode == "structured":
        phi, y = ebft.unit(phi), ebft.unit(y)
    return ebft.scores(phi, y, alignment_coef=options.alignment_coef, diversity_coef=options.diversity_coef)


def advantages(options: EbftOptions, scored: ebft.Scores) -> Tensor:
    """Advantages [P, n] of the strided mode's estimators; the reward itself for one rollout, which nothing can be compared with."""
    if options.advantage_estimator == "rloo_paired":
        return ebft.rloo_paired(scored, alignment_coef=options.alignment_coef, diversity_coef=options.diversity_coef)
    return getattr(ebft, options.advantage_estimator)(scored.reward)
