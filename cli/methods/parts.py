"""What a method brings to a run, once there is a model: objectives, state of its own, and for online methods how completions are scored."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from treetune.cli.options.optim import OptimOptions
from treetune.core.data import pack
from treetune.core.data.prompts import Prompt
from treetune.core.rollout.group import Group
from treetune.core.rollout.sampler import Wrapper
from treetune.core.run.ranks import Ranks
from treetune.core.state import Logprob, Objective, TrainState
from treetune.losses import preference_objective
from treetune.models import policy as policies
from treetune.models.batches import Batcher, Collate
from treetune.models.policy import Policy

EVERY = ("mean_logit", "entropy", "top1")  # statistics of pairs that evaluations report
Prepare = Callable[[TrainState, list[Any]], list[Any]]
AfterStep = Callable[[TrainState, dict[str, Tensor], int], TrainState]


class Setting(NamedTuple):
    """Where a method is put together: the device, the ranks, the data of the run, and who is told of choices."""

    device: torch.device
    ranks: Ranks
    data: Any
    stop_ids: Sequence[int]
    say: Callable[[str], None]
    warn: Callable[[str], None]


class Rewards(Protocol):
    """What scores completions: K rewards of each. models, files: what a resumed run must find unchanged."""

    names: tuple[str, ...]  # as metrics name them
    weights: list[float]
    described: list[str]
    models: dict[str, str]
    files: tuple[str, ...]

    def check(self, prompts: Sequence[Prompt], /) -> None:
        """Errors: ValueError for prompts without what the rewards compare with."""
        ...

    def score(self, groups: Sequence[Group], /) -> np.ndarray:
        """Rewards [P, G, K], float64; nan where a reward abstains."""
        ...

    def measure(self, groups: Sequence[Group], /) -> dict[str, float]:
        """Metrics of scored groups."""
        ...

    def close(self) -> None:
        """End what was started."""
        ...


class RolloutParts(NamedTuple):
    """What learns from completions that the policy samples.

    logprob: at the sampling temperature, without noise. rewards(policy as placed) starts what scores. wrap(rollout) -> rollout: what is
    around a reply, such as later turns. truth(prompt) -> tokens and weights of a true reply that trains beside the completions.
    eval_completions: of each held-out prompt, for which extra_eval(policy as placed) makes a function state -> further metrics.
    """

    logprob: Logprob
    rewards: Callable[[Policy], Any]
    wrap: Wrapper = lambda rollout: rollout
    truth: Callable[[Prompt], tuple[np.ndarray, np.ndarray]] | None = None
    eval_completions: int = 1
    extra_eval: Callable[[Policy], Callable[[TrainState], dict]] = lambda policy: lambda state: {}


class Precompute(Protocol):
    """What every epoch needs of a document, computed once before training."""

    def __call__(
        self, state: TrainState, documents: list[Any], collate: Batcher, groups: Sequence[Sequence[int]], count: Callable[[int], None], /
    ) -> list[Any]:
        """The documents with it; `groups` are the indices of each forward pass, `count` is told of documents that are done."""
        ...


def plain(documents: list[Any], **options: Any) -> dict[str, Tensor]:
    """The stream of documents without branches."""
    return pack.collate(documents, **options)


class Parts(NamedTuple):
    """A method put together for one model.

    policy: with what else is frozen. extra: state of the method's own. evaluation: the objective without noise, with all that is worth
    reporting. collates: the streams that documents become, one (Batch, Plan) each; with several, `prepare` makes micro-batches of them.
    prepare(state, micro_batches) adds what is global to a step. after_step(state, metrics, step) -> state runs on the host after each.
    """

    policy: Policy
    objective: Objective
    evaluation: Objective
    collates: tuple[Collate, ...] = (plain,)
    extra: dict[str, Any] = {}
    prepare: Prepare | None = None
    after_step: AfterStep | None = None
    precompute: Precompute | None = None
    rollouts: RolloutParts | None = None


def in_sequence(functions: Sequence[AfterStep]) -> AfterStep | None:
    """Several functions after each step as one; None for none."""
    if not functions:
        return None

    def after_step(state: TrainState, metrics: dict[str, Tensor], step: int) -> TrainState:
        for function in functions:
            state = function(state, metrics, step)
        return state

    return after_step


def logprobs(policy: Policy, *, checkpointing: bool, **options: Any) -> tuple[Logprob, Logprob]:
    """Log-probs for training, with noise and perhaps recomputed layers, and for evaluation."""
    remat = "full" if checkpointing else None
    return policies.logprob(policy, remat=remat, **options), policies.logprob(policy)


def reference_free(
    optim: OptimOptions,
    policy: Policy,
    loss: preference_objective.PairLoss,
    rewards: preference_objective.Rewards,
    terms: preference_objective.Options,
    more: Callable[[Any], dict[str, Tensor]] | None = None,
) -> Parts:
    """A method on pairs that needs no reference; more(pairs) -> further metrics."""
    train, evaluation = logprobs(policy, checkpointing=optim.gradient_checkpointing)
    make = partial(preference_objective.objective, loss=loss, rewards=rewards, options=terms, more=more)
    collate = partial(pack.collate_trees, prompts=terms.prompts)
    return Parts(policy, make(train), make(evaluation, want=EVERY), (collate,))
