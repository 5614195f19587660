"""Documents of data sets: what is held out, kept for later runs, left out as repeated, and fits a model."""

import json

import numpy as np
import pytest

from treetune.core.data import dataset, loading, trees
from treetune.core.data.dataset import RowSettings

PAIRS = [{"prompt": f"{i} + 1 = ", "chosen": f"{i + 1}", "rejected": f"{i + 5}, or so"} for i in range(8)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def byte_tokenizer(make_tokenizer):
    """A token for each character, and no BOS."""
    return make_tokenizer("byte")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def load(tokenizer, path, kind="pairs", **settings):
    return loading.load(kind, RowSettings((path,), **settings), tokenizer, seed=1)


def same(one, other):
    """Whether two documents hold the same, field by field."""
    equal = [np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in zip(one, other, strict=True)]
    return all(equal)


@pytest.mark.parametrize("kind", ["pairs", "unpaired", "ranked", "steps"])
def test_prepared_trees_come_back_whole_and_to_their_own_kind(here, byte_tokenizer, kind):
    rows = {
        "unpaired": [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2} for i, row in enumerate(PAIRS)],
        "steps": [{"prompt": "a", "completions": ["b", "c"], "labels": [1, 0]}] * 8,
    }.get(kind, [row | {"margin": i / 2} for i, row in enumerate(PAIRS)])
    write(here / "rows.jsonl", rows)
    keys = {"kind": kind, "prepared_folder": "kept", "val_set_size": 0.25}
    fresh = load(byte_tokenizer, "rows.jsonl", kind, val_set_size=0.25)
    first, second = (load(byte_tokenizer, "rows.jsonl", **keys) for _ in range(2))
    assert (
        "(prepared earlier)" not in first.lines[0] and "(prepared earlier)" in second.lines[0] and "(prepared earlier)" in second.lines[1]
    )
    for made in (first, second):
        assert len(made.train) == 6 and len(made.val) == 2
        assert all(map(same, made.train + made.val, fresh.train + fresh.val))
    if kind == "pairs":  # the same rows and options, read as another kind
        assert "(prepared earlier)" not in load(byte_tokenizer, "rows.jsonl", **keys | {"kind": "ranked"}).lines[0]


def test_held_out_rows_may_be_of_one_class_but_training_rows_not(here, byte_tokenizer):
    rows = [{"prompt": row["prompt"], "completion": "yes", "label": i > 3} for i, row in enumerate(PAIRS)]
    write(here / "both.jsonl", rows)
    write(here / "good.jsonl", rows[4:])
    assert len(load(byte_tokenizer, "both.jsonl", "unpaired", val_data=("good.jsonl",)).val) == 4
    with pytest.raises(ValueError, match="4 rows are desirable .* and 0 undesirable"):
        load(byte_tokenizer, "good.jsonl", "unpaired", val_data=("both.jsonl",))


def test_repeated_pairs_go(here, byte_tokenizer):
    write(here / "rows.jsonl", [*PAIRS, PAIRS[0]])
    found = load(byte_tokenizer, "rows.jsonl", drop_duplicates=True, val_set_size=0)
    assert len(found.train) == 8 and "1 repeated rows left out" in found.lines[0]


def test_the_budget_of_pairs_and_the_models_positions(here, byte_tokenizer):
    write(here / "rows.jsonl", [{"prompt": "a", "chosen": "b" * 30, "rejected": "c" * 30}])
    docs = load(byte_tokenizer, "rows.jsonl", sequence_len=32).train
    sizes = {"packing": True, "sequence_len": 32}
    assert dataset.lengths(docs) == [63] and trees.side_lengths(docs[0]) == [32, 32]
    assert [dataset.batching(**sizes, micro_batch_size=n, longest=63) for n in (1, 2)] == [{"budget": 63}, {"budget": 64}]
    assert dataset.batching(**sizes, micro_batch_size=1) == {"budget": 32}
    assert dataset.batching(packing=False, sequence_len=32, micro_batch_size=3) == {"rows": 3}
    dataset.check_fits(docs, 32, vocab_size=1000, max_positions=32)
    with pytest.raises(ValueError, match="sequence_len 32 is longer than the 31 positions"):
        dataset.check_fits(docs, 32, vocab_size=1000, max_positions=31)
    with pytest.raises(ValueError, match="row 1 has 32 positions, the model 31"):
        dataset.check_fits(docs, 31, vocab_size=1000, max_positions=31)
    with pytest.raises(ValueError, match="row 1 has 32 positions; answers that share a prompt have at most 31 in this model"):
        dataset.check_fits(docs, 32, vocab_size=1000, max_positions=64, shared_positions=31)


def test_ids_of_another_tokenizer_are_refused(here, byte_tokenizer):
    write(here / "rows.jsonl", PAIRS)
    docs = load(byte_tokenizer, "rows.jsonl").train
    with pytest.raises(ValueError, match=r"the rows hold token id \d+, the model has 3: the tokenizer is of another model"):
        dataset.check_fits(docs, 32, vocab_size=3, max_positions=64)


def test_steps_of_a_run_on_pairs(here, byte_tokenizer):
    write(here / "rows.jsonl", PAIRS)
    docs = load(byte_tokenizer, "rows.jsonl", val_set_size=0).train
    assert dataset.total_steps(docs, epochs=3, max_steps=None, accum=2, world=1, rows=2, shuffle=True, seed=0) == 6
