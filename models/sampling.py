"""Sampling from the weights of a run's state: the policy that trains, so that the importance ratio is 1.

Ranks along `context` have the same prompts: each samples every n-th of them, and has the completions of all. Where one has none left it
takes part in the passes of the others, if ranks have parts of the weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from treetune.core import shard, strided
from treetune.core.state import Batch, TrainState
from treetune.models import Model, decode, decode_branches, families, together
from treetune.models.decode import Samples
from treetune.models.policy import Policy, bare, in_parts, weights
from treetune.ops import context_parallel, noise
from treetune.ops.tensor_parallel import Split

ROLLOUTS, EVALUATION = 21, 22  # what the randomness of rollouts from anchors is for


def joiner(policy: Policy) -> Callable[[TrainState], None]:
    """What ranks call that have no more to sample, until no rank has: from weights in parts they sample together."""
    sizes, _ = _of_one(policy)

    def join(state: TrainState) -> None:
        go_on = together.agreed(_base(sizes, state))
        while go_on(False):
            decode.join(*in_parts(sizes, state.params, state.frozen, shard.own))

    return join


def _of_one(policy: Policy) -> tuple[Policy, Split | None]:
    """The policy of a rank that computes whole streams, and the ranks that have the same prompts, if there are several."""
    split, sizes = getattr(policy.cfg, "context", None), bare(policy)
    return (sizes if split is None else sizes._replace(cfg=replace(policy.cfg, context=None))), split


def _base(policy: Policy, state: TrainState) -> Model:
    return Model(policy.family, policy.cfg, weights(state.params, state.frozen))


class LocalSample(Protocol):
    """The policy's own sampling: n completions of each of P prompts, R = P n rows, prompt by prompt."""

    def __call__(self, state: TrainState, ids: Sequence[Sequence[int]], numbers: Sequence[int], /, *, n: int, max_tokens: int) -> Samples:
        """Completions of at most max_tokens tokens from the weights of the state; `numbers` name the randomness of each prompt."""
        ...


def sampler(
    policy: Policy,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    stop: Sequence[int] = (),
    seed: int,
) -> LocalSample:
    """The sampler of the weights of the state that it is given: the policy that trains, so that the importance ratio is 1."""
    sizes, split = _of_one(policy)
    options = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}

    def sample(state: TrainState, ids: Sequence[Sequence[int]], numbers: Sequence[int], /, *, n: int, max_tokens: int) -> Samples:
        together.agreed(_base(sizes, state))(True)
        model, low = in_parts(sizes, state.params, state.frozen, shard.own)
        draw = partial(decode.sample, model, lora=low, n=n, max_new_tokens=max_tokens, stop=stop, seed=seed, **options)
        if split is None:
            return draw(ids, ids=list(numbers))
        own, device = ids[split.rank :: split.size], model.params["embed_tokens"].device
        if own:
            part = draw(own, ids=list(numbers[split.rank :: split.size]))
        else:
            part = decode.empty(0, max_tokens, device)
            if families.in_parts(model):
                decode.join(model, low)
        return decode.trim(_of_all(split, part, len(ids), n, max_tokens))

    return sample


def _of_all(split: Split, own: Samples, count: int, n: int, length: int) -> Samples:
    """The completions of `count` prompts, n of each, of which every rank has sampled its own."""

    def whole(x: Tensor) -> Tensor:
        x = x if x.ndim == 1 else torch.nn.functional.pad(x, (0, length - x.shape[1]))
        return context_parallel.dealt(split, x.unflatten(0, (-1, n)), count).flatten(0, 1)

    return Samples(*map(whole, own))


def branch_sampler(
    policy: Policy, n: int, *, temperature: float, top_p: float, seed: int
) -> Callable[[TrainState, Batch, strided.Anchors], Tensor]:
    """The sampler of n rollouts from each anchor of a stream: tokens [R, G] from the weights of a state, without dropout.

    It depends on weights, rows, places and the seed of the batch alone, for which `seed` stands in evaluations.
    """
    (sizes, split), evaluation_seed = _of_one(policy), noise.keys(seed, EVALUATION)

    def sample(state: TrainState, batch: Batch, anchors: strided.Anchors) -> Tensor:
        model, low = in_parts(sizes, state.params, state.frozen, shard.own)
        rows, draw_seed = strided.document_rows(batch).tolist(), int(noise.keys(batch.get("seed", evaluation_seed), ROLLOUTS))
        draw = {"temperature": temperature, "top_p": top_p, "seed": draw_seed}
        own = anchors
        if split is not None:
            own = anchors._replace(document=anchors.document[split.rank :: split.size], start=anchors.start[split.rank :: split.size])
        tokens = decode_branches.branches(model, batch, own, n, lora=low, ids=rows, **draw).tokens
        if split is None or not anchors.start.shape[0]:
            return tokens
        return context_parallel.dealt(split, tokens.unflatten(0, (-1, n)), anchors.start.shape[0]).flatten(0, 1)

    return sample
