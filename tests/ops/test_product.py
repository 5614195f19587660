"""Products with a weight against torch's own, for few rows and many."""

import ctypes
import subprocess
import sys

import pytest
import torch

from treetune.ops import product

CASES = [
    (torch.float32, 1, 1e-5),
    (torch.float32, 7, 1e-5),
    (torch.float32, 100, 1e-5),
    (torch.float64, 100, 1e-13),
    (torch.bfloat16, 100, 0.0),
]


def _inputs(dtype, rows):
    gen = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=gen).to(dtype) for shape in ((rows, 48), (80, 48), (rows, 80), (rows, 48)))


@pytest.mark.parametrize(("dtype", "rows", "bound"), CASES)
def test_each_product_equals_the_matrix_product(dtype, rows, bound):
    x, w, g, add = _inputs(dtype, rows)
    torch.testing.assert_close(product.rows_t(x, w), x @ w.T, rtol=bound, atol=10 * bound)
    torch.testing.assert_close(product.rows(g, w), g @ w, rtol=bound, atol=10 * bound)
    torch.testing.assert_close(product.rows(g, w, add=add.clone()), add.addmm(g, w), rtol=bound, atol=10 * bound)
    torch.testing.assert_close(product.outer(g, x), g.T @ x, rtol=bound, atol=10 * bound)


@pytest.mark.parametrize(("dtype", "rows", "bound"), CASES)
def test_linear_has_the_gradients_of_the_matrix_product(dtype, rows, bound):
    x, w, g, _ = _inputs(dtype, rows)
    leaves = [x.requires_grad_(), w.requires_grad_()]
    ours, plain = (torch.autograd.grad(fn(x, w), leaves, g) for fn in (product.linear, lambda x, w: x @ w.T))
    for mine, want in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, want, rtol=bound, atol=10 * bound)


@pytest.mark.parametrize("rows", [7, 100])
def test_gradients_leave_the_product_bit_for_bit_as_it_is(rows):
    x, w, *_ = _inputs(torch.float32, rows)
    assert torch.equal(product.linear(x, w.requires_grad_()), product.rows_t(x, w.detach()))


def test_rows_that_do_not_depend_on_their_number():
    x, w, *_ = _inputs(torch.float32, 100)
    if not product.fast(x):
        pytest.skip("this torch has no oneDNN")
    whole = product.even_rows_t(x, w)
    torch.testing.assert_close(whole, x @ w.T)
    assert all(torch.equal(product.even_rows_t(x[lo:hi], w), whole[lo:hi]) for lo in (0, 1, 40) for hi in (41, 42, 57, 100))
    assert torch.equal(product.even_rows_t(x.double(), w.double()), x.double() @ w.double().T)


def test_a_strided_weight_and_no_rows():
    x, w, *_ = _inputs(torch.float32, 100)
    torch.testing.assert_close(product.rows_t(x, w.T.contiguous().T), x @ w.T)
    assert product.linear(x[:0], w).shape == (0, 80)


def test_only_float32_rows_on_the_cpu_take_onednn():
    x = torch.zeros(3, 4)
    assert product.fast(x) == product.fast(x[:1]) == torch.backends.mkldnn.is_available()
    assert not product.fast(x[:0]) and not product.fast(x.double()) and not product.fast(x.bfloat16()) and not product.fast(x.to("meta"))


GROWTH = """
import ctypes, sys
import torch
from treetune.ops import product

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL("libc.so.6")
libc.mallinfo2.restype = Info
w = torch.randn(48, 32)

def run(sizes):
    for size in sizes:
        product.rows_t(torch.randn(size, 32), w)

run(range(1, 200))
before = libc.mallinfo2().uordblks
run(range(200, 800))
print(libc.mallinfo2().uordblks - before)
"""


@pytest.mark.more
@pytest.mark.skipif(not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc's mallinfo2")
@pytest.mark.skipif(not product.fast(torch.ones(1, 1)), reason="torch has no oneDNN here")
def test_stream_lengths_leave_nothing_behind():
    """600 lengths that never come again: what is compiled for them does not pile up (265 MB with their own limits)."""
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4e6


@pytest.fixture
def choosing():
    yield product.choose
    product.choose(product.Choice())


@pytest.mark.parametrize("name", product.CANDIDATES)
@pytest.mark.parametrize("rows", [1, 16, product.FEW, product.FEW + 1, 100])
def test_every_candidate_is_the_product(choosing, name, rows):
    x, w, _, _ = _inputs(torch.float32, rows)
    choosing(product.Choice(name, name))
    want = x.double() @ w.double().T
    got = product.rows_t(x, w)
    assert got.is_contiguous() and (got - want).norm() <= 1e-6 * want.norm()
    added = product.rows_t(x, w, torch.zeros_like(got))
    assert torch.equal(added, got), "an adapter that adds nothing changes no bit"
    back = product.rows(got, w)
    assert (back - got.double() @ w.double()).norm() <= 1e-6 * back.norm()


def test_the_choice_goes_by_the_number_of_rows(choosing, monkeypatch):
    asked = []
    fake = {name: lambda x, w, add, name=name: asked.append(name) for name in product.CANDIDATES}
    monkeypatch.setattr(product, "CANDIDATES", fake)
    choosing(product.Choice("torch", "onednn turned"))
    if product.fast(torch.ones(1, 1)):
        product.rows_t(torch.ones(product.FEW, 2), torch.ones(3, 2))
        product.rows_t(torch.ones(product.FEW + 1, 2), torch.ones(3, 2))
        assert asked == ["torch", "onednn turned"]
    with pytest.raises(ValueError, match="product 'cublas' is not one of onednn, "):
        choosing(product.Choice("cublas"))


def test_noise_does_not_choose(monkeypatch):
    """Another than oneDNN must be faster by a margin; what is clearly faster is taken."""
    clock, cost = [0.0], {"onednn": 1.0, "onednn turned": 0.9, "torch": 1.2, "torch turned": 2.0}

    def spend(name):
        def run(x, w, add):
            clock[0] += cost[name]

        return run

    monkeypatch.setattr(product, "CANDIDATES", {name: spend(name) for name in cost})
    monkeypatch.setattr(product.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(product, "fast", lambda x: True)
    assert product.measure() == product.Choice("onednn", "onednn")
    cost["torch turned"] = 0.5
    assert product.measure() == product.Choice("torch turned", "torch turned")
