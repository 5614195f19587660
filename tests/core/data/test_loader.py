import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treetune.core.data import loader, pack, sources

LENGTHS = np.random.default_rng(0).integers(5, 60, 137).tolist()
PLANS = {
    "packed": {"budget": 128},
    "packed small windows": {"budget": 128, "window": 20},
    "packed in order": {"budget": 128, "shuffle": False},
    "rows": {"rows": 4},
    "rows in order": {"rows": 4, "shuffle": False},
}
WEIGHTS = [0.0] * 20 + [1.0] * 40 + [2.5] * 40 + [0.3] * 37


def seen(stream):
    return [index for micro_batches, _ in stream for group in micro_batches for index in group]


@pytest.mark.parametrize("options", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("accum", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_cover_each_document_once_per_epoch(options, accum, world):
    ranks = [list(loader.epoch_steps(LENGTHS, epochs=2, accum=accum, world=world, rank=rank, **options)) for rank in range(world)]
    assert len({len(steps) for steps in ranks}) == 1, "ranks disagree about the number of steps"
    for steps in zip(*ranks, strict=True):
        assert len({len(micro_batches) for micro_batches, _ in steps}) == 1, "ranks disagree about the number of micro-batches"
        assert len({cursor for _, cursor in steps}) == 1
        assert all(len(micro_batches) <= accum for micro_batches, _ in steps)
        assert all(group for group in steps[0][0]), "rank 0 is never idle"
    for epoch in (0, 1):
        of_epoch = [s for steps in ranks for s in in_epoch(steps, epoch)]
        assert Counter(seen(of_epoch)) == Counter(range(len(LENGTHS)))
    per_epoch = [loader.steps_per_epoch(LENGTHS, accum=accum, world=world, epoch=epoch, **options) for epoch in (0, 1)]
    assert len(ranks[0]) == sum(per_epoch)


def in_epoch(steps, epoch):
    """Steps that started in `epoch`: a cursor tells where the next one starts."""
    starts = [loader.START, *[cursor for _, cursor in steps]]
    return [step for step, start in zip(steps, starts, strict=False) if start.epoch == epoch]


def test_a_global_batch_does_not_depend_on_how_it_is_spread():
    reference = list(loader.epoch_steps(LENGTHS, epochs=1, accum=4, budget=128))
    for accum, world in ((2, 2), (1, 4)):
        ranks = [list(loader.epoch_steps(LENGTHS, epochs=1, accum=accum, world=world, rank=rank, budget=128)) for rank in range(world)]
        for (whole, cursor), *parts in zip(reference, *ranks, strict=True):
            assert sorted(seen([(whole, cursor)])) == sorted(seen(parts)) and all(part[1] == cursor for part in parts)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    count=st.integers(1, 60),
    stop=st.integers(0, 200),
    accum=st.integers(1, 4),
    seed=st.integers(0, 9),
    options=st.sampled_from(list(PLANS.values())),
    weighted=st.booleans(),
)
def test_resuming_continues_the_same_stream(count, stop, accum, seed, options, weighted):
    """Stop after any step, take the cursor through JSON, go on: nothing repeats, nothing is missing."""
    lengths = LENGTHS[:count]
    options = options | ({"weights": ([2.5, 1.0, 0.3, 0.0] * 15)[:count]} if weighted else {})
    whole = list(loader.epoch_steps(lengths, epochs=3, accum=accum, seed=seed, **options))
    stop %= len(whole)
    cursor = loader.START if stop == 0 else whole[stop - 1][1]
    state = json.loads(json.dumps(cursor._asdict()))
    assert list(loader.epoch_steps(lengths, cursor=loader.PlanCursor(**state), epochs=3, accum=accum, seed=seed, **options)) == whole[stop:]


@pytest.mark.parametrize("options", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_cover_each_weighted_document_as_often_as_it_appears(options, world):
    ranks = [
        list(loader.epoch_steps(LENGTHS, weights=WEIGHTS, epochs=2, accum=2, world=world, rank=rank, **options)) for rank in range(world)
    ]
    for epoch in (0, 1):
        of_epoch = [s for steps in ranks for s in in_epoch(steps, epoch)]
        assert Counter(seen(of_epoch)) == Counter(loader.appearances(WEIGHTS, epoch=epoch))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_cover_each_row_of_all_shards_once(world):
    rows = sources.from_list([{"text": "x" * n} for n in LENGTHS])
    found = Counter()
    for index in range(3):
        part = sources.take_shard(rows, 3, index)
        lengths = [len(row["text"]) for row in part.rows]
        for rank in range(world):
            stream = loader.epoch_steps(lengths, epochs=1, accum=2, world=world, rank=rank, budget=128)
            found.update(part.numbers[i] for i in seen(stream))
    assert found == Counter(range(1, len(LENGTHS) + 1))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 4) | st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=40), st.integers(0, 99), st.integers(0, 9))
def test_appearances_are_the_floor_or_one_more(weights, seed, epoch):
    if not any(weights):
        return
    counts = Counter(loader.appearances(weights, seed=seed, epoch=epoch))
    for i, weight in enumerate(weights):
        assert int(weight) <= counts[i] <= int(weight) + (weight > int(weight))
    assert abs(counts.total() - sum(weights)) < 1 + 1e-6
    for weight in set(weights):
        alike = [i for i, other in enumerate(weights) if other == weight]
        assert abs(sum(counts[i] for i in alike) - weight * len(alike)) < 1 + 1e-6


