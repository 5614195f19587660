"""What tells one way of training from another, and what it brings to a run once there is a model.

Importing this imports no torch, which takes a second: `treetune --help` and config errors need none of it. So a method imports inside
`parts` what it computes with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch

    from treetune.core.data.kinds import DatasetSpec
    from treetune.core.data.prompts import Prompt
    from treetune.core.data.reference_logps import Enrich
    from treetune.core.rollout.rewards import Rewards
    from treetune.core.rollout.sampler import Wrapper
    from treetune.core.run.ranks import Ranks
    from treetune.core.state import Logprob, Objective, TrainState
    from treetune.core.step import AfterStep, Prepare
    from treetune.models.batches import Collate
    from treetune.models.policy import Policy


ANSWERS = (
    "sample_prompt", "sample_tokens", "eval_table_size", "eval_max_new_tokens", "eval_causal_lm_metrics", "eval_answers",
    "eval_reward_funcs", "eval_reward_timeout", "lm_eval_tasks", "lm_eval_batch_size",
)  # fmt: skip


class Setting(NamedTuple):
    """Where a method is put together: the device, the ranks, the data of the run, and who is told of choices."""

    device: torch.device
    ranks: Ranks
    data: Any
    stop_ids: Sequence[int]
    say: Callable[[str], None]
    warn: Callable[[str], None]


class RolloutParts(NamedTuple):
    """What learns from completions that the policy samples.

    logprob: at the sampling temperature, without noise. rewards(policy as placed) starts what scores. wrap(rollout) -> rollout: what is
    around a reply, such as later turns. truth(prompt) -> tokens and weights of a true reply that trains beside the completions.
    eval_completions: of each held-out prompt, for which extra_eval(policy as placed) makes a function state -> further metrics.
    """

    logprob: Logprob
    rewards: Callable[[Policy], Rewards]
    wrap: Wrapper = lambda rollout: rollout
    truth: Callable[[Prompt], tuple[np.ndarray, np.ndarray]] | None = None
    eval_completions: int = 1
    extra_eval: Callable[[Policy], Callable[[TrainState], dict]] = lambda policy: lambda state: {}


class Parts(NamedTuple):
    """A method put together for one model.

    policy: with what else is frozen. extra: state of the method's own. evaluation: the objective without noise, with all that is worth
    reporting. collates: the streams that documents become, one (Batch, Plan) each; with several, `prepare` makes micro-batches of them.
    prepare(state, micro_batches) adds what is global to a step. after_step(state, metrics, step) -> state runs on the host after each.
    precompute: what every epoch needs of a document, computed once before training.
    """

    policy: Policy
    objective: Objective
    evaluation: Objective
    collates: tuple[Collate, ...]
    extra: dict[str, Any] = {}
    prepare: Prepare | None = None
    after_step: AfterStep | None = None
    precompute: Enrich | None = None
    rollouts: RolloutParts | None = None


class Method(NamedTuple):
    """A training command.

    help: its line in `treetune --help`. rates: peak learning rate with an adapter and without. data: kind of rows that it reads;
    rows(config) -> the spec of a kind that `core.data.kinds` has no name for.
    parts(config, policy, setting) -> its objectives, state and streams for one model.
    shown: metrics worth a place on the screen. unit: what the loss is a mean over. head: whether a head of scores trains with the model.
    perplexity: whether the loss is a mean of -log p. goal: metric of evaluations that the best checkpoint follows; one named loss falls.
    conflicts(config) raises ValueError for options that contradict each other. unused(config) -> {option: why the run would not look at
    it}, beyond what the fields say. variant(config) -> fields of this record that the options change. complete(config) -> the config with
    values for what depends on other options and was left open.
    """

    name: str
    help: str
    config: type
    rates: tuple[float, float]
    data: str
    parts: Callable[[Any, Policy, Setting], Parts]
    shown: tuple[str, ...] = ()
    unit: str = "pairs"
    head: bool = False
    perplexity: bool = False
    goal: str = "loss"
    conflicts: Callable[[Any], None] = lambda config: None
    unused: Callable[[Any], dict[str, str]] = lambda config: {}
    variant: Callable[[Any], dict[str, Any]] = lambda config: {}
    complete: Callable[[Any], Any] = lambda config: config
    rows: Callable[[Any], DatasetSpec] | None = None


def resolve(method: Method, config: Any) -> Method:
    """The method as these options make it."""
    return method._replace(**method.variant(config))


def unanswering(config: Any) -> dict[str, str]:
    """`unused` of a method whose head of scores takes the place of the answers."""
    return dict.fromkeys(ANSWERS, "a reward model writes no answers")
