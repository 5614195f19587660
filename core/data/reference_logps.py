"""The reference's log-probs of every document, computed once before a run and kept on disk with the prepared rows."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from treetune.core.data import cache, loader, pack, trees
from treetune.core.data.dataset import Dataset
from treetune.core.state import Batch, Plan, TrainState

NAME = "ref_logp"  # of the values of a document
Docs = Sequence[trees.TreeDoc]


class RefLogp(Protocol):
    """Log-probs [N] of the reference at the scored tokens of a stream, in nats."""

    def __call__(self, state: TrainState, batch: Batch, plan: Plan) -> torch.Tensor:
        """[N]."""
        ...


class MakeBatch(Protocol):
    """Some documents as a batch on the device, with its plan."""

    def __call__(self, docs: Docs, /) -> tuple[Batch, Plan]:
        """(batch, plan)."""
        ...


class Enrich(Protocol):
    """Documents that hold the reference's log-probs."""

    def __call__(
        self, state: TrainState, docs: Docs, make: MakeBatch, groups: Sequence[Sequence[int]], count: Callable[[int], Any]
    ) -> list[trees.TreeDoc]:
        """groups: the documents of each forward pass; count is told how many are done."""
        ...


class Saved(NamedTuple):
    """The reference's log-probs at the tokens of one document, 0 where none is scored."""

    ref_logp: np.ndarray


def enricher(logp: RefLogp) -> Enrich:
    """The function that gives documents `ref_logp`, 0 where no token is scored."""

    @torch.no_grad()
    def enrich(
        state: TrainState, docs: Docs, make: MakeBatch, groups: Sequence[Sequence[int]], count: Callable[[int], Any]
    ) -> list[trees.TreeDoc]:
        done = list(docs)
        for group in groups:
            batch, plan = make([docs[i] for i in group])
            flat = np.asarray(logp(state, batch, plan).float().cpu())
            start = 0
            for i in group:
                scored = pack.scored_tokens(docs[i])
                values = np.zeros(len(docs[i].tokens), np.float32)
                values[scored] = flat[start : start + len(scored)]
                done[i], start = docs[i]._replace(values={NAME: values}), start + len(scored)
            count(len(group))
        return done

    return enrich


class Store(NamedTuple):
    """Where computed log-probs are kept: the folder of prepared rows, and what they depend on besides the documents.

    weights: a digest of the reference's. computes: other facts, such as the dtype that the model computes in.
    """

    root: str
    weights: str
    computes: str
    tokenizer: Any


def load_or_compute(
    docs: Docs, compute: Callable[[Docs], list[trees.TreeDoc]], store: Store | None, *, say: Callable[[str], Any]
) -> list[trees.TreeDoc]:
    """The documents with the log-probs that `compute` gives them, or that the store has from an earlier run."""
    if store is None or not docs:
        return compute(docs)
    options = {"kept": NAME, "computes": store.computes}
    key = cache.entry_key(data=[digest(docs), store.weights], tokenizer=store.tokenizer, options=options)
    if (entry := cache.load_entry(store.root, key)) is not None:
        say(f"reference log-probs of {len(docs)} documents: prepared earlier")
        return [doc._replace(values={NAME: saved.ref_logp}) for doc, saved in zip(docs, entry[0], strict=True)]
    enriched = compute(docs)
    cache.save_entry(store.root, key, [Saved((doc.values or {})[NAME]) for doc in enriched])
    return enriched


def precompute(
    data: Dataset,
    compute: Callable[[Docs, list[list[int]]], list[trees.TreeDoc]],
    batching: Mapping[str, int],
    store: Store | None,
    *,
    say: Callable[[str], Any],
) -> Dataset:
    """The documents to train on and to hold out with the reference's log-probs.

    compute(docs, groups): groups are the documents of each forward pass. batching: how documents form them, as in training.
    """

    def enrich(docs: Docs) -> list[trees.TreeDoc]:
        lengths, budget, rows = [len(doc.tokens) for doc in docs], batching.get("budget"), batching.get("rows")
        return compute(docs, loader.epoch_plan(lengths, shuffle=False, budget=budget, rows=rows) if docs else [])

    train, val = (load_or_compute(docs, enrich, store, say=say) for docs in (data.train, data.val))
    return data._replace(train=train, val=val)


def digest(docs: Docs) -> str:
    """sha256 of the tokens, their trees, and which of them are scored."""
    total = hashlib.sha256()
    for doc in docs:
        for part in (doc.tokens, doc.branch, doc.start, doc.weight):
            total.update(np.ascontiguousarray(part).tobytes() + b"|")
    return total.hexdigest()
