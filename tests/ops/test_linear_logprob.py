import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from treetune.ops import linear_logprob as op
from treetune.ops import logprob_torch
from treetune.ops.linear_logprob import linear_logprob

DIFFERENTIABLE = ("logp", "entropy", "lse", "mean_logit")
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "temperature": {"temperature": 0.7},
    "both": {"softcap": 3.0, "temperature": torch.linspace(0.5, 1.5, 13, dtype=torch.float64)},
}


def _inputs(dtype=torch.float64, *, n=13, dim=7, vocab=37, seed=0, spread=1.0):
    gen = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, dim, generator=gen, dtype=torch.float64).to(dtype)
    weight = (torch.randn(vocab, dim, generator=gen, dtype=torch.float64) * spread).to(dtype)
    bias = torch.randn(vocab, generator=gen, dtype=torch.float64).to(dtype)
    return hidden, weight, bias, torch.randint(0, vocab, (n,), generator=gen)


def _dense(hidden, weight, bias, targets, softcap=None, temperature=1.0):
    """The definitions, from whole logits, with other functions of torch than the op uses."""
    z = F.linear(hidden, weight, bias)
    z = z if softcap is None else torch.tanh(z / softcap) * softcap
    z = z / torch.as_tensor(temperature, dtype=z.dtype).reshape(-1, 1)
    p = z.softmax(-1)
    top = z.topk(min(20, z.shape[1])).values.softmax(-1)
    return {
        "logp": -F.cross_entropy(z, targets, reduction="none"),
        "entropy": torch.special.entr(p).sum(-1),
        "lse": z.logsumexp(-1),
        "mean_logit": z.mean(-1),
        "logsq": p.square().sum(-1).log(),
        "top1": z.argmax(-1) == targets,
        "topk_entropy": -(top * (top + 1e-10).log()).sum(-1),
    }


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks, each of several blocks, with a ragged end."""
    monkeypatch.setitem(op.ROWS, "cpu", 5)
    monkeypatch.setattr(logprob_torch, "BLOCK", 2 * 37)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("want", [(), ("entropy",), op.WANT])
def test_values_equal_dense(name, with_bias, want, poison):
    hidden, weight, bias, targets = _inputs()
    bias = bias if with_bias else None
    stats, dense = (
        linear_logprob(hidden, weight, targets, bias=bias, want=want, **OPTIONS[name]),
        _dense(hidden, weight, bias, targets, **OPTIONS[name]),
    )
    for field, value in stats._asdict().items():
        if field in ("logp", "lse", *want):
            torch.testing.assert_close(value, dense[field], rtol=1e-12, atol=1e-12)
        else:
            assert value is None


@pytest.mark.sampled(3)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_gradients_of_every_subset_equal_dense(name, frozen, size, poison):
    hidden, weight, bias, targets = _inputs()
    leaves = [x.requires_grad_() for x in ([hidden] if frozen else [hidden, weight, bias])]
    coefficient = {field: torch.linspace(-1, 2 + i, 13, dtype=torch.float64) for i, field in enumerate(DIFFERENTIABLE)}
    for fields in itertools.combinations(DIFFERENTIABLE, size):
        # the wanted set decides between the gradient made in the forward and the one made in the backward
        for want in {tuple(f for f in fields if f in op.WANT), ("entropy", "mean_logit")}:
            stats = linear_logprob(hidden, weight, targets, bias=bias, want=want, **OPTIONS[name])._asdict()
            dense = _dense(hidden, weight, bias, targets, **OPTIONS[name])
            ours, exact = (torch.autograd.grad(sum((x[f] * coefficient[f]).sum() for f in fields), leaves) for x in (stats, dense))
            for a, b in zip(ours, exact, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_gradcheck():
    hidden, weight, bias, targets = _inputs(n=4, dim=3, vocab=6)

    def fn(h, w, b):
        stats = linear_logprob(h, w, targets, bias=b, softcap=4.0, temperature=0.8, want=("entropy", "mean_logit"))
        return stats.logp, stats.entropy, stats.lse, stats.mean_logit

    assert torch.autograd.gradcheck(fn, tuple(x.requires_grad_() for x in (hidden, weight, bias)))


def test_equals_linear_cross_entropy_of_torch():
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    hidden, weight, _, targets = _inputs(torch.float32)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    losses = F.linear_cross_entropy(hidden, weight, targets), -linear_logprob(hidden, weight, targets).logp.mean()
    torch.testing.assert_close(*losses)
    for a, b in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def _of_logits(rows, targets, **options):
    """Statistics of given logits: the head is the identity."""
    z = torch.tensor(rows, dtype=torch.float64)
    return linear_logprob(z, torch.eye(z.shape[1], dtype=torch.float64), torch.tensor(targets), want=op.WANT, **options)


def _assert_numbers(value, expected):
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-7)  # printed in float32


def test_worked_numbers():
    stats = _of_logits([[2, 0, -1], [0.5, 0.5, 0]], [1, 2])
    _assert_numbers(stats.logp, [-2.16984606, -1.45802009])
    _assert_numbers(stats.entropy, [0.52426672, 1.07436836])
    _assert_numbers(stats.logsq, [-0.31911096, -1.05404544])
    _assert_numbers(stats.mean_logit, [0.33333334, 0.33333334])
    assert stats.top1.tolist() == [False, False]


def test_worked_numbers_of_temperature_and_softcap():
    stats = _of_logits([[2, 0, -1], [0.5, 0.5, 0]], [1, 2], temperature=2.0, softcap=30.0)
    _assert_numbers(stats.logp, [-1.46346545, -1.27200282])
    _assert_numbers(stats.entropy, [0.90639693, 1.09208691])


def test_worked_numbers_of_the_losses_built_on_it():
    stats = _of_logits([[0.5, 0.5, 0], [0, 1, 3]], [1, 2])
    _assert_numbers(1e-4 * stats.lse.square().mean(), 6.0868732e-4)  # z-loss
    _assert_numbers((0.9 * -stats.logp + 0.1 * (stats.lse - stats.mean_logit)).mean(), 0.6555997)  # label smoothing
    _assert_numbers((stats.topk_entropy * -stats.logp).mean(), 0.5591555890)  # entropy-aware focal training


def test_z_loss_gradient():
    z = torch.tensor([[2.0, 0, -1]], dtype=torch.float64, requires_grad=True)
    stats = linear_logprob(z, torch.eye(3, dtype=torch.float64), torch.tensor([1]))
    _assert_numbers(torch.autograd.grad(stats.lse.square().sum(), z)[0], [[3.66180929, 0.49557200, 0.18231075]])


def test_banned_tokens():
    bias = torch.tensor([0.0, -torch.inf, 1.0])
    stats = linear_logprob(torch.zeros(2, 3), torch.eye(3), torch.tensor([0, 1]), bias=bias, want=op.WANT)
    for field, expected in {"entropy": 0.5822, "lse": 1.3133, "mean_logit": 0.5, "topk_entropy": 0.5822}.items():
        torch.testing.assert_close(getattr(stats, field), torch.full((2,), expected), rtol=0, atol=5e-5)
    torch.testing.assert_close(stats.logp, torch.tensor([-1.3132616875, -torch.inf]))
    assert stats.top1.tolist() == [False, False]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("fields", [("logp",), DIFFERENTIABLE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_banned_token_is_no_token(frozen, fields, dtype):
    hidden, weight, bias, targets = _inputs(dtype)
    hidden.requires_grad_(), weight.requires_grad_(not frozen)
    banned = torch.cat([bias[:-1], torch.tensor([-torch.inf], dtype=dtype)])
    targets = targets.clamp(max=35)
    pair = []
    for w, b in ((weight, banned), (weight[:-1], bias[:-1])):
        stats = linear_logprob(hidden, w, targets, bias=b, temperature=0.6, want=op.WANT)
        total = sum((getattr(stats, f) * torch.linspace(-5, 9, 13, dtype=dtype)).sum() for f in fields)
        pair.append((*stats, *torch.autograd.grad(total, [hidden] if frozen else [hidden, weight])))
    for a, b in zip(*pair, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_banned_target_has_finite_gradients(frozen):
    hidden, weight, bias, targets = _inputs()
    bias[targets[0]] = -torch.inf
    leaves = [hidden.requires_grad_()] if frozen else [hidden.requires_grad_(), weight.requires_grad_()]
    stats = linear_logprob(hidden, weight, targets, bias=bias, want=("entropy", "mean_logit"))
    assert stats.logp[0] == -torch.inf and stats.logp[targets != targets[0]].isfinite().all()
    for field in DIFFERENTIABLE:
        assert all(g.isfinite().all() for g in torch.autograd.grad(getattr(stats, field).sum(), leaves, retain_graph=True))


def test_first_of_tied_logits_is_top1():
    stats = _of_logits([[0, 1, 1, 0], [0, 1, 1, 0]], [1, 2])
    assert stats.top1.tolist() == [True, False]


def test_no_targets():
    hidden, weight, bias, targets = _inputs()
    stats = linear_logprob(hidden.requires_grad_(), weight, None, bias=bias, want=("entropy",))
    dense = _dense(hidden, weight, bias, targets)
    assert stats.logp is None
    torch.testing.assert_close((stats.lse, stats.entropy), (dense["lse"], dense["entropy"]))
    ours, exact = (torch.autograd.grad((x["entropy"] + x["lse"]).sum(), hidden)[0] for x in (stats._asdict(), dense))
    torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("frozen", [True, False])
def test_no_rows(frozen):
    hidden, weight = torch.zeros(0, 7, requires_grad=True), torch.ones(37, 7, requires_grad=not frozen)
    stats = linear_logprob(hidden, weight, torch.zeros(0, dtype=torch.int64), want=op.WANT, temperature=torch.ones(0))
    assert all(x.shape == (0,) for x in stats)
    grads = torch.autograd.grad(stats.logp.sum() + stats.lse.sum(), [hidden] if frozen else [hidden, weight])
    assert grads[0].shape == (0, 7) and all(not g.any() for g in grads)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_chunks_do_not_change_the_result(monkeypatch, rows, frozen):
    hidden, weight, bias, targets = _inputs(torch.float32, n=50)
    leaves = [hidden.requires_grad_()] if frozen else [hidden.requires_grad_(), weight.requires_grad_()]

    def run():
        stats = linear_logprob(hidden, weight, targets, bias=bias, want=op.WANT)
        return *stats, *torch.autograd.grad(stats.logp.sum(), leaves)

    monkeypatch.setitem(op.ROWS, "cpu", 50)
    whole = run()
    monkeypatch.setitem(op.ROWS, "cpu", rows)
    monkeypatch.setattr(logprob_torch, "BLOCK", 37 * 2)
    for a, b in zip(run(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("rows", [16, 64, 512])
def test_bf16_head_gradient_error_is_that_of_one_product(monkeypatch, rows, relative_error):
    hidden, weight, _, targets = _inputs(torch.bfloat16, n=1024, dim=64, vocab=512, spread=0.2)
    coefficient = torch.linspace(0.1, 1, 1024)
    monkeypatch.setitem(op.ROWS, "cpu", rows)
    monkeypatch.setattr(logprob_torch, "BLOCK", 1 << 18)

    def gradient(logp, w):
        return torch.autograd.grad((logp * coefficient).sum(), w)[0]

    wide = weight.double().requires_grad_()
    exact = gradient(-F.cross_entropy(hidden.double() @ wide.T, targets, reduction="none"), wide)
    weight.requires_grad_()
    unfused = relative_error(gradient(-F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none"), weight), exact)
    assert relative_error(gradient(linear_logprob(hidden, weight, targets).logp, weight), exact) <= 1.2 * unfused
    master = weight.detach().float().requires_grad_()
    gradient_32 = gradient(linear_logprob(hidden, master, targets).logp, master)
    assert gradient_32.dtype == torch.float32 and relative_error(gradient_32, exact) <= 0.8 * unfused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_gradient_and_logp_errors_are_those_of_the_plain_formula(dtype, relative_error):
    hidden, weight, bias, targets = _inputs(dtype, n=64, dim=32, vocab=500)
    exact_h, h = hidden.double().requires_grad_(), hidden.requires_grad_()
    exact = _dense(exact_h, weight.double(), bias.double(), targets)["logp"]
    plain = -F.cross_entropy(F.linear(h, weight, bias).float(), targets, reduction="none")
    ours = linear_logprob(h, weight, targets, bias=bias).logp
    assert ours.dtype == torch.float32
    assert relative_error(ours, exact) <= 1.5 * relative_error(plain, exact) + 1e-7
    (truth,), (peer,), (got,) = (torch.autograd.grad(x.sum(), leaf) for x, leaf in ((exact, exact_h), (plain, h), (ours, h)))
    assert relative_error(got, truth) <= 1.5 * relative_error(peer, truth) + 1e-7


def test_softmax_of_low_precision_logits_is_float32():
    z = torch.randn(16, 5000, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(16)
    logp = logprob_torch.stats(z.clone(), targets, 1.0, logprob_torch.Options(None, frozenset(), 16, False, z.dtype))[0]["logp"]
    exact = z.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert (logp - exact).abs().max() < 4e-6
    assert (z.log_softmax(-1).gather(1, targets[:, None])[:, 0] - exact).abs().max() > 1e-2


@pytest.mark.parametrize("frozen", [True, False])
def test_keeps_no_logits(saved_bytes, frozen):
    hidden, weight, _, targets = _inputs(torch.float32, n=40, vocab=2000)
    hidden.requires_grad_()
    kept = saved_bytes(lambda h, w: linear_logprob(h, w, targets).logp, hidden, weight.requires_grad_(not frozen))
    own = 40 * 8 + 40 * 4 + (40 * 7 * 4 if frozen else 0)  # targets, lse, and dlogp/dhidden of a frozen head
    assert kept <= own + 64


def test_frozen_head_takes_two_products(monkeypatch):
    calls = []
    monkeypatch.setattr(op, "_logits", lambda *args, make=op._logits: calls.append(1) or make(*args))
    monkeypatch.setitem(op.ROWS, "cpu", 13)
    hidden, weight, _, targets = _inputs()
    hidden.requires_grad_()
    torch.autograd.grad(linear_logprob(hidden, weight, targets, want=("entropy",)).logp.sum(), hidden)
    assert len(calls) == 1
    torch.autograd.grad(linear_logprob(hidden, weight, targets, want=("entropy",)).entropy.sum(), hidden)
    assert len(calls) == 3


def test_statistics_carry_no_gradient():
    hidden, weight, _, targets = _inputs()
    stats = linear_logprob(hidden.requires_grad_(), weight, targets, want=op.WANT)
    assert [f for f, x in stats._asdict().items() if x.requires_grad] == ["logp", "entropy", "lse", "mean_logit"]


def test_entropy_stays_within_its_bounds():
    z = torch.tensor([[0.0] * 8, [100.0] + [0.0] * 7, [1e4] + [-1e4] * 7], dtype=torch.float32)
    stats = linear_logprob(z, torch.eye(8), torch.zeros(3, dtype=torch.int64), want=("entropy",))
    torch.testing.assert_close(stats.entropy, torch.tensor([math.log(8), 0.0, 0.0]))


class _SelfCopies(TorchDispatchMode):
    """Counts tensors that are copied onto the memory they lie in, as `x[a:b] += y` does."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.count += args[0].data_ptr() == args[1].data_ptr() and args[0].numel() > 0
        return func(*args, **(kwargs or {}))


