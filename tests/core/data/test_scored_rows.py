"""Rows for reward models: the format that columns mean, batches that change nothing, and numbers of known scores."""

import numpy as np
import pytest

from treetune.core.data import scored_rows, sources, trees
from treetune.core.data.scored_rows import ScoredRows


def rows_of(*rows):
    return sources.Rows("rows.jsonl", list(rows), list(range(1, len(rows) + 1)))


def doc(row, length, classes=None):
    zeros = np.zeros(length, np.int32)
    return trees.TreeDoc(zeros, zeros, zeros, np.ones(length, np.float32), row, {}, classes)


@pytest.mark.parametrize(
    ("row", "steps", "format"),
    [
        ({"prompt": "a", "completion": "b"}, False, "prompt_completion"),
        ({"messages": []}, False, "messages"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, False, "passthrough"),
        ({"prompt": "a", "completions": ["b"]}, True, "stepwise_supervised"),
    ],
)
def test_columns_tell_the_format(row, steps, format):
    assert scored_rows.detect(rows_of(row), "auto", steps=steps) == format


@pytest.mark.parametrize(("row", "steps"), [({"question": "a"}, False), ({"prompt": "a", "chosen": "b", "rejected": "c"}, True)])
def test_columns_that_a_model_does_not_score_are_refused(row, steps):
    with pytest.raises(ValueError, match="rows.jsonl has the columns .*reward model scores rows of"):
        scored_rows.detect(rows_of(row), "auto", steps=steps)


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("budget", [9, 20, 1000])
def test_scores_come_in_the_order_of_the_documents(budget, pad):
    docs, done, sizes = [doc(i, i + 2) for i in range(7)], [], []

    def forward(batch, *, documents):
        sizes.append(len(batch["tokens"]))
        return [[float(row)] for row in batch["row"][:documents].tolist()]

    values = scored_rows.score(docs, forward, read="last", budget=budget, pad=pad, progress=done.append)
    assert values == [[float(i)] for i in range(7)] and sum(done) == 7
    assert set(sizes) == {budget} if pad else max(sizes) <= budget


def test_pairs_have_accuracy_and_margin():
    pairs = ScoredRows(rows_of({"chosen": "a"}, {"chosen": "b"}), "passthrough", [doc(2, 3), doc(1, 3)], "", False)
    lines = scored_rows.describe(pairs, [[1.0, 0.5], [0.0, 2.0]])
    assert lines["accuracy"].startswith("0.5000 ") and lines["margin"] == "-0.7500 on average" and lines["pairs"] == "2"
    assert scored_rows.records(pairs, [[1.0, 0.5], [0.0, 2.0]]) == [
        {"chosen": "b", "chosen_score": 1.0, "rejected_score": 0.5}, {"chosen": "a", "chosen_score": 0.0, "rejected_score": 2.0}
    ]  # fmt: skip


def test_accuracy_of_steps_is_by_class():
    docs = [doc(1, 4, np.array([-1, 1, 0, 1], np.int32))]
    lines = scored_rows.describe(ScoredRows(rows_of({}), "stepwise_supervised", docs, "", True), [[0.9, 0.8, 0.2]])
    assert lines["accuracy"] == "0.3333 (0.5000 of 2 good, 0.0000 of 1 bad)" and lines["steps"] == "3 in 1 rows"
    assert "accuracy" not in scored_rows.describe(ScoredRows(rows_of({}), "stepwise_supervised", docs, "", False), [[0.9, 0.8, 0.2]])
