import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treetune.core.data import formats, pack, sources, spans

INT64 = ("tokens", "positions", "at", "targets", "seq", "seq_lens", "doc_of_seq", "row")


def documents(lengths, seed=0, weights=(0.0, 1.0)):
    draw = np.random.default_rng(seed)
    docs = []
    for row, length in enumerate(lengths):
        weight = draw.choice(np.array(weights, dtype=np.float32), length)
        weight[:1] = 0
        docs.append(spans.Doc(draw.integers(0, 1000, length).astype(np.int32), weight, row + 1))
    return docs


def optimal(lengths, budget):
    return -(-sum(lengths) // budget)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 50), max_size=80),
    spare=st.integers(0, 40),
    seed=st.none() | st.integers(0, 5),
    window=st.integers(1, 100),
)
def test_packing_keeps_every_document_once_and_whole(lengths, spare, seed, window):
    budget = max(lengths, default=1) + spare
    groups = pack.pack(lengths, budget, seed=seed, window=window)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(group and sum(lengths[i] for i in group) <= budget for group in groups)
    assert groups == pack.pack(lengths, budget, seed=seed, window=window)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), spare=st.integers(0, 40))
def test_best_fit_decreasing_against_a_plain_loop(lengths, spare):
    budget = max(lengths) + spare
    rooms = []
    for length in sorted(lengths, reverse=True):
        fits = [i for i, room in enumerate(rooms) if room >= length]
        best = min(fits, key=lambda i: rooms[i], default=None)
        if best is None:
            rooms.append(budget - length)
        else:
            rooms[best] -= length
    got = sorted(budget - sum(lengths[i] for i in group) for group in pack.pack(lengths, budget))
    assert got == sorted(rooms)


def test_packing_is_full_on_realistic_lengths():
    lengths = np.random.default_rng(0).gamma(6, 36, 7473).astype(int).clip(40, 600).tolist()
    groups = pack.pack(lengths, 2048)
    assert optimal(lengths, 2048) / len(groups) >= 0.98
    small = pack.pack(lengths, 2048, window=512)
    assert optimal(lengths, 2048) / len(small) >= 0.95


def test_windows_bound_what_is_mixed():
    groups = pack.pack([3] * 100, 30, seed=None, window=10)
    assert all(max(group) // 10 == min(group) // 10 for group in groups)
    assert pack.pack([3] * 100, 30, seed=1) != pack.pack([3] * 100, 30, seed=2)


def test_a_document_over_the_budget_is_an_error():
    with pytest.raises(ValueError, match="document 2 has 60 tokens, more than the budget of 50 per micro-batch"):
        pack.pack([10, 50, 60], 50)
    with pytest.raises(ValueError, match="1 documents hold 60 tokens, more than the budget of 50"):
        pack.collate(documents([60]), budget=50)


def test_in_order():
    assert pack.group_rows([5] * 7, 3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert sorted(sum(pack.group_rows([5] * 7, 3, seed=1), [])) == list(range(7))
    assert pack.group_rows([], 3) == []
    with pytest.raises(ValueError, match="rows per micro-batch is 0"):
        pack.group_rows([5], 0)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 30), max_size=12), spare=st.none() | st.integers(0, 20), seed=st.integers(0, 99))
def test_the_stream_against_a_plain_loop(lengths, spare, seed):
    """Borders are explicit: cu_docs tiles exactly the T tokens there are, whatever the positions look like."""
    docs = documents(lengths, seed, weights=(0.0, 1.0, 0.5))
    budget = None if spare is None else sum(lengths) + spare
    batch = pack.collate(docs, budget=budget, pad=budget is not None and budget > 0, pad_id=7)
    tokens, positions, borders, at, targets, seq, weight = [], [], [0], [], [], [], []
    for number, doc in enumerate(docs):
        for i, token in enumerate(doc.tokens.tolist()):
            if doc.weight[i] > 0:
                at.append(len(tokens) - 1)
                targets.append(token)
                seq.append(number)
                weight.append(float(doc.weight[i]))
            tokens.append(token)
            positions.append(i)
        borders.append(len(tokens))
    padding = budget - len(tokens) if budget else int(not docs)
    if padding:
        tokens += [7] * padding
        positions += range(padding)
        borders.append(len(tokens))
    expected = {
        "tokens": tokens,
        "positions": positions,
        "cu_docs": borders,
        "at": at,
        "targets": targets,
        "seq": seq,
        "seq_lens": [seq.count(i) for i in range(len(docs))],
        "doc_of_seq": list(range(len(docs))),
        "row": [doc.row for doc in docs],
    }
    assert {key: batch[key].tolist() for key in expected} == expected
    assert batch["cu_docs"].dtype == torch.int32 and all(batch[key].dtype == torch.int64 for key in INT64)
    assert ("weight" in batch) == any(w != 1 for w in weight) and set(batch) <= {*expected, "weight"}
    if "weight" in batch:
        assert batch["weight"].tolist() == weight and batch["weight"].dtype == torch.float32


