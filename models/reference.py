"""The reference policy of a method: where its weights are, its log-probs at each step, and how it follows the policy.

A fresh adapter has its base as the reference, which costs nothing; everything else keeps a copy of what it started from.
N read rows of a stream.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from treetune.core import lora_use, tree
from treetune.core.lora import Lora
from treetune.core.param import Params
from treetune.core.quant import Scheme
from treetune.core.state import Batch, TrainState
from treetune.models import Model, bare, loading, logprobs, tokenizer
from treetune.models.fetch import Say, silent
from treetune.models.policy import Policy, weights, without_tree
from treetune.models.quantised import Home
from treetune.ops.attention import Plan

NAME = "ref_logp"  # of a batch, and of the values of a document


class RefLogp(Protocol):
    """Log-probs of the reference at the read rows of a stream."""

    def __call__(self, state: TrainState, batch: Batch, plan: Plan | None) -> Tensor:
        """[N], nats."""
        ...


class Pace(NamedTuple):
    """How a reference follows the policy: after every `every` steps it becomes alpha policy + (1 - alpha) reference."""

    every: int
    alpha: float


class Reference(NamedTuple):
    """A reference beside a policy.

    logp(state, batch, plan) -> [N]. policy: with the frozen trees that it needs. extra: its state, and after_step what moves it, where it
    follows the policy.
    """

    logp: RefLogp
    policy: Policy
    extra: dict[str, Any] = {}
    after_step: Callable[[TrainState, dict, int], TrainState] | None = None


def build(
    policy: Policy,
    *,
    other: Model | None = None,
    pace: Pace | None = None,
    precompute: bool = False,
    trained_adapter: bool = False,
    temperature: float = 1.0,
) -> Reference:
    """The reference of a policy: what it starts from, or the model `other`.

    pace: it follows the policy, by `mixer`. precompute: its log-probs are computed before the first step. trained_adapter: the policy
    starts from an adapter that was trained before. temperature: divides its logits, as those of the policy.
    """
    run = logprobs if temperature == 1 else partial(logprobs, temperature=temperature)
    # A run's functions keep no weights: a copy of the loaded model would never be freed.
    sizes, low = Model(policy.family, policy.cfg, {}), without_tree(policy.lora)
    if other is not None:
        return Reference(_of_other(other, policy, run), _freeze(policy, ref=other.params))
    if pace is not None:
        return Reference(
            _moving(sizes, low, run), policy, {"ref": tree.map(_wide_copy, policy.params)}, mixer(every=pace.every, alpha=pace.alpha)
        )
    if low is None:
        # Once they are computed, log-probs need no copy of the weights that they came from.
        start = policy if precompute else _freeze(policy, ref=_cast(policy.params["model"], policy.cfg.dtype))
        return Reference(_whole(sizes, run), start)
    if not trained_adapter:
        return Reference(_base(sizes, run), policy)
    copies = {"ref_lora": _copy(policy.params["lora"])}
    copies |= {"ref": _copy(policy.params["model"])} if "model" in policy.params else {}
    return Reference(_started(sizes, low, run), _freeze(policy, **copies))


def _freeze(policy: Policy, **trees: Params) -> Policy:
    return policy._replace(frozen=policy.frozen | trees)


def _copy(params: Params) -> Params:
    return tree.map(lambda leaf: leaf.detach().clone(), params)


def _wide_copy(leaf: Tensor) -> Tensor:
    """A copy that takes part in means: in float32 or wider."""
    return leaf.detach().to(torch.promote_types(leaf.dtype, torch.float32), copy=True)


def _cast(params: Params, dtype: torch.dtype) -> Params:
    """A copy in the dtype that the model computes in: the same numbers as the policy's, which are cast before use."""
    return tree.map(lambda leaf: leaf.detach().to(dtype, copy=True), params)


def _base(model: Model, run: Callable) -> RefLogp:
    return lambda state, batch, plan: run(model.family, model.cfg, state.frozen["model"], batch, plan).logp


def _whole(model: Model, run: Callable) -> RefLogp:
    def logp(state: TrainState, batch: Batch, plan: Plan | None) -> Tensor:
        whole = tree.merge(state.frozen.get("model", {}), state.frozen["ref"] if "ref" in state.frozen else state.params["model"])
        return run(model.family, model.cfg, whole, batch, plan).logp

    return logp


