import pytest
import torch

from treetune.ops import clamped_swiglu as op

SIZES = {"alpha": 1.7, "limit": 2.0}


def _inputs(dtype, shape=(33, 70), seed=0):
    gen = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(*shape[:-1], columns, generator=gen).mul(3).to(dtype) for columns in (shape[-1], shape[-1] // 2))
    return x.requires_grad_(), dy


def test_gradcheck():
    x, _ = _inputs(torch.float64, (4, 10))
    assert (x[:, ::2] > 2).any() and (x[:, 1::2].abs() > 2).any()
    assert torch.autograd.gradcheck(lambda x: op.clamped_swiglu(x, **SIZES), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_against_float64(dtype, relative_error):
    x, dy = _inputs(dtype)

    def run(fn, x):
        y = fn(x, **SIZES)
        return y, torch.autograd.grad(y, x, dy.to(y.dtype))[0]

    exact = run(op.clamped_swiglu_ref, x.detach().double().requires_grad_())
    for ours, plain, truth in zip(run(op.clamped_swiglu, x), run(op.clamped_swiglu_ref, x), exact, strict=True):
        assert ours.dtype == dtype and relative_error(ours, truth) <= 1.5 * relative_error(plain, truth) + 1e-7


def test_beyond_the_bounds_nothing_moves():
    x = torch.tensor([[7.5, 7.5], [-1e4, -7.5], [1.0, 7.0]], requires_grad=True)
    y = op.clamped_swiglu(x, alpha=1.702, limit=7.0)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.isfinite(y).all() and y[0, 0].item() == pytest.approx(56.0, rel=1e-4) and y[1, 0] == 0
    assert torch.equal(grad[0], torch.zeros(2)) and grad[1, 1] == 0 and (grad[2] != 0).all()


def test_keeps_nothing_of_its_own(saved_bytes):
    assert saved_bytes(lambda x: op.clamped_swiglu(x, **SIZES), _inputs(torch.bfloat16)[0]) == 0


def test_an_odd_number_of_columns():
    with pytest.raises(ValueError, match="even number of columns"):
        op.clamped_swiglu(torch.zeros(2, 3), **SIZES)
