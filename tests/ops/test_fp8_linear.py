"""Products in float8 against float64 sums of codes, within the bound that rounding to e4m3 earns; gradients of the dense weight."""

import pytest
import torch

from treetune.core import quant
from treetune.core.grad import remat
from treetune.ops import fp8_linear, lora_linear
from treetune.ops.fp8_linear import Rows

T, INPUTS, OUTPUTS, R = 9, 80, 48, 4


def _random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _weight(outputs=OUTPUTS, inputs=INPUTS, seed=1):
    leaf = quant.quantise(_random(outputs, inputs, seed=seed) * 0.05, quant.Scheme("fp8"))
    return Rows(leaf.codes, leaf.scale), quant.dense(leaf)


def _inputs(dtype=torch.float32):
    """Rows of very different sizes, one of zeros, one with a number that is far larger than the others."""
    x = _random(T, INPUTS) * 10.0 ** torch.arange(-4, T - 4)[:, None]
    x[2], x[3, 5] = 0, 1e4
    return x.to(dtype)


def test_a_row_is_rounded_to_the_nearest_codes_of_its_own_scale():
    x = _inputs()
    q, scale = fp8_linear.rounded_rows(x)
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    table = table[table.isfinite()]
    for row, codes, own in zip(x.double(), q.double(), scale.double(), strict=True):
        assert own == pytest.approx(max(row.abs().max().item(), 1e-12) / 448, rel=1e-6)
        best = (row[:, None] / own - table).abs().amin(1)
        assert torch.allclose((row / own - codes).abs(), best, rtol=1e-4, atol=1e-4)
    assert torch.equal(q[2].float(), torch.zeros(INPUTS)), "a row of zeros, such as padding, is zeros and not nan"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_float64_and_off_by_what_rounding_the_rows_earns(dtype):
    x, (w, dense) = _inputs(dtype), _weight()
    (y,) = fp8_linear.linears(x, [w])
    q, scale = fp8_linear.rounded_rows(x)
    exact = (q.double() * scale[:, None].double()) @ (w.codes.double() * w.scale[:, None].double()).T
    size = (q.double().abs() * scale[:, None].double()) @ dense.double().abs().T
    half = torch.finfo(dtype).eps / 2
    # The sum of 80 products in float32, two scales, and one rounding to the dtype.
    assert ((y.double() - exact).abs() <= (INPUTS + 3) * 2.0**-24 * size + half * exact.abs()).all()
    # A number is off by 2^-4 of itself, or, below the normal numbers of e4m3, by half of its smallest step, 2^-10 of the scale.
    wide = x.double()
    bound = (wide.abs() * 2.0**-4 + scale[:, None].double() * 2.0**-10) @ dense.double().abs().T
    off = (y.double() - wide @ dense.double().T).abs()
    assert (off <= bound + (INPUTS + 3) * 2.0**-24 * size + half * exact.abs()).all()
    assert off.sum() > 0.01 * bound.sum(), "the bound is of the size of what happens"
    assert torch.equal(y, fp8_linear.linear_ref(x, w))


def test_rows_do_not_depend_on_each_other():
    x, (w, _) = _inputs(), _weight()
    (whole,) = fp8_linear.linears(x, [w])
    for i in range(1, T):
        torch.testing.assert_close(fp8_linear.linears(x[i : i + 2], [w])[0][0], whole[i], rtol=1e-6, atol=0)


def test_the_gradient_is_that_of_the_dense_weights():
    x, (w, dense), (v, other) = _inputs().requires_grad_(), _weight(), _weight(32, seed=5)
    g, h = _random(T, OUTPUTS, seed=2), _random(T, 32, seed=3)
    one, two = fp8_linear.linears(x, [w, v])
    (got,) = torch.autograd.grad((one * g).sum() + (two * h).sum(), x)
    exact = g.double() @ dense.double() + h.double() @ other.double()
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_is_not_hidden():
    x, (w, _) = _inputs(), _weight()
    x[1, 3], x[4, 0] = torch.inf, torch.nan
    (y,) = fp8_linear.linears(x, [w])
    bad = ~torch.isfinite(y)
    assert bad[1].any() and bad[4].all() and not bad[[0, 2, 3, 5, 6, 7, 8]].any()


@pytest.mark.parametrize("dropout", [False, True])
def test_adapters_lie_beside_products_in_float8(dropout):
    x, (w, dense), (v, _) = _random(T, INPUTS).requires_grad_(), _weight(), _weight(32, seed=5)
    u = (x * (_random(T, INPUTS, seed=7) > 0)).detach().requires_grad_() if dropout else None
    ab = {"A": _random(R, INPUTS, seed=8).requires_grad_(), "B": _random(OUTPUTS, R, seed=9).requires_grad_()}
    adapted, plain, mixed = lora_linear.lora_linears(x, [w, v, dense], [ab, None, ab], scale=0.5, u=u)
    low = 0.5 * ((x if u is None else u) @ ab["A"].T) @ ab["B"].T
    torch.testing.assert_close(adapted, fp8_linear.linears(x, [w])[0] + low, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain, fp8_linear.linears(x, [v])[0])
    torch.testing.assert_close(mixed, x @ dense.T + low, rtol=1e-5, atol=1e-5)
    leaves, g = [x, ab["A"], ab["B"], *([] if u is None else [u])], _random(T, OUTPUTS, seed=2)
    got = torch.autograd.grad((adapted * g).sum(), leaves, retain_graph=True)
    want = torch.autograd.grad(((x @ dense.T + low) * g).sum(), leaves)
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_a_magnitude_is_refused():
    w, _ = _weight()
    with pytest.raises(ValueError, match="DoRA needs the numbers of a weight"):
        lora_linear.lora_linears(
            _random(T, INPUTS), [w], [{"A": _random(R, INPUTS), "B": _random(OUTPUTS, R), "M": torch.ones(OUTPUTS)}], scale=1.0
        )


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_a_layer_computed_again_has_the_same_gradient(policy):
    w, _ = _weight(INPUTS, INPUTS)
    ab = {"A": _random(R, INPUTS, seed=8), "B": _random(INPUTS, R, seed=9)}

    def gradient(policy):
        x = _random(T, INPUTS).requires_grad_()
        a = ab["A"].clone().requires_grad_()
        layer = remat(lambda x, a: torch.tanh(lora_linear.lora_linears(x, [w], [{"A": a, "B": ab["B"]}], scale=0.5)[0]), policy)
        return torch.autograd.grad(layer(layer(x, a), a).square().sum(), [x, a])

    assert all(torch.equal(one, two) for one, two in zip(gradient(None), gradient(policy), strict=True))


def test_a_device_multiplies_float8_by_its_capability(monkeypatch):
    for capability, has in (((8, 9), True), ((9, 0), True), ((8, 6), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, own=capability: own)
        assert fp8_linear.native(torch.device("cuda")) == has
    assert not fp8_linear.native(torch.device("cpu"))


def test_torchs_own_product_of_scaled_rows_gives_the_same_sums(monkeypatch):
    """The branch of GPUs, whose operator torch has for CPUs, too."""
    x, (w, _) = _inputs(torch.bfloat16), _weight()
    (emulated,) = fp8_linear.linears(x, [w])
    monkeypatch.setattr(fp8_linear, "native", lambda device: True)
    (own,) = fp8_linear.linears(x, [w])
    torch.testing.assert_close(own, emulated, rtol=2**-7, atol=0)
    odd, _ = _weight(OUTPUTS - 1)
    assert torch.equal(fp8_linear.linears(x, [odd])[0], fp8_linear.linear_ref(x, odd)), "of sides that CUDA does not take"
