"""Triton kernels of grouped products under the interpreter: the launchers, on CPU tensors."""

import os

import pytest
import torch

from treetune.ops import grouped_kernels, grouped_linear

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 and a session of its own"),
    pytest.mark.usefixtures("poison"),
]
DTYPES = [torch.float32, torch.float16]  # the interpreter truncates stores in bfloat16
# Empty groups first, last and between, groups smaller and larger than a tile, sizes that no tile divides, no rows.
GROUPS = {"mixed": (0, 70, 1, 0, 17, 130, 0), "one": (0, 9, 0), "whole tiles": (64, 128), "none": (0, 0)}


def _draw(sizes, dtype, inner=37, outputs=69):
    gen = torch.Generator().manual_seed(0)
    shapes = ((sum(sizes), inner), (len(sizes), outputs, inner), (sum(sizes), outputs))
    return *(torch.randn(shape, generator=gen).to(dtype) for shape in shapes), torch.tensor(sizes).cumsum(0).int()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GROUPS)
def test_products(name, dtype, relative_error):
    """Errors against float64 are those of the loop in the same dtype; two runs agree bit for bit."""
    x, w, g, ends = _draw(GROUPS[name], dtype)
    turned = w.transpose(1, 2)
    for kernel, loop, args in (
        (grouped_kernels.rows_t_triton, grouped_linear.rows_t_loop, (x, w)),
        (grouped_kernels.rows_t_triton, grouped_linear.rows_t_loop, (g, turned)),
        (grouped_kernels.outer_triton, grouped_linear.outer_loop, (g, x)),
    ):
        first, second, plain = kernel(*args, ends), kernel(*args, ends), loop(*args, ends)
        exact = loop(*(arg.double() for arg in args), ends)
        assert torch.equal(first, second) and first.shape == plain.shape and first.dtype == plain.dtype
        assert torch.isfinite(first).all() and relative_error(first, exact) <= 1.5 * relative_error(plain, exact) + 1e-7


def test_tiles_cover_each_row_once():
    for sizes in GROUPS.values():
        ends = torch.tensor(sizes).cumsum(0).int()
        group, first = grouped_kernels.tiles(ends, sum(sizes))
        assert group.shape[0] == -(-sum(sizes) // grouped_kernels.ROWS) + len(sizes)
        covered = []
        for e, lo in zip(group.tolist(), first.tolist(), strict=True):
            if e < len(sizes):
                covered += [(e, n) for n in range(lo, min(lo + grouped_kernels.ROWS, int(ends[e])))]
        assert covered == [(e, n) for e, size in enumerate(sizes) for n in range(int(ends[e]) - size, int(ends[e]))]


def test_a_row_does_not_depend_on_the_other_rows_of_its_group():
    x, w, _, ends = _draw((130,), torch.float32)
    whole = grouped_kernels.rows_t_triton(x, w, ends)
    for lo, hi in ((0, 1), (60, 70), (129, 130), (3, 68)):
        part = grouped_kernels.rows_t_triton(x[lo:hi], w, torch.tensor([hi - lo], dtype=torch.int32))
        assert torch.equal(part, whole[lo:hi])


def test_no_columns():
    x, w, g, ends = _draw((3, 2), torch.float32)
    assert grouped_kernels.rows_t_triton(x, w[:, :0], ends).shape == (5, 0)
    assert grouped_kernels.outer_triton(g, x[:, :0], ends).shape == (2, 69, 0)
    assert not grouped_kernels.rows_t_triton(x[:, :0].contiguous(), w[:, :, :0], ends).any()
