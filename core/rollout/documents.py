"""Groups of completions as token trees, and the policy's log-probs beside their tokens.

P prompts, G completions of each, n tokens of a completion or a document.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from treetune.core.data import prompts, spans, trees
from treetune.core.rollout.group import Completion, Group
from treetune.core.state import Batch, Logprob, Plan, TrainState


class TokenSamples(Protocol):
    """What a local sampler gives: R completions in rows that are as wide as the longest."""

    @property
    def tokens(self) -> torch.Tensor:
        """Ids, int64 [R, n]."""
        ...

    @property
    def logp(self) -> torch.Tensor:
        """Their log-probs, float32 [R, n], nats."""
        ...

    @property
    def lens(self) -> torch.Tensor:
        """Tokens of each completion, int64 [R]."""
        ...


Truth = Callable[[prompts.Prompt], tuple[np.ndarray, np.ndarray]]
Collate = Callable[[list[Any]], tuple[Batch, Plan]]  # documents -> (batch, plan) on the device


def completions(samples: TokenSamples, *, n: int, stop_ids: set[int], tokenizer: Any) -> list[list[Completion]]:
    """The rows of a local sampler as the n completions of each prompt, prompt by prompt."""
    lens, tokens, logp = samples.lens.tolist(), samples.tokens.cpu().numpy(), samples.logp.cpu().numpy()
    rows = [completion(tokens[i, :size], logp[i, :size], stop_ids, tokenizer) for i, size in enumerate(lens)]
    return [rows[start : start + n] for start in range(0, len(rows), n)]


def completion(tokens: np.ndarray, logp: np.ndarray, stop_ids: set[int], tokenizer: Any) -> Completion:
    """A completion of sampled ids [n] with the text that rewards see; `stopped` when its last id is one of stop_ids."""
    ids = tokens.tolist()
    text = tokenizer.decode(ids, skip_special_tokens=True)
    trained = np.ones(len(ids), bool)
    return Completion(np.asarray(tokens, np.int32), np.asarray(logp, np.float32), trained, bool(ids) and ids[-1] in stop_ids, text)


def document(group: Group, *, mask_truncated: bool = False, truth: Truth | None = None) -> trees.TreeDoc:
    """A group as a token tree: its prompt is the trunk, each completion a branch with its advantage and log-probs beside its tokens.

    mask_truncated: completions that were cut at the length limit train nothing. truth(prompt) -> tokens and weights of the true reply,
    one more branch; the extra `kind` is then 1 for it and 0 for completions.
    """
    masks = [one.trained & (one.stopped or not mask_truncated) for one in group.completions]
    branches = [(one.tokens, mask.astype(np.float32)) for one, mask in zip(group.completions, masks, strict=True)]
    extras = {} if group.advantage is None else {"advantage": tuple(group.advantage.tolist())}
    if truth is not None:
        extras = {name: (*values, 0.0) for name, values in extras.items()} | {"kind": (0,) * len(branches) + (1,)}
        branches.append(truth(group.prompt))
    doc = prompts.completion_tree(group.prompt, branches, extras)
    values = {"sampler_logp": [one.logp for one in group.completions], "old_logp": group.old_logp}
    return doc._replace(values={name: _beside_tokens(doc, parts) for name, parts in values.items() if parts is not None})


def _beside_tokens(doc: trees.TreeDoc, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Numbers of the completions at the places of their tokens in the document, 0 elsewhere: float32 [n]."""
    values, start = np.zeros(len(doc.tokens), np.float32), int((doc.branch == 0).sum())
    numbers = np.concatenate(parts)
    values[start : start + len(numbers)] = numbers
    return values


def old_logprobs(logprob: Logprob, collate: Collate, *, groups_per_batch: int) -> Callable[[TrainState, list[Group]], list[Group]]:
    """A function (state, groups) -> groups whose `old_logp` is that of the state's weights on trained tokens, and 0 on all others."""

    @torch.no_grad()
    def relogp(state: TrainState, groups: list[Group]) -> list[Group]:
        scored = []
        for i in range(0, len(groups), groups_per_batch):
            # A log-prob of earlier weights would be collated as well, and is about to be replaced.
            some = [group._replace(old_logp=None) for group in groups[i : i + groups_per_batch]]
            batch, plan = collate([document(group) for group in some])
            scored += _with_old(some, np.asarray(logprob(state.params, state.frozen, batch, plan).logp.float().cpu()))
        return scored

    return relogp


def prompt_logprobs(logprob: Logprob, collate: Collate) -> Callable[[TrainState, Sequence[int]], np.ndarray]:
    """A function (state, tokens) -> log-probs of tokens[1:] under the state's weights, float64 [len(tokens) - 1]."""

    @torch.no_grad()
    def compute(state: TrainState, tokens: Sequence[int], /) -> np.ndarray:
        ids = np.array(tokens, np.int32)
        batch, plan = collate([spans.Doc(ids, (np.arange(len(ids)) > 0).astype(np.float32), 0)])
        return np.asarray(logprob(state.params, state.frozen, batch, plan).logp.double().cpu())

    return compute


def _with_old(groups: list[Group], logp: np.ndarray) -> list[Group]:
    """Log-probs of scored tokens [N], which come in the order of the groups' trained tokens, laid beside all tokens."""
    out, start = [], 0
    for group in groups:
        old = []
        for one in group.completions:
            values, count = np.zeros(len(one.tokens), np.float32), int(one.trained.sum())
            values[one.trained] = logp[start : start + count]
            old.append(values)
            start += count
        out.append(group._replace(old_logp=tuple(old)))
    return out
