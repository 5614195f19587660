import pytest
import torch

from treetune.ops import rms_norm
from treetune.ops.rms_norm import rms_norm_ref

EPS = 1e-5


def _inputs(dtype, *, rows=33, dim=70, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=gen).to(dtype).requires_grad_()
    scale = (torch.rand(dim, generator=gen) + 0.5).to(dtype).requires_grad_()
    return x, scale, torch.randn(rows, dim, generator=gen).to(dtype)


def _run(fn, x, scale, dy):
    y = fn(x, scale, eps=EPS)
    return y, *torch.autograd.grad(y, (x, scale), dy.to(y.dtype))


def test_gradcheck():
    x, scale, _ = _inputs(torch.float64, rows=6, dim=8)
    assert torch.autograd.gradcheck(lambda x, s: rms_norm.rms_norm(x.view(2, 3, 8), s, eps=EPS), (x, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_against_float64_is_that_of_transformers(dtype, relative_error):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x, scale, dy = _inputs(dtype)
    exact = _run(rms_norm_ref, x.detach().double().requires_grad_(), scale.detach().double().requires_grad_(), dy)
    norm = llama.LlamaRMSNorm(x.shape[1], eps=EPS)

    def peer(x, scale, eps):
        return torch.func.functional_call(norm, {"weight": scale}, (x,))

    for ours, theirs, truth in zip(_run(rms_norm.rms_norm, x, scale, dy), _run(peer, x, scale, dy), exact, strict=True):
        assert relative_error(ours, truth) <= 1.5 * relative_error(theirs, truth) + 1e-7


def test_rounds_before_the_scale():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x, scale, _ = _inputs(torch.bfloat16, rows=200)
    norm = llama.LlamaRMSNorm(x.shape[1], eps=EPS)
    norm.weight.data = scale.data
    late = (rms_norm_ref(x.float(), torch.ones(70), eps=EPS) * scale.float()).bfloat16()
    ours = rms_norm.rms_norm(x, scale, eps=EPS)
    assert (ours == norm(x)).float().mean() > 0.999
    assert (ours == late).float().mean() < 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_before_the_one_rounding(dtype, relative_error):
    gemma = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    x, weight, dy = _inputs(dtype, rows=200)
    norm = gemma.Gemma2RMSNorm(x.shape[1], eps=EPS)

    def ours(x, weight):
        return rms_norm.rms_norm(x, 1.0 + weight.float(), eps=EPS, once=True)

    def theirs(x, weight):
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    first, second = (fn(x, weight) for fn in (ours, theirs))
    assert first.dtype == dtype and (first == second).float().mean() > 0.999 - (dtype == torch.float32)
    exact = [leaf.detach().double().requires_grad_() for leaf in (x, weight)]
    truth = torch.autograd.grad(rms_norm_ref(exact[0], 1.0 + exact[1], eps=EPS, once=True), exact, dy.double())
    for a, b, c in zip(*(torch.autograd.grad(y, (x, weight), dy) for y in (first, second)), truth, strict=True):
        assert relative_error(a, c) <= 1.5 * relative_error(b, c) + 1e-7


def test_keeps_only_one_number_per_row(saved_bytes):
    x, scale, _ = _inputs(torch.bfloat16, rows=64)
    assert saved_bytes(lambda x, s: rms_norm.rms_norm(x, s, eps=EPS), x, scale) == 64 * 4


def test_frozen_scale_costs_nothing_and_changes_nothing():
    x, scale, dy = _inputs(torch.float32)
    full = _run(rms_norm.rms_norm, x, scale, dy)
    y = rms_norm.rms_norm(x, scale.detach(), eps=EPS)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], full[1])
    assert rms_norm.backward_torch(dy, x.detach(), scale.detach(), torch.ones(33, 1), False)[1] is None


def test_no_rows(poison):
    x, scale, dy = _inputs(torch.float32, rows=0)
    y, dx, dscale = _run(rms_norm.rms_norm, x, scale, dy)
    assert y.shape == dx.shape == (0, 70) and torch.equal(dscale, torch.zeros(70))


def test_wrong_scale():
    with pytest.raises(ValueError, match=r"scale of shape \(69,\).*expected \[70\]"):
        rms_norm.rms_norm(torch.zeros(2, 70), torch.zeros(69), eps=EPS)
