"""Quantised leaves against bitsandbytes, to the bit, and what every use of a leaf asks of them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treetune.core import check, quant, quant_tables
from treetune.core.quant import Scheme

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the oracle of quantised numbers is bitsandbytes")
functional = bitsandbytes.functional

SHAPES = [(1, 1), (1, 63), (3, 7), (64, 64), (5, 257), (33, 129), (128, 384), (2, 16, 48), (1, 16385)]


def random(shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def same_as_bitsandbytes(weight, scheme):
    packed, state = functional.quantize_4bit(weight, quant_type=scheme.kind, compress_statistics=scheme.double)
    leaf = quant.quantise(weight, scheme)
    assert torch.equal(leaf.codes, packed.flatten())
    assert torch.equal(leaf.scale, state.absmax)
    if scheme.double:
        assert torch.equal(leaf.nested, state.state2.absmax) and torch.equal(leaf.offset, state.offset)
        assert torch.equal(quant_tables.eight_bits(torch.device("cpu")), functional.create_dynamic_map())
    ours = quant.dense(leaf)
    assert ours.shape == weight.shape and ours.dtype == weight.dtype
    assert torch.equal(ours, by_formula(packed, state))
    if weight.shape[-1] % 64 == 0:  # their kernel for CPUs begins a block with every row of another even width, where no block begins
        assert torch.equal(ours, functional.dequantize_4bit(packed, state))


def by_formula(packed, state):
    """What bitsandbytes computes of its codes where it has no kernel of its own."""
    from bitsandbytes.backends.default import ops
    from bitsandbytes.backends.utils import _get_4bit_code

    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    compute = ops._dequantize_4bit_compute.__wrapped__
    code = _get_4bit_code(state.quant_type, packed.device)
    return compute(packed.reshape(-1), absmax, code, state.blocksize, state.shape, state.dtype).view(state.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", quant.FOUR_BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_four_bits_are_those_of_bitsandbytes(shape, kind, double, dtype):
    same_as_bitsandbytes(random(shape).to(dtype), Scheme(kind, double))


@pytest.mark.parametrize("kind", quant.FOUR_BITS)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(64, 64), torch.full((16, 96), 0.3), torch.full((16, 96), -7.0), random((64, 64), scale=1e-30),
        random((64, 64), scale=1e30),
        random((40, 64)) * torch.logspace(-6, 6, 40)[:, None], torch.cat([torch.zeros(8, 64), random((8, 64))]), torch.eye(65),
    ],
    ids=["zeros", "constant", "negative", "tiny", "huge", "rows of many sizes", "half zeros", "identity"],
)  # fmt: skip
def test_odd_numbers_are_quantised_as_by_bitsandbytes(weight, double, kind):
    same_as_bitsandbytes(weight, Scheme(kind, double))


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 70), columns=st.integers(1, 300), seed=st.integers(0, 1000), exponent=st.integers(-20, 20), double=st.booleans())
def test_any_shape(rows, columns, seed, exponent, double):
    same_as_bitsandbytes(random((rows, columns), seed, 2.0**exponent), Scheme("nf4", double))


@pytest.mark.parametrize("weight", [random((64, 96)), torch.zeros(3, 5), random((7, 31), scale=1e-4), random((9, 8), scale=1e4)])
def test_int8_rows_are_those_of_bitsandbytes(weight):
    codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
    leaf = quant.quantise(weight, Scheme("int8"))
    assert torch.equal(leaf.codes, codes) and torch.equal(leaf.scale, scale)
    assert torch.equal(quant.dense(leaf), functional.int8_vectorwise_dequant(codes, scale))


def test_int8_keeps_numbers_beyond_float16():
    weight = torch.tensor([[1e6, -2e6, 0.0, 5e5]])
    assert quant.dense(quant.quantise(weight, Scheme("int8"))).sub(weight).abs().max() <= 2e6 / 127 / 2 * 1.01


@pytest.mark.parametrize("shape", [(64, 96), (5, 7), (3, 128), (2, 3, 70)])
def test_int4_is_within_half_a_step_of_its_group(shape):
    weight = random(shape)
    leaf = quant.quantise(weight, Scheme("int4"))
    error = (quant.dense(leaf) - weight).abs()
    padded = torch.nn.functional.pad(weight, (0, -shape[-1] % 64)).unflatten(-1, (-1, 64))
    step = (padded.abs().amax(-1) / 7.5).repeat_interleave(64, -1)[..., : shape[-1]]
    assert (error <= step * (0.5 + 7.5 * 2**-8)).all() and (error > step * 0.3).any()
    assert torch.equal(leaf.scale, leaf.scale.bfloat16().float()) and leaf.scale.shape == padded.shape[:-1]


@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_a_row_of_zeros_stays_one_and_bfloat16_has_the_same_numbers(kind):
    leaf = quant.quantise(torch.cat([torch.zeros(2, 64), random((2, 64))]), Scheme(kind))
    whole, half = quant.dense(leaf), quant.dense(leaf, torch.bfloat16)
    assert (whole[:2] == 0).all() and not check.not_finite({"a": whole})
    codes = leaf.codes.bfloat16() if kind == "fp8" else (torch.stack([leaf.codes & 15, leaf.codes >> 4], -1).flatten(1).bfloat16() - 8)
    scale = leaf.scale.bfloat16().view(4, 1)
    assert torch.equal(codes * scale, half), "as compressed-tensors makes them dense"


def test_fp8_is_within_half_a_step():
    weight = random((64, 96))
    error = quant.dense(quant.quantise(weight, Scheme("fp8"))) - weight
    largest = weight.abs().amax(1, keepdim=True)
    assert (error.abs() <= torch.maximum(weight.abs() / 16, largest / quant.MOST_FP8 * 2**-9) * (1 + 1e-6)).all()


@pytest.mark.parametrize("byte", [127, 255])
def test_a_code_of_fp8_that_is_no_number_is_found(byte):
    leaf = quant.quantise(random((4, 64)), Scheme("fp8"))
    assert not check.not_finite({"a": leaf})
    leaf.codes.view(torch.uint8)[3, 5] = byte
    assert check.not_finite({"a": leaf}) == ["a"]


def test_bytes_of_fp8_are_looked_up_as_they_are_cast():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(4, 64)
    leaf = quant.quantise(torch.ones(4, 64), Scheme("fp8"))._replace(codes=codes, scale=torch.tensor([1.0, 0.1, 3.0, 7.0]))
    expected = codes.float() * leaf.scale[:, None]
    assert torch.equal(
        quant.dense(leaf).view(torch.int32).where(~expected.isnan(), 0), expected.view(torch.int32).where(~expected.isnan(), 0)
    )


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4", "int8", "fp8"])
def test_a_leaf_has_shape_dtype_and_bytes(kind):
    weight = random((128, 256)).bfloat16()
    leaf = quant.quantise(weight, Scheme(kind))
    assert leaf.shape == weight.shape and leaf.dtype == weight.dtype and leaf.numel() == weight.numel() and leaf.ndim == 2
    bits = 8 * leaf.nbytes / weight.numel()
    expected = {"int4": 4 + 32 / 64, "int8": 8 + 32 / 256, "fp8": 8 + 32 / 256}.get(kind, 4 + 8 / 64 + 32 / 64 / 256)
    assert math.isclose(bits, expected, rel_tol=0.01)
    assert quant.digest(leaf) == quant.digest(weight) and torch.equal(quant.spread(leaf), quant.spread(weight))


@pytest.mark.parametrize("weight", [torch.ones(4), torch.tensor([[1.0, math.nan]]), torch.tensor([[math.inf, 1.0]])])
def test_what_cannot_be_quantised_is_refused(weight):
    with pytest.raises(ValueError, match="expected a matrix|not finite"):
        quant.quantise(weight, Scheme("nf4"))


@pytest.mark.parametrize("kind", quant.KINDS)
def test_rounded_weights_have_the_gradient_of_those_before(kind):
    weight = random((8, 64)).requires_grad_()
    scheme = Scheme(kind)
    y = quant.rounded(weight, scheme)
    assert torch.equal(y.detach(), quant.dense(quant.quantise(weight, scheme)))
    (gradient,) = torch.autograd.grad((y * torch.arange(8.0)[:, None]).sum(), weight)
    assert torch.equal(gradient, torch.arange(8.0)[:, None].expand(8, 64))
