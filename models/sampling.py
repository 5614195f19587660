"""Sampling from the weights of a run's state: the policy that trains, so that the importance ratio is 1."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from treetune.core import shard, strided
from treetune.core.state import Batch, TrainState
from treetune.models import Model, decode, decode_branches, together
from treetune.models.decode import Samples
from treetune.models.policy import Policy, bare, in_parts, weights
from treetune.ops import noise

ROLLOUTS, EVALUATION = 21, 22  # what the randomness of rollouts from anchors is for


def joiner(policy: Policy) -> Callable[[TrainState], None]:
    """What ranks call that have no more to sample, until no rank has: from weights in parts they sample together."""
    sizes = bare(policy)

    def join(state: TrainState) -> None:
        go_on = together.agreed(_base(sizes, state))
        while go_on(False):
            decode.join(*in_parts(sizes, state.params, state.frozen, shard.own))

    return join


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
    sizes, options = bare(policy), {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}

    def sample(state: TrainState, ids: Sequence[Sequence[int]], numbers: Sequence[int], /, *, n: int, max_tokens: int) -> Samples:
        together.agreed(_base(sizes, state))(True)
        model, low = in_parts(sizes, state.params, state.frozen, shard.own)
        return decode.sample(model, ids, n=n, lora=low, max_new_tokens=max_tokens, stop=stop, seed=seed, ids=list(numbers), **options)

    return sample


def branch_sampler(
    policy: Policy, n: int, *, temperature: float, top_p: float, seed: int
) -> Callable[[TrainState, Batch, strided.Anchors], Tensor]:
    """The sampler of n rollouts from each anchor of a stream: tokens [R, G] from the weights of a state, without dropout.

    It depends on weights, rows, places and the seed of the batch alone, for which `seed` stands in evaluations.
    """
    sizes, evaluation_seed = bare(policy), noise.keys(seed, EVALUATION)

    def sample(state: TrainState, batch: Batch, anchors: strided.Anchors) -> Tensor:
        model, low = in_parts(sizes, state.params, state.frozen, shard.own)
        rows, draw_seed = strided.document_rows(batch).tolist(), int(noise.keys(batch.get("seed", evaluation_seed), ROLLOUTS))
        draw = {"temperature": temperature, "top_p": top_p, "seed": draw_seed}
        return decode_branches.branches(model, batch, anchors, n, lora=low, ids=rows, **draw).tokens

    return sample
