"""Sequences that begin alike as documents with branches: each read where it would be alone, and fewer tokens."""

import numpy as np
import pytest
import torch

from treetune.core.data import pack, shared_prefixes
from treetune.core.data.shared_prefixes import Scored


def scored(tokens, count):
    ids = np.array(tokens, dtype=np.int32)
    return Scored(ids[:-1], ids[-count:])


def choices(context, *ends):
    return [scored([*context, *end], len(end)) for end in ends]


def path(batch, row):
    """Tokens that a row of the stream sees, itself included, by branch and start alone."""
    doc = int(torch.searchsorted(batch["cu_docs"], row, right=True)) - 1
    first = int(batch["cu_docs"][doc])
    branch = batch.get("branch", torch.zeros_like(batch["tokens"]))
    start = int(batch["start"][row]) if "branch" in batch else 0
    own = [i for i in range(first, row + 1) if branch[i] == branch[row]]
    trunk = [] if branch[row] == 0 else range(first, first + start)
    return batch["tokens"][[*trunk, *own]].tolist()


def check(sequences, documents):
    batch = pack.collate_shared(documents)
    assert sorted(batch["row"].tolist()) == list(range(len(sequences)))
    lens = batch["seq_lens"].tolist()
    parts = zip(batch["row"].tolist(), batch["at"].split(lens), batch["targets"].split(lens), strict=True)
    for number, rows, targets in parts:
        tokens, wanted = sequences[number]
        assert targets.tolist() == wanted.tolist()
        for j, row in enumerate(rows.tolist()):
            seen = tokens[: len(tokens) - len(wanted) + j + 1].tolist()
            assert path(batch, row) == seen and batch["positions"][row] == len(seen) - 1
    return batch


def test_choices_share_their_question_and_one_token_costs_nothing():
    sequences = choices([1, 2, 3, 4], [7], [8], [9]) + choices([5, 6], [7, 8, 9], [7, 7], [3])
    documents = shared_prefixes.share(sequences, 100)
    check(sequences, documents)
    assert sorted(len(doc.tokens) for doc in documents) == [4, 4]  # 5 6 7 8 holds all that is read of the other choices, too


def test_questions_behind_the_same_examples_share_them_where_that_takes_fewer_tokens():
    examples = list(range(50))
    sequences = [one for i in range(4) for one in choices([*examples, 60 + i, 70], [1, 2], [3, 4])]
    (document,) = shared_prefixes.share(sequences, 1000)
    check(sequences, [document])
    assert len(document.tokens) == 53 + 1 + 3 * 2 * 3
    apart = [one for i in range(4) for one in choices([1, *range(60 + 20 * i, 80 + 20 * i)], [1, 2], [3, 4])]
    assert len(shared_prefixes.share(apart, 1000)) == 4


@pytest.mark.parametrize("seed", range(20))
def test_any_sequences_are_read_as_they_would_be_alone(seed):
    random = np.random.default_rng(seed)
    texts = [random.integers(0, 3, random.integers(2, 12)).tolist() for _ in range(30)]
    sequences = [scored(text, int(random.integers(1, len(text)))) for text in texts]
    budget = int(random.integers(12, 60))
    longest = None if seed % 2 else 7
    documents = shared_prefixes.share(sequences, budget, longest=longest)
    check(sequences, documents)
    assert max(len(doc.tokens) for doc in documents) <= budget
    if longest:
        assert not any(doc.branch[-1] and len(sequences[i].tokens) > longest for doc in documents for i in doc.sequences)
    assert sum(len(doc.tokens) for doc in documents) < sum(len(one.tokens) for one in sequences)
