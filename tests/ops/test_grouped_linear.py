"""Products by groups of rows against the formula in float64, and against torch's own grouped product."""

import pytest
import torch

from treetune.ops import grouped_linear as op
from treetune.ops import product

SCALE = 0.7
# Sizes of groups: empty ones first, last and between, one row alone, sizes that no tile divides, all rows in one group, no rows.
GROUPS = {"mixed": (0, 5, 1, 0, 17, 3, 0), "one": (0, 0, 9), "single rows": (1, 1, 1), "none": (0, 0)}


def _ends(sizes):
    return torch.tensor(sizes).cumsum(0).int()


def _inputs(sizes, dtype=torch.float64, *, inner=8, out=16, rank=3, adapted=True):
    gen = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype).requires_grad_()

    count = len(sizes)
    leaves = [draw(sum(sizes), inner), draw(count, out, inner)]
    return leaves + ([draw(count, rank, inner), draw(count, out, rank)] if adapted else []), _ends(sizes)


def _run(fn, leaves, ends, upstream=None):
    """The value and the gradients of all leaves."""
    x, w, *ab = leaves
    y = fn(x, w, ends, dict(zip("AB", ab, strict=True)) if ab else None, scale=SCALE)
    up = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y) if upstream is None else upstream
    return [y, *torch.autograd.grad((y.double() * up).sum(), leaves)]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", GROUPS)
def test_values_and_gradients_equal_the_formula(name, adapted):
    leaves, ends = _inputs(GROUPS[name], adapted=adapted)
    for ours, want in zip(_run(op.grouped_linear, leaves, ends), _run(op.grouped_linear_ref, leaves, ends), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    leaves, ends = _inputs((2, 0, 3), inner=3, out=2, rank=2)

    def fn(x, w, a, b):
        return op.grouped_linear(x, w, ends, {"A": a, "B": b}, scale=SCALE)

    assert torch.autograd.gradcheck(fn, tuple(leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_exact_as_the_formula_in_it(dtype, relative_error):
    sizes = (0, 40, 1, 23, 0)
    exact = _run(op.grouped_linear_ref, *_inputs(sizes, inner=48, out=32, rank=8))
    leaves, ends = _inputs(sizes, dtype, inner=48, out=32, rank=8)
    for ours, plain, truth in zip(_run(op.grouped_linear, leaves, ends), _run(op.grouped_linear_ref, leaves, ends), exact, strict=True):
        assert ours.dtype == dtype and relative_error(ours, truth) <= 1.5 * relative_error(plain, truth) + 1e-7


def test_adapters_stay_float32_leaves():
    (x, w, a, b), ends = _inputs((3, 2), torch.float32)
    y = op.grouped_linear(x.detach().bfloat16(), w.detach().bfloat16(), ends, {"A": a, "B": b})
    grads = torch.autograd.grad(y.float().sum(), [a, b])
    assert y.dtype == torch.bfloat16 and all(leaf.dtype == torch.float32 for leaf in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in GROUPS if name != "none"])
def test_one_call_of_torch_equals_the_loop(dtype, name):
    """`torch._grouped_mm`, which CUDA takes, on the operands that it is given there; it has a CPU version, too."""
    (x, w), ends = _inputs(GROUPS[name], dtype, adapted=False)
    x, w, g = x.detach(), w.detach(), torch.randn(x.shape[0], w.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    bound = torch.finfo(dtype).eps
    for grouped, loop in (
        (op.rows_t_grouped(x, w, ends), op.rows_t_loop(x, w, ends)),
        (op.rows_t_grouped(g, w.transpose(1, 2), ends), op.rows_t_loop(g, w.transpose(1, 2), ends)),
        (op.outer_grouped(g, x, ends), op.outer_loop(g, x, ends)),
    ):
        torch.testing.assert_close(grouped, loop, rtol=2 * bound, atol=8 * bound)


def test_an_expanded_gradient():
    leaves, ends = _inputs(GROUPS["mixed"])
    x, w, a, b = leaves
    ours, want = (fn(x, w, ends, {"A": a, "B": b}, scale=SCALE).sum() for fn in (op.grouped_linear, op.grouped_linear_ref))
    for mine, plain in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)


def test_two_runs_agree_bit_for_bit(poison):
    leaves, ends = _inputs(GROUPS["mixed"], torch.float32)
    first, second = (_run(op.grouped_linear, leaves, ends) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and all(torch.isfinite(leaf).all() for leaf in first)


def test_a_row_does_not_depend_on_the_other_rows_of_its_group():
    """So that a document's numbers stay the same bit for bit when tokens of another one come to its experts, or leave them."""
    (x, w), _ = _inputs((40,), torch.float32, inner=32, out=64, adapted=False)
    if not product.fast(x):
        pytest.skip("this torch has no oneDNN")
    x, w, g = x.detach(), w.detach(), torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    for rows, weight in ((x, w), (g, w.transpose(1, 2))):
        whole = op.rows_t(rows, weight, _ends((40,)))
        for lo, hi in ((0, 1), (39, 40), (3, 5), (7, 10), (1, 18), (5, 40)):
            assert torch.equal(op.rows_t(rows[lo:hi], weight, _ends((hi - lo,))), whole[lo:hi]), (lo, hi)


def test_only_the_input_and_the_low_rank_product_are_saved(saved_bytes):
    leaves, ends = _inputs((20, 30), torch.float32, inner=8, out=64, rank=2)
    x, w, a, b = leaves
    size = saved_bytes(lambda *args: op.grouped_linear(args[0], args[1], args[4], {"A": args[2], "B": args[3]}), x, w, a, b, ends)
    assert size == 50 * 2 * 4


@pytest.mark.parametrize("name", GROUPS)
def test_a_bias_by_group(name):
    sizes, gen = GROUPS[name], torch.Generator().manual_seed(2)
    x, bias = (torch.randn(n, 6, generator=gen, dtype=torch.float64).requires_grad_() for n in (sum(sizes), len(sizes)))
    y = op.grouped_bias(x, bias, _ends(sizes))
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    torch.testing.assert_close(y, x + bias[group], rtol=0, atol=0)
    up = torch.randn(y.shape, generator=gen, dtype=torch.float64)
    ours, want = (torch.autograd.grad(value, [x, bias], up) for value in (y, x + bias[group]))
    for mine, plain in zip(ours, want, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)


def test_sizes_that_do_not_fit_are_refused():
    (x, w), ends = _inputs((3, 2), adapted=False)
    for weight, bounds in ((w[:, :, 1:], ends), (w, ends[:1])):
        with pytest.raises(ValueError, match="grouped_linear got x"):
            op.grouped_linear(x, weight, bounds)


def test_a_second_derivative_is_refused_rather_than_wrong():
    (x, w), ends = _inputs((3, 2), adapted=False)
    (first,) = torch.autograd.grad(op.grouped_linear(x, w, ends).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()
