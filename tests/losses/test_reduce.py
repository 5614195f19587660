import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap

from treetune.losses import reduce

STEADY = settings(deadline=None, derandomize=True)  # the same examples on every machine, however busy
ROWS = [[1.0, 2.0], [], [4.0], [0.5, -1.0, 3.0], []]
FLOATS = st.floats(-100, 100)
RAGGED = st.lists(st.lists(FLOATS, max_size=4), max_size=6)


def _flat(rows):
    lens = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    x = torch.tensor([v for row in rows for v in row], dtype=torch.float64)
    return x, torch.repeat_interleave(torch.arange(len(rows)), lens), lens


MODES = {
    "token": (lambda *args: reduce.by_token(*args), lambda o, rows: o.token_mean(rows)),
    "sequence": (lambda *args: reduce.by_sequence(*args), lambda o, rows: o.sequence_mean(rows)),
    "all sequences": (lambda *args: reduce.by_sequence(*args, count_empty=True), lambda o, rows: o.sequence_mean(rows, count_empty=True)),
    "constant": (lambda *args: reduce.by_constant(*args, length=7), lambda o, rows: o.constant_mean(rows, 7)),
}


@pytest.mark.parametrize("mode", MODES)
@STEADY
@given(rows=RAGGED)
def test_equals_the_loop_oracle(mode, oracle, rows):
    ours, theirs = MODES[mode]
    top, bottom = ours(*_flat(rows))
    assert top.ndim == bottom.ndim == 0
    assert top.item() / max(bottom.item(), 1) == pytest.approx(theirs(oracle, rows), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("mode", MODES)
@STEADY
@given(rows=RAGGED, cut=st.integers(0, 6))
def test_any_split_between_sequences_has_the_same_sums(mode, rows, cut):
    whole = MODES[mode][0](*_flat(rows))
    parts = [MODES[mode][0](*_flat(part)) for part in (rows[:cut], rows[cut:])]
    for i in range(2):
        assert whole[i].item() == pytest.approx(sum(part[i].item() for part in parts), rel=1e-12, abs=1e-10)


def test_worked_numbers():
    """Losses [1, 2] and [4] in two micro-batches: 7 / 3, not the mean of means 2.75."""
    tops, bottoms = zip(*(reduce.by_token(*_flat(rows)) for rows in ([[1.0, 2.0]], [[4.0]])), strict=True)
    assert sum(tops) / sum(bottoms) == pytest.approx(2.3333333333)
    assert [part.item() for part in reduce.by_sequence(*_flat(ROWS))] == pytest.approx([1.5 + 4 + 2.5 / 3, 3])
    assert reduce.by_sequence(*_flat(ROWS), count_empty=True)[1] == 5
    assert [part.item() for part in reduce.by_constant(*_flat(ROWS), length=7)] == [9.5, 35]


@STEADY
@given(rows=st.lists(st.lists(st.tuples(FLOATS, st.floats(0, 2)), max_size=4), max_size=6))
def test_weights_equal_the_loop_oracle(oracle, rows):
    x, seq, lens = _flat([[v for v, _ in row] for row in rows])
    weight = torch.tensor([w for row in rows for _, w in row], dtype=torch.float64)
    top, bottom = reduce.by_token(x, seq, lens, weight=weight)
    want = oracle.token_mean([[v for v, _ in row] for row in rows], [[w for _, w in row] for row in rows])
    got = top.item() / bottom.item() if bottom > 0 else top.item()
    assert got == pytest.approx(want, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_token_of_weight_0_adds_exactly_0(bad):
    x = torch.tensor([1.0, bad, 2.0], requires_grad=True)
    top, bottom = reduce.by_token(x, torch.zeros(3, dtype=torch.int64), torch.tensor([3]), weight=torch.tensor([1.0, 0.0, 0.5]))
    assert top == 2.0 and bottom == 1.5
    assert torch.autograd.grad(top, x)[0].tolist() == [1.0, 0.0, 0.5]
    top, _ = reduce.by_token(x, torch.zeros(3, dtype=torch.int64), torch.tensor([3]))
    assert not torch.isfinite(top), "with its weight, it is never swallowed"


@pytest.mark.parametrize("mode", MODES)
def test_nothing_at_all_is_an_attached_0(mode):
    x, seq, lens = _flat([[], []])
    top, _ = MODES[mode][0](x.requires_grad_(), seq, lens)
    assert top == 0 and top.requires_grad
    assert torch.autograd.grad(top, x)[0].shape == (0,)
    assert MODES[mode][0](*_flat([]))[0] == 0


@pytest.mark.parametrize("mode", MODES)
def test_gradients_by_autograd_and_by_vmap(mode):
    x, seq, lens = _flat(ROWS)
    assert torch.autograd.gradcheck(lambda v: MODES[mode][0](v, seq, lens)[0], x.clone().requires_grad_())
    stack = torch.stack([x, 2 * x, -x])
    found = vmap(grad(lambda v: MODES[mode][0](v.square(), seq, lens)[0]))(stack)
    for row, got in zip(stack, found, strict=True):
        leaf = row.clone().requires_grad_()
        torch.testing.assert_close(got, torch.autograd.grad(MODES[mode][0](leaf.square(), seq, lens)[0], leaf)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_low_precision_values_are_summed_in_float32(mode, dtype):
    gen = torch.Generator().manual_seed(0)
    rows = [(torch.rand(size, generator=gen) + 1).to(dtype).tolist() for size in (300, 0, 513, 40)]
    x, seq, lens = _flat(rows)
    top, bottom = MODES[mode][0](x.to(dtype), seq, lens)
    want, _ = MODES[mode][0](x, seq, lens)
    assert top.dtype == torch.float32 and top.item() == pytest.approx(want.item(), rel=1e-5)
    assert MODES[mode][0](x, seq, lens)[0].dtype == torch.float64


def test_per_sequence_sums():
    assert reduce.per_sequence(*_flat(ROWS)).tolist() == [3.0, 0.0, 4.0, 2.5, 0.0]
    x, seq, lens = _flat([[1.0] * 4096])
    assert reduce.per_sequence(x.bfloat16(), seq, lens).item() == 4096