def _started(model: Model, low: Lora, run: Callable) -> RefLogp:
    def logp(state: TrainState, batch: Batch, plan: Plan | None) -> Tensor:
        whole = tree.merge(state.frozen["model"], state.frozen.get("ref", {}))
        return run(model.family, model.cfg, whole, batch, plan, lora=_quiet(low, state.frozen["ref_lora"], state)).logp

    return logp


def _moving(model: Model, low: Lora | None, run: Callable) -> RefLogp:
    def logp(state: TrainState, batch: Batch, plan: Plan | None) -> Tensor:
        copies = state.extra["ref"]
        whole = weights(copies, state.frozen)
        lora = None if low is None else _quiet(low, copies["lora"], state)
        return run(model.family, model.cfg, whole, batch, plan, lora=lora).logp

    return logp


def _quiet(low: Lora, adapter: Params, state: TrainState) -> Lora:
    """An adapter in use, without dropout."""
    return lora_use.in_use(low, adapter, state.frozen.get("start"))


def _of_other(other: Model, policy: Policy, run: Callable) -> RefLogp:
    sizes, family = bare(other).cfg, other.family
    # The policy's plan of the attention serves where windows, soft-caps, sinks and dtypes agree.
    same = all(getattr(sizes, name) == getattr(policy.cfg, name) for name in ("windows", "plain_attention", "dtype"))
    return lambda state, batch, plan: run(family, sizes, state.frozen["ref"], batch, plan if same else None).logp


def load_other(
    name: str,
    policy: Policy,
    *,
    dtype: str,
    device: torch.device,
    scheme: Scheme | None = None,
    home: Home | None = None,
    say: Say = silent,
) -> Model:
    """Another model as the reference, quantised by a scheme. home: where its layers are, if not on the device, or how its leaves are split.

    Raises ValueError where it has another number of rows of vocabulary, or its tokenizer numbers tokens otherwise, so that its log-probs
    would be of other texts.
    """
    other, path = loading.load_model(name, dtype=dtype, device=device, scheme=scheme, home=home, say=say)
    if other.cfg.vocab_size != policy.cfg.vocab_size:
        rows = f"{other.cfg.vocab_size} rows of vocabulary, the model {policy.cfg.vocab_size}"
        raise ValueError(f"ref_model {path} has {rows}: take one of its kind")
    _check_tokens(name, str(path), policy.tokenizer)
    return other


def _check_tokens(name: str, path: str, policy_tokenizer: Any) -> None:
    try:
        theirs = tokenizer.load_tokenizer(name).get_vocab()
    except ValueError:  # weights alone: there is nothing to compare
        return
    ours = policy_tokenizer.get_vocab()
    shared = [text for text in ours if text in theirs]
    if moved := next((text for text in shared if theirs[text] != ours[text]), None):
        raise ValueError(f"ref_model {path}: token {moved!r} is {theirs[moved]} there and {ours[moved]} in the model: take one of its kind")
    if len(shared) < len(ours) / 2:
        raise ValueError(f"ref_model {path} has {len(shared)} of the model's {len(ours)} tokens: take one of its kind")


def preparer(logp: RefLogp) -> Callable[[TrainState, Sequence[tuple[Batch, Plan]]], list[tuple[Batch, Plan]]]:
    """`prepare` of a step: the reference's log-probs beside each batch that has none yet."""

    def prepare(state: TrainState, micro_batches: Sequence[tuple[Batch, Plan]]) -> list[tuple[Batch, Plan]]:
        return [(with_logp(logp, state, batch, plan), plan) for batch, plan in micro_batches]

    return prepare


def with_logp(logp: RefLogp, state: TrainState, batch: Batch, plan: Plan | None) -> Batch:
    """The batch with `ref_logp`."""
    return batch if NAME in batch else batch | {NAME: logp(state, batch, plan)}


def mixer(*, every: int, alpha: float) -> Callable[[TrainState, dict, int], TrainState]:
    """After every `every` steps the reference becomes alpha policy + (1 - alpha) reference.

    Source: Gorbatovski et al., arXiv 2404.09656, equation 9.
    """

    def after_step(state: TrainState, metrics: dict, step: int) -> TrainState:
        if step % every:
            return state
        mixed = tree.map(lambda old, new: torch.lerp(old, new.detach().to(old.dtype), alpha), state.extra["ref"], state.params)
        return state._replace(extra=state.extra | {"ref": mixed})

    return after_step
