"""Triton kernels of linear_logprob under the interpreter: the launchers on logits, and the whole op with its dispatch turned."""

import os

import pytest
import torch

from treetune.ops import backend, linear_logprob, logprob_kernels

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 and a session of its own"),
    pytest.mark.usefixtures("poison"),
]
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "temperature": {"temperature": 0.7},
    "both": {"softcap": 30.0, "temperature": torch.linspace(0.5, 1.5, 11)},
}


def _inputs(dtype, *, n=11, dim=24, vocab=150):
    gen = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, dim, generator=gen).to(dtype), torch.randn(vocab, dim, generator=gen).div(3).to(dtype)
    bias = torch.randn(vocab, generator=gen).to(dtype)
    bias[7] = -torch.inf
    targets = torch.randint(8, vocab, (n,), generator=gen)
    return hidden, weight, bias, targets


def _run(fn, hidden, weight, bias, targets, frozen, fields, want, options):
    leaves = [x.detach().clone().requires_grad_() for x in ([hidden] if frozen else [hidden, weight, bias])]
    given = [*leaves, weight, bias] if frozen else leaves
    stats = fn(given[0], given[1], targets, bias=given[2], want=want, **options)
    total = sum((getattr(stats, f) * torch.linspace(0.5, 2, len(hidden))).sum() for f in fields)
    return [x for x in stats if x is not None], torch.autograd.grad(total, leaves)


@pytest.fixture
def kernels(monkeypatch):
    """Run op(...) with the kernels in place of the torch formulas, in chunks of 8 rows and blocks of 64 columns."""
    width = backend.block_of
    monkeypatch.setattr(backend, "block_of", lambda n, most=64: width(n, min(most, 64)))

    def run(*args):
        with monkeypatch.context() as patch:
            patch.setattr(backend, "use_triton", lambda x: True)
            patch.setitem(linear_logprob.ROWS, "cpu", 8)
            return _run(linear_logprob.linear_logprob, *args)

    return run


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float32) for name in OPTIONS), ("both", torch.float16)])
@pytest.mark.parametrize(
    ("frozen", "fields", "want"),
    [
        (True, ("logp",), ()),
        (True, ("logp",), ("entropy", "top1", "topk_entropy", "logsq")),
        (False, ("logp",), ()),
        (False, ("logp", "entropy", "lse", "mean_logit"), linear_logprob.WANT),
        (True, ("mean_logit", "entropy"), ("mean_logit", "entropy")),
    ],
)
def test_op(kernels, name, dtype, frozen, fields, want, relative_error):
    hidden, weight, bias, targets = _inputs(dtype)
    args = targets, frozen, fields, want, OPTIONS[name]
    stats, grads = kernels(hidden, weight, bias, *args)
    again = kernels(hidden, weight, bias, *args)
    plain = _run(linear_logprob.linear_logprob, hidden, weight, bias, *args)
    exact = _run(linear_logprob.linear_logprob_ref, hidden.double(), weight.double(), bias.double(), *args)
    for got, repeat, peer, truth in zip((stats, grads), again, plain, exact, strict=True):
        for a, b, c, d in zip(got, repeat, peer, truth, strict=True):
            assert torch.equal(a, b) and a.dtype == c.dtype
            if a.dtype == torch.bool:
                assert torch.equal(a, d)
            else:
                assert relative_error(a, d) <= 1.5 * relative_error(c, d) + 2e-7


@pytest.mark.parametrize("vocab", [1, 16, 129])
def test_odd_vocabularies(kernels, vocab):
    hidden, weight, bias, _ = _inputs(torch.float32, vocab=max(vocab, 9))
    args = (
        hidden,
        weight[:vocab],
        bias[:vocab].nan_to_num(neginf=0),
        torch.arange(11) % vocab,
        False,
        ("logp", "entropy"),
        linear_logprob.WANT,
        {},
    )
    stats, grads = kernels(*args)
    for a, b in zip([*stats, *grads], sum(map(list, _run(linear_logprob.linear_logprob, *args)), []), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [16, 64])
def test_first_of_tied_logits_is_top1(monkeypatch, block):
    monkeypatch.setattr(backend, "block_of", lambda n, most: block)  # ties across blocks and within one
    z = torch.zeros(4, 40)
    z[:2, [5, 20]] = 1.0
    stats, _ = logprob_kernels.stats(z, torch.tensor([5, 20, 0, 1]), 1.0, None, extras=True, ahead=None)
    assert stats["top1"].tolist() == [1, 0, 1, 0]


def test_banned_target():
    z = torch.tensor([[0.0, -torch.inf, 1.0]])
    stats, dz = logprob_kernels.stats(z.clone(), torch.tensor([1]), 1.0, None, extras=True, ahead=torch.float32)
    assert stats["logp"].item() == -torch.inf and dz.isfinite().all()
    torch.testing.assert_close(stats["entropy"], torch.tensor([0.5822]), rtol=0, atol=5e-5)
    torch.testing.assert_close(stats["mean_logit"], torch.tensor([0.5]))


def test_small_softcapped_logits_keep_their_digits():
    z = torch.linspace(-1e-2, 1e-2, 64)[None]
    stats, _ = logprob_kernels.stats(z.clone(), torch.tensor([63]), 1.0, 30.0, extras=False, ahead=None)
    exact = (30 * torch.tanh(z.double() / 30)).log_softmax(-1)[0, 63]
    assert abs(stats["logp"].item() - exact.item()) < 5e-7
