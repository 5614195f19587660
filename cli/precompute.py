"""What a method computes once for every document before it trains, kept on disk when prepared rows are."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from treetune.cli import corpus
from treetune.cli.screen import Screen
from treetune.core import ckpt
from treetune.core.data import cache, loader, trees
from treetune.core.state import TrainState

NAME = "ref_logp"


class Kept(NamedTuple):
    """The reference's log-probs at the tokens of one document, 0 where none is scored."""

    ref_logp: np.ndarray


def enriched(
    data: corpus.Corpus,
    enrich: Callable,
    state: TrainState,
    make: Callable,
    plan: dict,
    *,
    root: str | None,
    computes: str,
    tokenizer: Any,
    screen: Screen,
) -> corpus.Corpus:
    """The corpus whose documents hold `ref_logp`; root: the folder of prepared rows, if there is one.

    computes: what besides weights and tokens the numbers depend on, such as the dtype that the model computes in.
    """
    weights = ckpt.digest(state.frozen or state.params) if root is not None else ""
    options, sides = {"kept": NAME, "computes": computes}, []
    for docs in (data.train, data.val):
        key = "" if root is None else cache.entry_key(data=[_digest(docs), weights], tokenizer=tokenizer, options=options)
        found = cache.load_entry(root, key) if key else None
        if found is not None:
            screen.line(f"reference log-probs of {len(docs)} documents: prepared earlier")
            sides.append([doc._replace(values={NAME: kept.ref_logp}) for doc, kept in zip(docs, found[0], strict=True)])
            continue
        groups = loader.epoch_plan(corpus.lengths(docs), shuffle=False, **plan) if docs else []
        with screen.counting("documents read by the reference") as count:
            sides.append(enrich(state, docs, make, groups, count))
        if key and docs:
            cache.save_entry(root, key, [Kept(doc.values[NAME]) for doc in sides[-1]])
    return data._replace(train=sides[0], val=sides[1])


def _digest(docs: Sequence[trees.TreeDoc]) -> str:
    """Of the tokens, their tree, and which of them are scored."""
    found = hashlib.sha256()
    for doc in docs:
        for part in (doc.tokens, doc.branch, doc.start, doc.weight):
            found.update(np.ascontiguousarray(part).tobytes() + b"|")
    return found.hexdigest()
