"""The ops inside a compiled layer and inside a rematerialised one."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from treetune.ops import attention, linear_logprob, rms_norm, rope, swiglu

PLAN = attention.plan({"tokens": torch.zeros(12), "cu_docs": torch.tensor([0, 5, 12])})


def _layer(x, scale, positions, inv_freq):
    h = rms_norm.rms_norm(x, scale, eps=1e-5)
    q, k = rope.rope(h.view(12, 2, 8), h.view(12, 2, 8), positions, inv_freq)
    return swiglu.swiglu(attention.attention(q, k, k, PLAN).reshape(12, 16), h)


def _inputs():
    gen = torch.Generator().manual_seed(0)
    return torch.randn(12, 16, generator=gen).requires_grad_(), torch.ones(16, requires_grad=True), torch.arange(12), torch.ones(4)


def _run(layer, inputs):
    y = layer(*inputs)
    return y, *torch.autograd.grad(y.square().sum(), inputs[:2])


@pytest.mark.more
def test_one_graph_when_compiled():
    compiled = torch.compile(_layer, fullgraph=True, backend="aot_eager")
    for a, b in zip(_run(compiled, _inputs()), _run(_layer, _inputs()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_rematerialisation_changes_no_bit():
    for a, b in zip(_run(lambda *x: checkpoint(_layer, *x, use_reentrant=False), _inputs()), _run(_layer, _inputs()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("trained", [False, True])
def test_rematerialised_head(trained):
    hidden = _inputs()[0]
    weight, targets = torch.linspace(-1, 1, 20 * 16).view(20, 16).requires_grad_(trained), torch.arange(12)

    def head(h):
        return linear_logprob.linear_logprob(h, weight, targets).logp

    grads = [torch.autograd.grad(y.sum(), hidden)[0] for y in (head(hidden), checkpoint(head, hidden, use_reentrant=False))]
    assert torch.equal(*grads)
