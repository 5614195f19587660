import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

from treetune.losses import sft

LOSSES = {
    "nll": lambda s: sft.nll(s.logp),
    "smoothed": lambda s: sft.smoothed(s.logp, s.lse, s.mean_logit, label_smoothing=0.1),
    "z_loss": lambda s: sft.z_loss(s.lse, coef=0.3),
    "dft": lambda s: sft.dft(s.logp),
    "eaft": lambda s: sft.eaft(s.logp, s.topk_entropy),
    "eaft half": lambda s: sft.eaft(s.logp, s.topk_entropy, alpha=0.5),
}
ORACLES = {
    "nll": lambda o, z, y: o.nll(z, y),
    "smoothed": lambda o, z, y: o.smoothed(z, y, 0.1),
    "z_loss": lambda o, z, y: o.z_loss(z, 0.3),
    "dft": lambda o, z, y: o.dft(z, y),
    "eaft": lambda o, z, y: o.eaft(z, y),
    "eaft half": lambda o, z, y: o.eaft(z, y, alpha=0.5),
}


def _random(n=9, vocab=31, dtype=torch.float64):
    gen = torch.Generator().manual_seed(4)
    return (3 * torch.randn(n, vocab, generator=gen, dtype=torch.float64)).to(dtype), torch.randint(0, vocab, (n,), generator=gen)


def test_worked_numbers(fixture_l, stats_of):
    """EX-3 to EX-7 of the loss contract."""
    stats = stats_of(*fixture_l)
    assert LOSSES["nll"](stats).mean().item() == pytest.approx(0.5639330538, abs=1e-9)
    assert LOSSES["nll"](stats).sum().item() / 5 == pytest.approx(0.2255732268, abs=1e-8)  # a float32 number
    assert LOSSES["smoothed"](stats).mean().item() == pytest.approx(0.6555997, abs=1e-7)
    assert stats.lse.tolist() == pytest.approx([1.45802009, 3.16984602], abs=1e-8)
    assert sft.z_loss(stats.lse, coef=1e-4).mean().item() == pytest.approx(6.0868732e-4, abs=1e-11)
    assert LOSSES["dft"](stats).mean().item() == pytest.approx(0.2554306211, abs=1e-9)
    assert LOSSES["eaft"](stats).mean().item() == pytest.approx(0.5591555890, abs=1e-7)  # a float32 number
    assert LOSSES["eaft"](stats).sum().item() / 4 == pytest.approx(0.2795777945, abs=1e-7)


def test_worked_statistics(stats_of):
    """EX-1, float32 numbers."""
    stats = stats_of(torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.0]], dtype=torch.float64), torch.tensor([1, 2]))
    assert stats.logp.tolist() == pytest.approx([-2.16984602, -1.45802009], abs=2e-7)
    assert stats.entropy.tolist() == pytest.approx([0.52426672, 1.07436836], abs=2e-7)
    assert stats.mean_logit[0].item() == pytest.approx(1 / 3, abs=1e-12) and stats.top1.tolist() == [False, False]


