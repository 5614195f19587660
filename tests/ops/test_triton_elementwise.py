"""Triton kernels of rms_norm, rope, swiglu and geglu under the interpreter: the launchers, on CPU tensors."""

import os

import pytest
import torch

from treetune.ops import clamped_swiglu, geglu, noise, rms_norm, rope, swiglu

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 and a session of its own"),
    pytest.mark.usefixtures("poison"),
]
DTYPES = [torch.float32, torch.float16]  # the interpreter truncates stores in bfloat16
EPS = 1e-5


def _randn(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _check(kernel, plain, exact, relative_error):
    """Kernel errors against float64 are those of the torch formula in the same dtype; two runs agree bit for bit."""
    first, second = kernel(), kernel()
    for a, again, b, truth in zip(first, second, plain(), exact(), strict=True):
        assert torch.equal(a, again) and a.dtype == b.dtype and a.shape == b.shape
        assert relative_error(a, truth) <= 1.5 * relative_error(b, truth) + 1e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "programs"), [((9, 100), 512), ((2, 5, 33), 3), ((1, 17), 512)])
@pytest.mark.parametrize("once", [False, True])
def test_rms_norm(monkeypatch, dtype, shape, programs, once, relative_error):
    monkeypatch.setattr(rms_norm, "PROGRAMS", programs)
    x, dy, scale = _randn(*shape, dtype=dtype), _randn(*shape, dtype=dtype, seed=1), _randn(shape[-1], dtype=dtype, seed=2)

    def run(forward, backward, x, scale, dy):
        y, rstd = forward(x, scale, EPS, once)
        return y, rstd, *backward(dy, x, scale, rstd, True)

    wide = x.double(), scale.double(), dy.double()
    _check(
        lambda: run(rms_norm.forward_triton, rms_norm.backward_triton, x, scale, dy),
        lambda: run(rms_norm.forward_torch, rms_norm.backward_torch, x, scale, dy),
        lambda: run(rms_norm.forward_torch, rms_norm.backward_torch, *wide),
        relative_error,
    )
    assert rms_norm.backward_triton(dy, x, scale, torch.ones(*shape[:-1], 1), False)[1] is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "dim"), [(11, 5, 2, 12), (4, 3, 3, 64), (1, 1, 1, 2)])
@pytest.mark.parametrize(("scale", "sign"), [(1.0, 1), (1.0, -1), (1.3, -1)])
def test_rope(dtype, tokens, heads, kv_heads, dim, scale, sign, relative_error):
    q, k = _randn(tokens, heads, dim, dtype=dtype), _randn(tokens, kv_heads, dim, dtype=dtype, seed=1)
    positions, inv_freq = torch.arange(tokens) * 391, 1 / 10000 ** (torch.arange(0, dim, 2) / dim)

    def exact():
        angles = (positions.float()[:, None] * inv_freq).double()[:, None] * sign
        return [rope._rotate(x.double(), scale * angles.cos(), scale * angles.sin()) for x in (q, k)]

    _check(
        lambda: rope.rotate_triton(q, k, positions, inv_freq, scale, sign),
        lambda: rope.rotate_torch(q, k, positions, inv_freq, scale, sign),
        exact,
        relative_error,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [swiglu, geglu])
@pytest.mark.parametrize("shape", [(9, 257), (1,), (3, 1024)])
def test_gated_units(dtype, op, shape, relative_error):
    gate, up, dy = (_randn(*shape, dtype=dtype, seed=i) * 3 for i in range(3))

    def run(forward, backward, gate, up, dy):
        return forward(gate, up), *backward(dy, gate, up)

    _check(
        lambda: run(op.forward_triton, op.backward_triton, gate, up, dy),
        lambda: run(op.forward_torch, op.backward_torch, gate, up, dy),
        lambda: run(op.forward_torch, op.backward_torch, gate.double(), up.double(), dy.double()),
        relative_error,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 258), (2,), (3, 2048)])
def test_clamped_swiglu(dtype, shape, relative_error):
    x, dy = _randn(*shape, dtype=dtype) * 3, _randn(*shape[:-1], shape[-1] // 2, dtype=dtype, seed=1)

    def run(forward, backward, x, dy):
        return forward(x, 1.7, 2.0), backward(dy, x, 1.7, 2.0)

    _check(
        lambda: run(clamped_swiglu.forward_triton, clamped_swiglu.backward_triton, x, dy),
        lambda: run(clamped_swiglu.forward_torch, clamped_swiglu.backward_torch, x, dy),
        lambda: run(clamped_swiglu.forward_torch, clamped_swiglu.backward_torch, x.double(), dy.double()),
        relative_error,
    )


def test_geglu_of_large_gates_is_finite():
    gate = torch.tensor([-1e30, -1e4, 0.0, 1e4, 1e30])
    one = torch.ones(5)
    assert torch.equal(geglu.forward_triton(gate, one), torch.tensor([0.0, 0.0, 0.0, 1e4, 1e30]))
    assert torch.equal(geglu.backward_triton(one, gate, one)[0], torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(3, 7), (1, 1), (5, 1024), (2, 2049), (0, 4)])
@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_dropout(dtype, rows, columns, rate):
    """The same entries stay, forward and backward, as by the formula."""
    x = _randn(rows, columns, dtype=dtype)
    key = noise.keys(-3, torch.arange(rows), 1 << 40)
    plain = noise.dropout(x, key, rate=rate, stream=9)
    torch.testing.assert_close(noise.dropout_triton(x, key, rate, 9), plain, rtol=1e-6 if dtype == torch.float32 else 1e-3, atol=0)
    if columns > 1:
        part = noise.dropout_triton(x[:, 1:].contiguous(), key, rate, 9, 1)
        torch.testing.assert_close(part, plain[:, 1:], rtol=1e-6 if dtype == torch.float32 else 1e-3, atol=0)
    leaf = x.clone().requires_grad_()
    out = noise._Dropout.apply(leaf, key, rate, 9, 0)
    (grad,) = torch.autograd.grad(out, leaf, x)
    assert torch.equal(grad, out) and torch.equal(out == 0, plain == 0)


def test_slices_of_a_larger_tensor():
    big = _randn(6, 64, dtype=torch.float32)
    left, right = big[:, :32], big[:, 32:]
    torch.testing.assert_close(swiglu.forward_triton(left, right), swiglu.forward_torch(left, right))
    torch.testing.assert_close(rms_norm.forward_triton(left, right[0], EPS)[0], rms_norm.forward_torch(left, right[0], EPS)[0])
    q, k = left.view(6, 2, 16), right.view(6, 2, 16)
    angles = torch.arange(6), torch.ones(8)
    torch.testing.assert_close(rope.rotate_triton(q, k, *angles), rope.rotate_torch(q, k, *angles))


def test_no_rows():
    empty = torch.zeros(0, 8)
    assert swiglu.forward_triton(empty, empty).shape == (0, 8)
    y, rstd = rms_norm.forward_triton(empty, torch.ones(8), EPS)
    dx, dscale = rms_norm.backward_triton(empty, empty, torch.ones(8), rstd, True)
    assert y.shape == dx.shape == (0, 8) and torch.equal(dscale, torch.zeros(8))
    heads = torch.zeros(0, 2, 8)
    assert rope.rotate_triton(heads, heads, torch.arange(0), torch.ones(4))[0].shape == (0, 2, 8)