def test_no_documents_give_a_legal_filler():
    batch = pack.collate([], pad_id=3)
    assert batch["tokens"].tolist() == [3] and batch["cu_docs"].tolist() == [0, 1]
    assert all(len(batch[key]) == 0 for key in ("at", "targets", "seq", "seq_lens", "doc_of_seq", "row"))
    padded = pack.collate([], budget=8, pad=True)
    assert padded["cu_docs"].tolist() == [0, 8] and len(padded["at"]) == 0
    with pytest.raises(ValueError, match="pad needs the budget"):
        pack.collate(documents([3]), pad=True)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("cu_docs", torch.tensor([0, 5], dtype=torch.int32), "borders do not tile"),
        ("cu_docs", torch.tensor([0, 4, 4, 9], dtype=torch.int32), "borders do not tile"),
        ("cu_docs", torch.tensor([0, 3, 9], dtype=torch.int32), "positions do not restart"),
        ("targets", torch.zeros(7, dtype=torch.int64), "not the token after"),
        ("at", torch.tensor([0, 1, 2, 4, 5, 6, 0]), "not the token after"),
        ("seq_lens", torch.tensor([1, 1]), "reads do not match"),
    ],
)
def test_broken_streams_are_caught(key, value, message):
    docs = [spans.Doc(np.arange(1, n + 1, dtype=np.int32) + n, np.array([0] + [1] * (n - 1), np.float32), 1) for n in (4, 5)]
    batch = pack.collate(docs)
    with pytest.raises(AssertionError, match=message):
        pack.check_stream(batch | {key: value})


def test_a_read_across_a_border_is_caught():
    docs = [spans.Doc(np.arange(n, dtype=np.int32), np.array([0] + [1] * (n - 1), np.float32), 1) for n in (4, 5)]
    batch = pack.collate(docs)
    crossed = batch | {"at": torch.tensor([0, 1, 2, 3, 4, 5, 6]), "targets": batch["tokens"][1:8]}
    with pytest.raises(AssertionError, match="scored across its border"):
        pack.check_stream(crossed)


def test_supervised_tokens_survive_packing(tokenizer):
    draw = np.random.default_rng(1)
    rows = [
        {"messages": [{"role": "user", "content": "hello " * int(n)}, {"role": "assistant", "content": "the answer " * int(m)}]}
        for n, m in draw.integers(1, 30, (200, 2))
    ]
    docs, report = formats.encode_rows(sources.from_list(rows), tokenizer)
    lengths = [len(doc.tokens) for doc in docs]
    wanted = sorted(tuple(doc.tokens[doc.weight > 0].tolist()) for doc in docs)
    for groups in (pack.pack(lengths, 512), pack.pack(lengths, 512, seed=None, window=16), pack.group_rows(lengths, 4)):
        batches = [pack.collate([docs[i] for i in group]) for group in groups]
        assert sum(len(batch["at"]) for batch in batches) == report.supervised
        got = [tuple(part.tolist()) for batch in batches for part in batch["targets"].split(batch["seq_lens"].tolist())]
        assert sorted(got) == wanted
        assert sorted(row for batch in batches for row in batch["row"].tolist()) == list(range(1, 201))


def test_a_budget_beyond_all_documents_costs_nothing():
    """A table of rooms of that size would not fit in memory."""
    assert [sorted(group) for group in pack.pack([3, 5, 2], 10**12, seed=None)] == [[0, 1, 2]]
    assert pack.pack([], 10**12) == []
