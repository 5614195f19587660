"""What only a GPU can tell: kernels and the CUDA attention backends with their gradients, by the cases of `gpu_cases`."""

import importlib.util
from pathlib import Path

import pytest
import torch

from treetune.ops import attention

spec = importlib.util.spec_from_file_location("gpu_cases", Path(__file__).with_name("gpu_cases.py"))
assert spec is not None and spec.loader is not None
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)
EVERY = cases.CASES | cases.LOGPROB | cases.ATTENTION
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def _check(name, draw):
    measured = cases.measure(EVERY[name], draw)
    assert measured.fits(EVERY[name], draw.dtype), measured


@needs_gpu
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_op_equals_its_reference(name, dtype):
    if dtype in EVERY[name].dtypes:
        _check(name, cases.Draw(torch.device("cuda", torch.cuda.current_device()), dtype))


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_a_case_holds_on_a_cpu(name):
    """So that a case that fails on a GPU fails by the GPU."""
    _check(name, cases.Draw(torch.device("cpu"), EVERY[name].dtypes[-1], small=True))


def test_an_op_that_is_off_does_not_fit():
    case = cases.CASES["swiglu"]
    draw = cases.Draw(torch.device("cpu"), torch.float32, small=True)
    for off in (lambda x, y: case.reference(x, y) * 1.001, lambda x, y: case.reference(x, y.detach()) + 0 * y):
        assert not cases.measure(case._replace(op=off), draw).fits(case, draw.dtype)


@needs_gpu
def test_documents_are_isolated_bit_for_bit():
    draw = cases.Draw(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16)
    for branches in (False, True):
        plan = attention.plan(cases.batch_of(1000, branches), device=draw.device)
        q, k, v = (draw(1000, heads, 64, seed=i, grad=False) for i, heads in enumerate((6, 2, 2)))
        before = attention.attention(q, k, v, plan)
        for x in (q, k, v):
            x[:300] += 1
        assert torch.equal(before[300:], attention.attention(q, k, v, plan)[300:])
