"""Codes of 4 bits to numbers: the formula against core.quant, and the kernel under the interpreter and on a GPU."""

import os

import pytest
import torch

from treetune.core import quant, quant_tables
from treetune.ops import dequantise

SHAPES = [(1, 1), (3, 7), (64, 64), (5, 257), (1, 4097), (2, 33, 65)]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def arguments(shape, kind, dtype, device="cpu"):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    leaf = quant.quantise(weight, quant.Scheme(kind)).moved(lambda part: part.to(device))
    table = quant_tables.four_bits(kind, torch.device(device))
    return leaf, (leaf.codes, quant.absmax(leaf), table, leaf.shape, leaf.block, dtype)


@pytest.mark.parametrize("kind", quant.FOUR_BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_formula_gives_the_dense_leaf(shape, kind):
    leaf, given = arguments(shape, kind, torch.bfloat16)
    assert torch.equal(dequantise.four_bits(*given), quant.dense(leaf, torch.bfloat16))


@pytest.mark.interpret
@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 and a session of its own")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_gives_the_numbers_of_the_formula(shape, dtype):
    _, given = arguments(shape, "nf4", dtype)
    assert torch.equal(dequantise.four_bits_triton(*given), dequantise.four_bits_ref(*given))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (4096, 1024)])
def test_a_gpu_gives_the_numbers_of_the_formula(shape, dtype):
    leaf, given = arguments(shape, "nf4", dtype, "cuda")
    assert torch.equal(dequantise.four_bits_triton(*given), dequantise.four_bits_ref(*given))
    assert torch.equal(quant.dense(leaf, dtype).cpu(), quant.dense(leaf.moved(torch.Tensor.cpu), dtype))
