"""Groups as token trees, under their former names; see core/rollout/documents.py."""

from collections.abc import Callable

from treetune.core.rollout.documents import document, old_logprobs

__all__ = ["document", "scorer"]


def scorer(logprob: Callable, make: Callable, micro: int) -> Callable:
    """`old_logprobs` with the micro-batches of a step."""
    return old_logprobs(logprob, lambda docs: make(range(len(docs)), docs, seed=None), groups_per_batch=micro)
