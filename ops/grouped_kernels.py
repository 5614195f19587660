"""Triton kernels of grouped_linear, for CUDA operands that `torch._grouped_mm` takes only with a wait for the device, or not at all.

N rows sorted by group, E groups, K the summed dim, C columns. One program makes a tile of rows of one group: `tiles` lists them without
reading sizes on the host, of which there are at most N / ROWS + E. A row of y is summed in one order whatever the other rows are, and a
weight's gradient over its rows in their order; no atomics, so two runs agree bit for bit.
Bytes moved for y: x once per COLS columns, the weights of a group once per ROWS rows. Products are exact, sums float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from treetune.ops import backend
from treetune.ops.backend import tl

ROWS, COLS, STEP = 64, 64, 32  # of a tile; summed at a time


@backend.jit
def _rows_kernel(  # noqa: PLR0913
    x,
    w,
    y,
    group,
    first,
    ends,
    groups,
    columns,
    inner,
    stride_e,
    stride_c,
    stride_k,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEP: tl.constexpr,
):
    """y[n, c] = sum_k x[n, k] w[e, c, k] for the rows n of a tile of group e."""
    tile = tl.program_id(0)
    e = tl.load(group + tile)
    if e < groups:
        rows = tl.load(first + tile).to(tl.int64) + tl.arange(0, ROWS)
        live = rows < tl.load(ends + e)
        cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
        total = tl.zeros([ROWS, COLS], tl.float32)
        weights = w + e.to(tl.int64) * stride_e + cols[None, :].to(tl.int64) * stride_c
        for start in range(0, inner, STEP):
            k = start + tl.arange(0, STEP)
            left = tl.load(x + rows[:, None] * inner + k[None, :], live[:, None] & (k < inner)[None, :], 0.0)
            right = tl.load(weights + k[:, None].to(tl.int64) * stride_k, (k < inner)[:, None] & (cols < columns)[None, :], 0.0)
            total = tl.dot(left, right, total, input_precision="ieee")
        tl.store(y + rows[:, None] * columns + cols[None, :], total, live[:, None] & (cols < columns)[None, :])


@backend.jit
def _outer_kernel(  # noqa: PLR0913
    g, x, out, ends, outputs, inputs, ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr
):
    """out[e, o, i] = sum_n g[n, o] x[n, i] over the rows n of group e, for a tile of (o, i)."""
    e = tl.program_id(0)
    lo = tl.load(ends + e - 1, e > 0, 0)
    hi = tl.load(ends + e)
    o, i = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(2) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(lo, hi, STEP):
        n = (start + tl.arange(0, STEP)).to(tl.int64)
        left = tl.load(g + n[None, :] * outputs + o[:, None], (n < hi)[None, :] & (o < outputs)[:, None], 0.0)
        right = tl.load(x + n[:, None] * inputs + i[None, :], (n < hi)[:, None] & (i < inputs)[None, :], 0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    place = (e.to(tl.int64) * outputs + o[:, None]) * inputs + i[None, :]
    tl.store(out + place, total, (o < outputs)[:, None] & (i < inputs)[None, :])


def tiles(ends: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Group and first row of each tile, int32 [rows / ROWS + E]; the group of a tile that there is no use for is E."""
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    last = ((ends - begins + ROWS - 1) // ROWS).cumsum(0)  # tiles up to each group
    number = torch.arange(-(-rows // ROWS) + ends.shape[0], device=ends.device)
    group = torch.searchsorted(last, number, right=True)
    inside = group.clamp(max=ends.shape[0] - 1)
    before = torch.where(inside > 0, last[inside - 1], 0)
    return group.int(), (begins[inside] + (number - before) * ROWS).int()


def rows_t_triton(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """x_n W_e^T: x [N, K], w [E, C, K] of any strides -> [N, C]."""
    x, y = x.contiguous(), x.new_empty(x.shape[0], w.shape[1])
    if y.numel():
        group, first = tiles(ends, x.shape[0])
        grid = (group.shape[0], -(-w.shape[1] // COLS))
        sizes = (ends.shape[0], w.shape[1], w.shape[2], *w.stride())
        backend.launch(_rows_kernel, grid)(x, w, y, group, first, ends, *sizes, ROWS=ROWS, COLS=COLS, STEP=STEP)
    return y


def outer_triton(g: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """g_e^T x_e: g [N, O], x [N, I] -> [E, O, I], 0 for an empty group."""
    g, x = g.contiguous(), x.contiguous()
    out = x.new_empty(ends.shape[0], g.shape[1], x.shape[1])
    if out.numel():
        grid = (ends.shape[0], -(-g.shape[1] // ROWS), -(-x.shape[1] // COLS))
        backend.launch(_outer_kernel, grid)(g, x, out, ends, g.shape[1], x.shape[1], ROWS=ROWS, COLS=COLS, STEP=STEP)
    return out
