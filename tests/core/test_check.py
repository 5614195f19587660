import math

import pytest
import torch

from treetune.core import check


@pytest.fixture
def good(batch, documents):
    return batch(documents(weighted=True))


def test_good_batches_pass(good, batch):
    check.batch(good)
    check.batch(batch([]))
    check.batch(good | {"seed": torch.tensor(3)})


@pytest.mark.parametrize(
    "key, change, words",
    [
        ("wieght", lambda b: b["weight"], "batch key 'wieght' has no axis; declare it in core.state.AXES"),
        ("targets", lambda b: b["targets"][1:], "'targets' has .* entries on axis N, but 'at' has"),
        ("positions", lambda b: b["positions"][:-1], "'positions' has .* entries on axis T, but 'tokens' has"),
        ("row", lambda b: b["row"][:-1], "on axis B"),
        ("cu_docs", lambda b: b["cu_docs"] + 1, "cu_docs must rise from 0"),
        ("cu_docs", lambda b: torch.cat([b["cu_docs"][:-1], b["cu_docs"][-1:] - 1]), "cu_docs must rise from 0 to the 97 tokens"),
        ("cu_docs", lambda b: b["cu_docs"][[0, 2, 1, 3, 4, 5, 6, 7, 8]], "cu_docs must rise"),
        ("at", lambda b: b["at"] - 1 - b["at"][0], "at must name rows 0 to 96 of the stream, got -1 to"),
        ("at", lambda b: b["at"] + 97, "at must name rows 0 to 96"),
        ("seq", lambda b: b["seq"].flip(0), "seq must be sorted and agree with seq_lens"),
        ("seq", lambda b: b["seq"] + 1, "seq must be sorted and agree"),
        ("seq_lens", lambda b: b["seq_lens"].flip(0), "agree with seq_lens"),
    ],
)
def test_broken_batches_are_refused(good, key, change, words):
    assert len(good["tokens"]) == 97
    with pytest.raises(ValueError, match=words):
        check.batch(good | {key: change(good)})


def test_not_finite_names_leaves():
    params = {"a": torch.ones(2), "layers": [{"b": torch.tensor([1.0, math.inf])}, {"b": torch.tensor([[math.nan]])}], "i": torch.arange(3)}
    assert check.not_finite(params) == ["layers.0.b", "layers.1.b"]


def test_no_shared_storage():
    one = {"a": torch.ones(4), "b": torch.zeros(0)}
    check.no_shared_storage(one, {"x": torch.ones(4), "b": torch.zeros(0)})
    with pytest.raises(ValueError, match="x shares memory with a; clone it"):
        check.no_shared_storage(one, {"x": one["a"][2:]})