def test_the_count_of_copies_sees_the_fault():
    x = torch.zeros(4, 2)
    with _SelfCopies() as seen:
        x[1:3] += 1
    assert seen.count == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_nothing_is_copied_onto_itself(head, dtype, monkeypatch):
    monkeypatch.setitem(op.SLAB, "cpu", 8)
    hidden, weight, _, targets = _inputs(dtype)
    leaves = [hidden.requires_grad_(), *([weight.requires_grad_()] if head == "trained" else [])]
    with _SelfCopies() as seen, torch.enable_grad():
        torch.autograd.grad(linear_logprob(hidden, weight, targets).logp.sum(), leaves)
    assert seen.count == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(13, 8)}, r"expected \[N, D\] and \[V, D\]"),
        ({"targets": torch.zeros(12, dtype=torch.int64)}, r"expected int64 \[13\]"),
        ({"targets": torch.zeros(13)}, "expected int64"),
        ({"bias": torch.zeros(36)}, r"expected \[37\]"),
        ({"want": ("entropies",)}, "entropies.*it knows entropy"),
        ({"want": ("top1",), "targets": None}, "top1 needs targets"),
        ({"softcap": 0.0}, "softcap 0.0"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"temperature": torch.ones(12)}, r"constant tensor \[13\]"),
    ],
)
def test_bad_input(change, message):
    hidden, weight, bias, targets = _inputs()
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{"hidden": hidden, "weight": weight, "bias": bias, "targets": targets} | change)
