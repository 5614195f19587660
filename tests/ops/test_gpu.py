"""What only a GPU can tell: bfloat16 kernels, and the CUDA attention backends with their gradients."""

import pytest
import torch

from treetune.ops import attention, clamped_swiglu, grouped_linear, linear_logprob, rms_norm, rope, swiglu

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def _randn(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype).requires_grad_()


def _run(fn, leaves):
    out = fn(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    coefficients = [torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x).to(x.dtype) for x in out]
    return *out, *torch.autograd.grad(out, leaves, coefficients)


def _check(kernel, plain, leaves, relative_error, slack=1.5):
    wide = [x.detach().double().requires_grad_() for x in leaves]
    first, second = _run(kernel, leaves), _run(kernel, leaves)
    for a, again, b, truth in zip(first, second, _run(plain, leaves), _run(plain, wide), strict=True):
        assert torch.equal(a, again)
        assert relative_error(a, truth) <= slack * relative_error(b, truth) + 1e-6


def test_rms_norm(relative_error):
    leaves = [_randn(1000, 2049), _randn(2049, seed=1)]
    _check(lambda x, s: rms_norm.rms_norm(x, s, eps=1e-5), lambda x, s: rms_norm.rms_norm_ref(x, s, eps=1e-5), leaves, relative_error)


@pytest.mark.parametrize(("inner", "rank"), [(256, 8), (100, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_grouped_linear(relative_error, dtype, inner, rank):
    """`torch._grouped_mm` and the Triton kernels: empty groups, one row alone, sizes that no tile divides."""
    ends = torch.tensor([0, 300, 301, 301, 777, 777], device="cuda", dtype=torch.int32)
    shapes = ((777, inner), (6, 192, inner), (6, rank, inner), (6, 192, rank))
    leaves = [_randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]

    def run(fn):
        return lambda x, w, a, b: fn(x, w, ends, {"A": a, "B": b}, scale=0.5)

    _check(run(grouped_linear.grouped_linear), run(grouped_linear.grouped_linear_ref), leaves, relative_error)


def test_clamped_swiglu(relative_error):
    sizes = {"alpha": 1.702, "limit": 2.0}
    plain, kernel = clamped_swiglu.clamped_swiglu_ref, clamped_swiglu.clamped_swiglu
    _check(lambda x: kernel(x, **sizes), lambda x: plain(x, **sizes), [_randn(1000, 514)], relative_error)


def test_rope(relative_error):
    positions, inv_freq = torch.arange(500, device="cuda") * 200, 1 / 10000 ** (torch.arange(0, 128, 2, device="cuda") / 128)
    leaves = [_randn(500, 12, 128), _randn(500, 3, 128, seed=1)]
    _check(lambda q, k: rope.rope(q, k, positions, inv_freq), lambda q, k: rope.rope_ref(q, k, positions, inv_freq), leaves, relative_error)


def test_swiglu(relative_error):
    _check(swiglu.swiglu, swiglu.swiglu_ref, [_randn(1000, 3001), _randn(1000, 3001, seed=1)], relative_error)


@pytest.mark.parametrize("options", [{}, {"softcap": 30.0, "temperature": 0.7}])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("fields", [("logp",), ("logp", "entropy", "lse", "mean_logit")])
def test_linear_logprob(options, frozen, fields, relative_error):
    hidden, weight, targets = _randn(1500, 128), _randn(5001, 128, seed=1).detach().div(4), torch.arange(1500, device="cuda")
    want = tuple(f for f in fields if f in linear_logprob.WANT)
    leaves = [hidden] if frozen else [hidden, weight.requires_grad_()]

    def of(fn):
        def run(h, w=weight):
            stats = fn(h, w.to(h.dtype) if frozen else w, targets, want=want, **options)
            return tuple(getattr(stats, f) for f in fields)

        return run

    _check(of(linear_logprob.linear_logprob), of(linear_logprob.linear_logprob_ref), leaves, relative_error)


def _batch(branches):
    batch = {"cu_docs": torch.tensor([0, 300, 300, 1000], dtype=torch.int32), "tokens": torch.zeros(1000, dtype=torch.int64)}
    batch["positions"] = torch.cat([torch.arange(300), torch.arange(700)])
    if branches:
        batch["branch"], batch["start"] = torch.zeros(1000, dtype=torch.int32), torch.zeros(1000, dtype=torch.int32)
        for b, (lo, hi, leave) in enumerate([(700, 800, 100), (800, 1000, 400)], 1):
            batch["branch"][lo:hi], batch["start"][lo:hi] = b, leave
            batch["positions"][lo:hi] = torch.arange(leave, leave + hi - lo)
    return batch


@pytest.mark.parametrize(
    ("softcap", "sinks", "width"), [(None, False, 64), (None, False, 32), (2.0, False, 64), (None, True, 64), (2.0, True, 32)]
)
@pytest.mark.parametrize("window", [None, 64, 200])
@pytest.mark.parametrize("branches", [False, True])
def test_attention(branches, window, softcap, sinks, width, relative_error):
    batch, device = _batch(branches), torch.device("cuda", torch.cuda.current_device())
    plan = attention.plan(batch, windows=(None, 64, 200), plain=softcap is None and not sinks, device=device).of(window)
    here = {key: value.cuda() for key, value in batch.items()}
    leaves = [_randn(1000, *size, seed=i) for i, size in enumerate(((6, 64), (2, 64), (2, width)))] + [_randn(6, seed=3)] * sinks
    wide = [x.detach().double().requires_grad_() for x in leaves]

    def plain(q, k, v, logits=None):
        return attention.attention_ref(q, k, v, here, window=window, softcap=softcap, sinks=logits)

    ours = _run(lambda q, k, v, logits=None: attention.attention(q, k, v, plan, softcap=softcap, sinks=logits), leaves)
    for a, b, truth in zip(ours, _run(plain, leaves), _run(plain, wide), strict=True):
        slack = 2 if a.ndim == 1 else 1.5  # roundings average less in the six numbers of the sinks' gradient
        assert relative_error(a, truth) <= slack * relative_error(b, truth) + 1e-3


def test_documents_are_isolated_bit_for_bit():
    for branches in (False, True):
        plan = attention.plan(_batch(branches), device=torch.device("cuda", torch.cuda.current_device()))
        q, k, v = (_randn(1000, heads, 64, seed=i).detach() for i, heads in enumerate((6, 2, 2)))
        before = attention.attention(q, k, v, plan)
        for x in (q, k, v):
            x[:300] += 1
        assert torch.equal(before[300:], attention.attention(q, k, v, plan)[300:])
