"""The reference of a preference method: where its weights are, its log-probs at each step or once before training, and its syncs.

A fresh adapter has its base as the reference, which costs nothing; everything else keeps a copy of what it started from.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from treetune.cli import precompute, setup
from treetune.cli.options.losses import ReferenceOptions
from treetune.cli.options.shared import ModelOptions
from treetune.core import tree
from treetune.core.data import pack, trees
from treetune.core.lora import Lora
from treetune.core.state import Params, TrainState
from treetune.models import Model, bare, logprobs


class Reference(NamedTuple):
    """logp(state, batch, plan) -> [N]; the trees of the run with those that it needs; its state, when it moves."""

    logp: Callable[[TrainState, dict, Any], Tensor]
    trees: setup.Trees
    extra: dict


def build(
    options: ReferenceOptions, model: Model, used: setup.Trees, config: Any, *, on: torch.device, say=print, temperature: float = 1.0
) -> Reference:
    """The reference that the options name; temperature divides its logits, as those of the policy."""
    run = logprobs if temperature == 1 else partial(logprobs, temperature=temperature)
    sizes, low = bare(model), setup.without_tree(used.lora)  # a run's functions keep no weights: a copy of the loaded model would never go
    if options.ref_model is not None:
        return _other(options, model, used, config, run, on=on, say=say)
    if options.sync_ref_model:
        return Reference(_moving(sizes, low, run), used, {"ref": _copy(used.params)})
    if used.lora is None:
        # once computed, log-probs need no copy of the weights that they came from
        kept = used if options.precompute_ref_logps else used._replace(frozen=used.frozen | {"ref": _cast(used.params["model"], model)})
        return Reference(_whole(sizes, run), kept, {})
    if config.adapter.lora_model_dir is None:
        return Reference(_base(sizes, run), used, {})
    kept = {"ref_lora": _copy(used.params["lora"])} | ({"ref": _copy(used.params["model"])} if "model" in used.params else {})
    return Reference(_started(sizes, low, run), used._replace(frozen=used.frozen | kept), {})


def _copy(params: Params) -> Params:
    return tree.map(lambda leaf: leaf.detach().clone(), params)


def _cast(params: Params, model: Model) -> Params:
    """A copy in the dtype that the model computes in: the same numbers as the policy's, which are cast before use."""
    return tree.map(lambda leaf: leaf.detach().to(model.cfg.dtype, copy=True), params)


def _base(model: Model, run: Callable) -> Callable:
    return lambda state, batch, plan: run(model.family, model.cfg, state.frozen["model"], batch, plan).logp


def _whole(model: Model, run: Callable) -> Callable:
    def logp(state: TrainState, batch: dict, plan: Any) -> Tensor:
        weights = state.frozen["ref"] if "ref" in state.frozen else state.params["model"]
        return run(model.family, model.cfg, weights, batch, plan).logp

    return logp


def _adapted(model: Model, run: Callable, used: Lora | None, weights: Params, low: Params | None, batch: dict, plan: Any) -> Tensor:
    lora = None if low is None else used._replace(tree=low, dropout=0.0, seed=None)
    return run(model.family, model.cfg, weights, batch, plan, lora=lora).logp


def _started(model: Model, used: Lora, run: Callable) -> Callable:
    def logp(state: TrainState, batch: dict, plan: Any) -> Tensor:
        weights = tree.merge(state.frozen["model"], state.frozen.get("ref", {}))
        return _adapted(model, run, used, weights, state.frozen["ref_lora"], batch, plan)

    return logp


def _moving(model: Model, used: Lora | None, run: Callable) -> Callable:
    def logp(state: TrainState, batch: dict, plan: Any) -> Tensor:
        own = state.extra["ref"]
        return _adapted(model, run, used, tree.merge(state.frozen.get("model", {}), own.get("model", {})), own.get("lora"), batch, plan)

    return logp