@pytest.mark.parametrize(
    "name, label, want, digits",
    [
        ("dft", 1, [0.09635731, -0.10115466, 0.00479735], 1e-8),
        ("z_loss", 1, [0.3 * v for v in (3.66180929, 0.49557200, 0.18231075)], 1e-8),
    ],
)
def test_worked_gradients(stats_of, name, label, want, digits):
    z = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(LOSSES[name](stats_of(z, torch.tensor([label]))).sum(), z)
    assert found[0].tolist() == pytest.approx(want, abs=digits)


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_loop_oracle(name, stats_of, oracle):
    z, y = _random()
    want = [ORACLES[name](oracle, row.tolist(), label.item()) for row, label in zip(z, y, strict=True)]
    torch.testing.assert_close(LOSSES[name](stats_of(z, y)), torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_smoothing_equals_torch():
    z, y = _random()
    stats = torch.log_softmax(z, -1)
    found = sft.smoothed(stats.gather(1, y[:, None])[:, 0], z.logsumexp(-1), z.mean(-1), label_smoothing=0.1)
    torch.testing.assert_close(found, F.cross_entropy(z, y, label_smoothing=0.1, reduction="none"), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["nll", "smoothed", "z_loss"])
def test_gradcheck_through_the_head(name, stats_of):
    z, y = _random(4, 7)
    assert torch.autograd.gradcheck(lambda logits: LOSSES[name](stats_of(logits, y)), z.requires_grad_())


@pytest.mark.parametrize("name", ["dft", "eaft"])
def test_the_factor_carries_no_gradient(name, stats_of):
    """Frozen at its value, the factor times the plain gradient."""
    z, y = _random()
    z.requires_grad_()
    stats = stats_of(z, y)
    factor = (LOSSES[name](stats) / LOSSES["nll"](stats)).detach()
    (found,) = torch.autograd.grad(LOSSES[name](stats).sum(), z, retain_graph=True)
    (want,) = torch.autograd.grad((factor * LOSSES["nll"](stats)).sum(), z)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "fn, inputs",
    [
        (lambda logp: sft.nll(logp), 1),
        (lambda logp, lse, mean: sft.smoothed(logp, lse, mean, label_smoothing=0.2), 3),
        (lambda lse: sft.z_loss(lse, coef=0.1), 1),
        (lambda logp: sft.dft(logp), 1),
        (lambda logp, entropy: sft.eaft(logp, entropy, alpha=0.5), 2),
    ],
)
def test_per_sample_gradients_by_vmap(fn, inputs):
    """vmap(grad(f)) works on the math itself, and equals one sample at a time."""
    x = [-torch.rand(6, 5, dtype=torch.float64) if i == 0 else torch.rand(6, 5, dtype=torch.float64) for i in range(inputs)]
    found = vmap(grad(lambda *parts: fn(*parts).sum()))(*x)
    for i in range(6):
        first = x[0][i].clone().requires_grad_()
        (want,) = torch.autograd.grad(fn(first, *(part[i] for part in x[1:])).sum(), first)
        torch.testing.assert_close(found[i], want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_no_tokens(name, stats_of):
    assert LOSSES[name](stats_of(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))).shape == (0,)


@pytest.mark.parametrize("name", LOSSES)
def test_banned_logits_that_are_not_the_label(name, stats_of, oracle):
    """-inf logits are legal: the value is that without them, the gradient is finite and 0 there."""
    z, y = _random(5, 6)
    y = y % 4
    z[:, 4:] = -math.inf
    z.requires_grad_()
    value = LOSSES[name](stats_of(z, y))
    want = [ORACLES[name](oracle, row[:4].tolist(), label.item()) for row, label in zip(z.detach(), y, strict=True)]
    torch.testing.assert_close(value, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    (found,) = torch.autograd.grad(value.sum(), z)
    assert torch.isfinite(found).all() and (found[:, 4:] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_banned_label_is_infinite_and_never_nan(name, stats_of):
    z, _ = _random(3, 6)
    z[:, 2] = -math.inf
    value = LOSSES[name](stats_of(z, torch.tensor([2, 2, 2])))
    want = {"dft": 0.0, "z_loss": None}.get(name, math.inf)
    assert not value.isnan().any() and (want is None or (value == want).all())


@pytest.mark.parametrize("name", LOSSES)
def test_a_nan_is_never_swallowed(name, stats_of):
    z, y = _random(3, 6)
    z[1, 0] = math.nan
    assert LOSSES[name](stats_of(z, y)).isnan().tolist() == [False, True, False]


def test_a_certain_token_has_no_entropy_and_no_nan():
    """The 1e-10 inside the logarithm makes the entropy of a certain token just negative."""
    entropy = torch.tensor([-1e-10, 0.0], dtype=torch.float64)
    for alpha in (0.5, 1.0, 2.0):
        assert sft.eaft(torch.tensor([-1.0, -1.0], dtype=torch.float64), entropy, alpha=alpha).abs().max() < 1e-9


@pytest.mark.parametrize("name", LOSSES)
def test_low_precision_inputs_are_computed_in_float32(name, stats_of):
    z, y = _random()
    exact = stats_of(z, y)
    low = exact._replace(
        **{key: value.bfloat16() for key, value in exact._asdict().items() if value is not None and value.is_floating_point()}
    )
    found, want = LOSSES[name](low), LOSSES[name](low._replace(**{k: v.double() for k, v in low._asdict().items() if v is not None}))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_logits_are_widened_before_the_softmax(name, stats_of):
    z, y = _random(9, 31, torch.bfloat16)
    torch.testing.assert_close(LOSSES[name](stats_of(z, y)).double(), LOSSES[name](stats_of(z.double(), y)), rtol=1e-5, atol=1e-6)
