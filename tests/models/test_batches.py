"""The padding of streams, as CUDA has it."""

from functools import partial

import numpy as np
import pytest
import torch

from treetune.core.data import pack, trees
from treetune.core.state import AXES
from treetune.models import batches


def _docs(*sizes):
    """Documents of a trunk of 2 tokens and one branch."""
    docs = []
    for size in sizes:
        branch = (np.arange(size) > 1).astype(np.int32)
        docs.append(trees.TreeDoc(np.arange(size, dtype=np.int32), branch, 2 * branch, branch.astype(np.float32), 0, {"advantage": (1.0,)}))
    return docs


@pytest.mark.parametrize(("sizes", "tokens"), [((5, 60), 128), ((128,), 128), ((100, 100), 256), ((), 128)])
def test_streams_without_a_budget_are_whole_blocks(sizes, tokens):
    collate, docs = partial(pack.collate_trees, prompts=True), _docs(*sizes)
    padded, bare = batches.filled(collate, docs, batches.BLOCK), batches.filled(collate, docs, None)
    count = sum(sizes)
    assert padded["tokens"].shape == padded["positions"].shape == (tokens,) and int(padded["cu_docs"][-1]) == tokens
    for name, value in bare.items():
        length = {"T": count, "D+1": len(sizes) + (len(sizes) > 0)}.get(AXES[name], len(value))  # no documents: padding only
        assert torch.equal(padded[name][:length], value[:length]), name
        assert AXES[name] in ("T", "D+1") or len(padded[name]) == len(value), name


def test_a_budget_is_filled():
    assert batches.filled(pack.collate_trees, _docs(5, 60), 300)["tokens"].shape == (300,)
    with pytest.raises(ValueError, match="more than the budget of 60"):
        batches.filled(pack.collate_trees, _docs(5, 60), 60)