def _other(options: ReferenceOptions, model: Model, used: setup.Trees, config: Any, run: Callable, *, on: torch.device, say) -> Reference:
    other, path = setup.load_model(dataclasses.replace(config.model, model=options.ref_model, revision=None), on=on, say=say)
    if other.cfg.vocab_size != model.cfg.vocab_size:
        have = f"{other.cfg.vocab_size} rows of vocabulary, the model {model.cfg.vocab_size}"
        raise ValueError(f"ref_model {path} has {have}: take one of its kind")
    _check_words(config.model, options, path)
    same = (other.cfg.window, other.cfg.dtype) == (model.cfg.window, model.cfg.dtype)
    sizes = bare(other)

    def logp(state: TrainState, batch: dict, plan: Any) -> Tensor:
        return run(sizes.family, sizes.cfg, state.frozen["ref"], batch, plan if same else None).logp

    return Reference(logp, used._replace(frozen=used.frozen | {"ref": other.params}), {})


def _check_words(own: ModelOptions, options: ReferenceOptions, path: str) -> None:
    """Errors: ValueError where the reference's tokenizer numbers tokens otherwise, so that its log-probs would be of other texts."""
    try:
        theirs = setup.load_tokenizer(dataclasses.replace(own, model=options.ref_model, revision=None)).get_vocab()
    except ValueError:  # weights alone: there is nothing to compare
        return
    ours = setup.load_tokenizer(own).get_vocab()
    shared = [text for text in ours if text in theirs]
    if moved := next((text for text in shared if theirs[text] != ours[text]), None):
        raise ValueError(f"ref_model {path}: token {moved!r} is {theirs[moved]} there and {ours[moved]} in the model: take one of its kind")
    if len(shared) < len(ours) / 2:
        raise ValueError(f"ref_model {path} has {len(shared)} of the model's {len(ours)} tokens: take one of its kind")


Logp = Callable[[TrainState, dict, Any], Tensor]  # of a Reference; functions of a run keep it alone, since the trees hold weights


def preparer(logp: Logp) -> Callable:
    """`prepare` of a step: the reference's log-probs beside each batch that has none yet."""

    def prepare(state: TrainState, micro_batches: list) -> list:
        return [(with_logp(logp, state, batch, plan), plan) for batch, plan in micro_batches]

    return prepare


def with_logp(logp: Logp, state: TrainState, batch: dict, plan: Any) -> dict:
    """The batch with `ref_logp`."""
    return batch if precompute.NAME in batch else batch | {precompute.NAME: logp(state, batch, plan)}


def enricher(logp: Logp) -> Callable:
    """enrich(state, docs, make, groups) -> documents that hold the reference's log-probs; `make` as for a step."""

    @torch.no_grad()
    def enrich(state: TrainState, docs: Sequence[trees.TreeDoc], make: Callable, groups: Sequence[Sequence[int]], say) -> list:
        done = list(docs)
        for group in groups:
            batch, plan = make(group, docs, seed=None)
            found = np.asarray(logp(state, batch, plan).float().cpu())
            start = 0
            for i in group:
                at = pack.scored_tokens(docs[i])
                values = np.zeros(len(docs[i].tokens), np.float32)
                values[at] = found[start : start + len(at)]
                done[i], start = docs[i]._replace(values={precompute.NAME: values}), start + len(at)
            say(len(group))
        return done

    return enrich


def syncer(options: ReferenceOptions) -> Callable:
    """between: every ref_model_sync_steps steps the reference becomes alpha policy + (1 - alpha) reference.

    Source: Gorbatovski et al., arXiv 2404.09656, equation 9.
    """

    def between(state: TrainState, metrics: dict, step: int) -> TrainState:
        if step % options.ref_model_sync_steps:
            return state
        alpha = options.ref_model_mixup_alpha
        mixed = tree.map(lambda old, new: torch.lerp(old, new.detach(), alpha), state.extra["ref"], state.params)
        return state._replace(extra=state.extra | {"ref": mixed})

    return between