def test_every_document_appears_with_its_own_probability():
    """400 epochs: a share of 0.3 has a standard deviation of 0.023 if the draws of a document are independent."""
    weights = [0.3] * 10 + [1.75] * 10 + [0.9]
    totals = sum((Counter(loader.appearances(weights, epoch=epoch)) for epoch in range(400)), Counter())
    assert all(abs(totals[i] / 400 - weight) < 0.1 for i, weight in enumerate(weights))
    assert len({tuple(loader.appearances(weights, epoch=epoch)) for epoch in range(20)}) > 15
    assert loader.appearances(weights, seed=1) == loader.appearances(weights, seed=1) != loader.appearances(weights, seed=2)


@pytest.mark.parametrize(
    ("weights", "message"), [([1, -1], "document 1 has weight -1"), ([float("nan")], "nan"), ([0, 0], "all weights are 0")]
)
def test_weights_that_make_no_sense(weights, message):
    with pytest.raises(ValueError, match=message):
        loader.epoch_plan([5] * len(weights), rows=1, weights=weights)


def test_weights_of_1_change_nothing():
    for options in PLANS.values():
        assert loader.epoch_plan(LENGTHS, weights=[1] * len(LENGTHS), **options) == loader.epoch_plan(LENGTHS, **options)
    assert loader.document_weights([2, 3], [1, 1.0]) is None
    assert loader.document_weights([2, 1], [1, 0.5]) == [1.0, 1.0, 0.5]


def test_resuming_with_other_ranks_and_accumulation_misses_nothing():
    first = list(loader.epoch_steps(LENGTHS, epochs=1, accum=2, world=2, rank=0, budget=128))[:3]
    second = list(loader.epoch_steps(LENGTHS, epochs=1, accum=2, world=2, rank=1, budget=128))[:3]
    rest = list(loader.epoch_steps(LENGTHS, cursor=first[-1][1], epochs=1, accum=3, world=1, budget=128))
    assert Counter(seen(first) + seen(second) + seen(rest)) == Counter(range(len(LENGTHS)))


def test_the_last_step_of_an_epoch_takes_what_is_left():
    steps = list(loader.epoch_steps([5] * 7, epochs=1, accum=2, rows=2, shuffle=False))
    assert [micro_batches for micro_batches, _ in steps] == [[[0, 1], [2, 3]], [[4, 5], [6]]]
    assert [cursor for _, cursor in steps] == [(0, 2), (1, 0)]
    steps = list(loader.epoch_steps([5] * 5, epochs=1, accum=2, rows=2, shuffle=False))
    assert [micro_batches for micro_batches, _ in steps] == [[[0, 1], [2, 3]], [[4]]]
    plan = loader.epoch_plan([5] * 5, rows=1, shuffle=False)
    assert [loader.next_step(plan, loader.PlanCursor(0, 4), world=4, rank=rank)[0] for rank in range(4)] == [[[4]], [[]], [[]], [[]]]
    assert len(pack.collate([])["at"]) == 0


def test_epochs_and_seeds_differ_and_order_can_be_kept():
    plans = [loader.epoch_plan(LENGTHS, rows=1, seed=seed, epoch=epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len({json.dumps(plan) for plan in plans}) == 3
    kept = [loader.epoch_plan(LENGTHS, rows=4, shuffle=False, seed=seed, epoch=epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert kept[0] == kept[1] == kept[2] == pack.group_rows(LENGTHS, 4)
    packed = loader.epoch_plan(LENGTHS, budget=128, shuffle=False)
    assert packed == loader.epoch_plan(LENGTHS, budget=128, shuffle=False, epoch=3)
    assert [min(group) for group in packed] == sorted(min(group) for group in packed)


def test_shuffled_packs_are_not_sorted_by_length():
    plan = loader.epoch_plan(LENGTHS * 10, budget=64)
    longest = [max((LENGTHS * 10)[i] for i in group) for group in plan]
    thirds = np.array_split(longest, 3)
    assert max(part.mean() for part in thirds) - min(part.mean() for part in thirds) < 8


@pytest.mark.parametrize("options", [{}, {"budget": 10, "rows": 2}])
def test_one_of_budget_and_rows(options):
    with pytest.raises(ValueError, match="give exactly one"):
        loader.epoch_plan([5], **options)


def test_digest_tells_plans_apart():
    base = loader.plan_fingerprint(LENGTHS, budget=128, seed=0)
    assert base == loader.plan_fingerprint(np.array(LENGTHS), seed=0, budget=128)
    others = [
        loader.plan_fingerprint(LENGTHS[:-1], budget=128, seed=0),
        loader.plan_fingerprint(LENGTHS, budget=129, seed=0),
        loader.plan_fingerprint(LENGTHS, budget=128, seed=1),
        loader.plan_fingerprint(LENGTHS[::-1], budget=128, seed=0),
    ]
    assert len({base, *others}) == 5
