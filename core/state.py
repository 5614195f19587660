"""The types that everything else is written against."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, Self

from torch import Tensor

Params = dict  # nested dict / list of tensors; layers are a list of equal dicts; weights keep the Hugging Face orientation [out, in]
OptState = dict
Batch = dict[str, Tensor]
Plan = Any  # ops.attention.Plan: core hands it through and never looks inside
MicroBatch = Batch | tuple[Batch, Plan]  # a model computes the plan of a batch that comes without one


def with_plan(micro: MicroBatch) -> tuple[Batch, Plan]:
    """The batch and its plan; None for one that comes without."""
    return micro if isinstance(micro, tuple) else (micro, None)


Terms = dict[str, Tensor]
Metrics = dict[str, "Metric"]


class TokenStats(Protocol):
    """Statistics of the scored positions of a stream, [N] each, as `ops.linear_logprob.TokenStats` has them; None where not asked for."""

    @property
    def logp(self) -> Tensor:
        """Log-probability of the target, nats."""
        ...

    @property
    def entropy(self) -> Tensor | None:
        """Entropy of the predicted distribution, nats."""
        ...

    @property
    def lse(self) -> Tensor | None:
        """Log-sum-exp of the logits."""
        ...

    @property
    def mean_logit(self) -> Tensor | None:
        """Mean of the logits over the vocabulary."""
        ...

    @property
    def logsq(self) -> Tensor | None:
        """Log of the sum of squared probabilities."""
        ...

    @property
    def top1(self) -> Tensor | None:
        """Whether the target is the most likely token (bool)."""
        ...

    @property
    def topk_entropy(self) -> Tensor | None:
        """Entropy of the renormalised 20 largest logits, nats."""
        ...

    def _asdict(self) -> dict[str, Any]: ...

    def _replace(self, **fields: Any) -> Self: ...


class Logprob(Protocol):
    """Log-probs of the scored positions of a batch under trained weights laid over frozen ones; `want` names further statistics."""

    def __call__(self, params: Params, frozen: Params, batch: Batch, plan: Plan, /, *, want: tuple[str, ...] = ()) -> TokenStats:
        """TokenStats of `targets` [N], read at `at` [N]."""
        ...


class LogprobBeside(Protocol):
    """A `Logprob` that reads `prompt_targets` [M] too, in the same forward pass; `want` is about `targets` only."""

    def __call__(
        self, params: Params, frozen: Params, batch: Batch, plan: Plan, /, *, want: tuple[str, ...] = ()
    ) -> tuple[TokenStats, TokenStats | None]:
        """TokenStats of `targets` [N] and of `prompt_targets` [M], None where these are not read."""
        ...


class Scores(Protocol):
    """Scores of a head of C classes at the positions `at` of a batch."""

    def __call__(self, params: Params, frozen: Params, batch: Batch, plan: Plan, /) -> Tensor:
        """Scores [N, C], float32."""
        ...


class Metric(NamedTuple):
    """A detached number to report: `value` averaged by `weight` ("mean"), or reduced by "sum", "min" or "max".

    A mean, least or largest value of a step whose weights are all 0 is nan, unknown, and left out of the record.
    """

    value: Tensor
    weight: Tensor
    how: Literal["mean", "sum", "min", "max"] = "mean"


class Objective(NamedTuple):
    """One method's training signal: sum_k terms[k] / counts[k], where counts are summed over the whole optimiser step.

    counts(batch) gives the denominators from the batch alone; terms(params, frozen, batch, plan) gives the numerators,
    with their coefficients applied, and metrics. reaching, where the terms are the same whatever some leaf is, as differences of scores
    are whatever is added to all: terms with a gradient in that leaf, too, which tell leaves that nothing reads from it.
    """

    counts: Callable[[Batch], Terms]
    terms: Callable[[Params, Params, Batch, Plan], tuple[Terms, Metrics]]
    reaching: Callable[[Params, Params, Batch, Plan], tuple[Terms, Metrics]] | None = None


class TrainState(NamedTuple):
    """All that a run carries from step to step.

    params = {"model"?, "lora"?, "head"?}; frozen = {"model"?, "ref"?, "ref_lora"?, "teacher"?}; extra is a method's own
    state; step is a 0-d int64 tensor. `params["model"]` may be part of a tree, laid over `frozen["model"]`.
    """

    params: Params
    frozen: Params
    opt: OptState
    extra: dict
    step: Tensor


# The axis of every key of a batch: T stream tokens, D+1 document bounds, N read rows, B sequences, M prompt rows that are read too,
# "" a scalar.
AXES = {
    "tokens": "T", "positions": "T", "branch": "T", "start": "T", "cu_docs": "D+1",
    "at": "N", "targets": "N", "seq": "N", "weight": "N",
    "ref_logp": "N", "old_logp": "N", "sampler_logp": "N", "correction": "N", "entropy_keep": "N", "prompt_at": "M", "prompt_targets": "M",
    "seq_lens": "B", "doc_of_seq": "B", "row": "B", "desirable": "B", "kind": "B", "margin": "B", "advantage": "B", "prompt_length": "B",
    "alignment": "B", "diversity": "B", "cfm": "B", "ebft_reward": "B",
    "seed": "", "baseline": "", "delta": "", "entropy_coef": "",
    "advantages_std": "", "num_blocks": "", "anchor_offset": "", "num_prompts": "",
}  # fmt: skip
