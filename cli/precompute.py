"""The reference's log-probs of a run's documents, with what is shown while they are computed."""

from collections.abc import Callable, Sequence
from typing import Any

from treetune.cli import corpus
from treetune.cli.screen import Screen
from treetune.core import ckpt
from treetune.core.data import loader, reference_logps, trees
from treetune.core.state import TrainState


def enriched(
    data: corpus.Corpus,
    enrich: reference_logps.Enrich,
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

    def compute(docs: Sequence[trees.TreeDoc]) -> list[trees.TreeDoc]:
        groups = loader.epoch_plan(corpus.lengths(docs), shuffle=False, **plan) if docs else []
        with screen.counting("documents read by the reference") as count:
            return enrich(state, docs, make, groups, count)

    store = None
    if root is not None:
        store = reference_logps.Store(root, ckpt.digest(state.frozen or state.params), computes, tokenizer)
    train, val = (reference_logps.load_or_compute(docs, compute, store, say=screen.line) for docs in (data.train, data.val))
    return data._replace(train=train, val=val)
