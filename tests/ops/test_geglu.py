import pytest
import torch

from treetune.ops import geglu
from treetune.ops.geglu import geglu_ref


def _inputs(dtype, shape=(33, 70), seed=0):
    gen = torch.Generator().manual_seed(seed)
    gate, up, dy = (torch.randn(shape, generator=gen).mul(3).to(dtype) for _ in range(3))
    return gate.requires_grad_(), up.requires_grad_(), dy


def test_gradcheck():
    gate, up, _ = _inputs(torch.float64, (4, 5))
    assert torch.autograd.gradcheck(geglu.geglu, (gate, up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_against_float64(dtype, relative_error):
    gate, up, dy = _inputs(dtype)

    def run(fn, gate, up):
        y = fn(gate, up)
        return y, *torch.autograd.grad(y, (gate, up), dy.to(y.dtype))

    exact = run(
        lambda g, u: g / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3))) * u,
        *(x.detach().double().requires_grad_() for x in (gate, up)),
    )
    for ours, plain, truth in zip(run(geglu.geglu, gate, up), run(geglu_ref, gate, up), exact, strict=True):
        assert relative_error(ours, truth) <= 1.5 * relative_error(plain, truth) + 1e-7


def test_large_gates_stay_finite():
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], requires_grad=True)
    y = geglu.geglu(gate, torch.ones(5))
    assert torch.equal(y, torch.tensor([0.0, 0.0, 0.0, 100.0, 1e4]))
    assert torch.equal(torch.autograd.grad(y.sum(), gate)[0], torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


def test_keeps_nothing_of_its_own(saved_bytes):
    assert saved_bytes(geglu.geglu, *_inputs(torch.bfloat16)[:2]) == 0


def test_inputs_that_differ():
    with pytest.raises(ValueError, match="expected them alike"):
        geglu.geglu(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bfloat16))
