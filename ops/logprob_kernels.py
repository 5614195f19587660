"""Triton kernels of linear_logprob: statistics of a chunk of logits, and the gradient with respect to them.

One program per row walks over the vocabulary with an online maximum; no atomics, so two runs agree bit for bit. Formulas, shapes and the
torch twins are in linear_logprob and logprob_torch.
Bytes moved for r rows and V columns of 4 bytes: statistics 4rV, or 8rV and the write with dlogp/dz; gradient 4rV and the write (8rV for a
gradient of mean_logit).
Shapes: z [r, V] raw logits, y int64 [r], tau [r].
"""

from __future__ import annotations

import torch
from torch import Tensor

from treetune.ops import backend
from treetune.ops.backend import tl

NAMES = ("logp", "lse", "entropy", "mean_logit", "logsq", "top1")


@backend.jit
def _final_kernel(z, tau, softcap, HAS_CAP: tl.constexpr):
    if HAS_CAP:
        x = z / softcap
        # tanh through exp loses the digits of a small x, where five terms of the series have them all
        square = x * x
        series = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835)))))
        z = softcap * tl.where(tl.abs(x) < 0.3, series, 1 - 2 / (tl.exp(2 * x) + 1))
    return z / tau


@backend.jit
def _slope_kernel(f, tau, softcap, HAS_CAP: tl.constexpr):
    slope = 1 / tau
    if HAS_CAP:
        t = f * tau / softcap
        slope = (1 - t * t) / tau
    return slope


@backend.jit
def _miss_kernel(logp):
    """1 - exp(logp), with all its digits where logp is close to 0."""
    return tl.where(logp > -0.1, -logp * (1 + logp / 2 * (1 + logp / 3 * (1 + logp / 4 * (1 + logp / 5)))), 1 - tl.exp(logp))


@backend.jit
def _stats_kernel(  # noqa: PLR0913
    z,
    y,
    tau,
    softcap,
    columns,
    rows,
    out,
    dz,
    HAS_Y: tl.constexpr,
    HAS_CAP: tl.constexpr,
    EXTRAS: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row per program. out [6, r]: logp, lse, and with EXTRAS entropy, mean_logit, logsq, top1."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(tau + row)
    best = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0, tl.float32)
    tilt, square, plain, count = total, total, total, total  # sums of e d, e^2, z and 1 over finite z, with e = exp d and d = z - best
    first = tl.full([], 0, tl.int32)
    for start in range(0, columns, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        f = _final_kernel(tl.load(z + row * columns + cols, cols < columns, 0).to(tl.float32), t, softcap, HAS_CAP)
        finite = (cols < columns) & (f > float("-inf"))
        f = tl.where(finite, f, float("-inf"))
        top = tl.max(f, 0)
        new = tl.maximum(best, top)
        safe = tl.where(new > float("-inf"), new, 0)
        shift = tl.where(best > float("-inf"), best - safe, 0)
        keep = tl.exp(shift)  # the sums are 0 while best is -inf
        d = tl.where(finite, f - safe, 0)
        e = tl.where(finite, tl.exp(d), 0)
        if EXTRAS:
            first = tl.where(top > best, start + tl.argmax(f, 0), first)
            tilt = keep * (tilt + shift * total) + tl.sum(e * d, 0)
            square = keep * keep * square + tl.sum(e * e, 0)
            plain += tl.sum(tl.where(finite, f, 0), 0)
            count += tl.sum(finite.to(tl.float32), 0)
        total = keep * total + tl.sum(e, 0)
        best = new
    log_total = tl.log(total)
    tl.store(out + rows + row, best + log_total)
    if EXTRAS:
        tl.store(out + 2 * rows + row, log_total - tilt / total)
        tl.store(out + 3 * rows + row, plain / count)
        tl.store(out + 4 * rows + row, tl.log(square) - 2 * log_total)
    if HAS_Y:
        target = tl.load(y + row)
        raw = tl.load(z + row * columns + target, (target >= 0) & (target < columns), float("nan")).to(tl.float32)
        logp = _final_kernel(raw, t, softcap, HAS_CAP) - best - log_total
        tl.store(out + row, logp)
        if EXTRAS:
            tl.store(out + 5 * rows + row, (first == target).to(tl.float32))
        if AHEAD:
            for start in range(0, columns, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                inside = cols < columns
                f = _final_kernel(tl.load(z + row * columns + cols, inside, 0).to(tl.float32), t, softcap, HAS_CAP)
                p = tl.exp(f - best - log_total)
                value = tl.where(cols == target, _miss_kernel(logp), -p) * _slope_kernel(f, t, softcap, HAS_CAP)
                tl.store(dz + row * columns + cols, value, inside)


@backend.jit
def _grad_kernel(  # noqa: PLR0913
    z, y, tau, softcap, columns, rows, lse, g, dz, HAS_CAP: tl.constexpr, HAS_MEAN: tl.constexpr, BLOCK: tl.constexpr
):
    """One row per program. g [5, r]: upstream gradients of logp, entropy, lse and mean_logit, and the entropy; 0 where there is none."""
    row = tl.program_id(0).to(tl.int64)
    t, total, target = tl.load(tau + row), tl.load(lse + row), tl.load(y + row)
    g_logp, g_entropy, g_lse = tl.load(g + row), tl.load(g + rows + row), tl.load(g + 2 * rows + row)
    g_mean, h = tl.load(g + 3 * rows + row), tl.load(g + 4 * rows + row)
    if HAS_MEAN:
        count = tl.full([], 0, tl.float32)
        for start in range(0, columns, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            f = tl.load(z + row * columns + cols, cols < columns, float("-inf")).to(tl.float32)
            count += tl.sum(((cols < columns) & (_final_kernel(f, t, softcap, HAS_CAP) > float("-inf"))).to(tl.float32), 0)
        g_mean = g_mean / count
    for start in range(0, columns, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < columns
        f = _final_kernel(tl.load(z + row * columns + cols, inside, 0).to(tl.float32), t, softcap, HAS_CAP)
        logs = f - total
        p = tl.exp(logs)
        finite = logs > float("-inf")
        value = p * (g_lse - g_entropy * (tl.where(finite, logs, 0) + h)) + g_logp * tl.where(cols == target, _miss_kernel(logs), -p)
        value += tl.where(finite, g_mean, 0)
        tl.store(dz + row * columns + cols, value * _slope_kernel(f, t, softcap, HAS_CAP), inside)


def _launch(z: Tensor, tau: Tensor | float) -> tuple[Tensor, int, int]:
    """Temperatures [r], and the tile width and warps of a row."""
    tau = tau if isinstance(tau, Tensor) else torch.full((z.shape[0],), tau, dtype=torch.float32, device=z.device)
    block = backend.block_of(z.shape[1], 4096)
    return tau, block, backend.warps_of(block)


def _output(z: Tensor, dtype: torch.dtype) -> Tensor:
    """Where the gradient with respect to z goes: over z, unless the product that follows takes another dtype."""
    return z if z.dtype == dtype else torch.empty_like(z, dtype=dtype)


def stats(
    z: Tensor, y: Tensor | None, tau: Tensor | float, softcap: float | None, *, extras: bool, ahead: torch.dtype | None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Statistics [r] by name (without extras: lse and logp); and dlogp/dz [r, V] in the dtype `ahead`, or None. May overwrite z."""
    rows, columns = z.shape
    tau, block, warps = _launch(z, tau)
    out = torch.empty(len(NAMES), rows, dtype=torch.float32, device=z.device)
    dz = None if ahead is None else _output(z, ahead)
    backend.launch(_stats_kernel, (rows,))(
        *(z, z if y is None else y, tau, softcap or 1.0, columns, rows, out, z if dz is None else dz),
        HAS_Y=y is not None,
        HAS_CAP=softcap is not None,
        EXTRAS=extras,
        AHEAD=ahead is not None,
        BLOCK=block,
        num_warps=warps,
    )
    return dict(zip(NAMES if extras else NAMES[:2], out, strict=False)), dz


def grad(
    z: Tensor,
    y: Tensor | None,
    tau: Tensor | float,
    softcap: float | None,
    lse: Tensor,
    upstream: tuple[Tensor | None, ...],
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient [r, V] with respect to z. upstream: gradients [r] or None of logp, entropy, lse, mean_logit, then the entropy itself."""
    rows, columns = z.shape
    tau, block, warps = _launch(z, tau)
    zero = torch.zeros(rows, dtype=torch.float32, device=z.device)
    g = torch.stack([zero if x is None else x.float() for x in upstream])  # [5, r]
    dz = _output(z, dtype)
    backend.launch(_grad_kernel, (rows,))(
        *(z, torch.full((rows,), -1, device=z.device) if y is None else y, tau, softcap or 1.0, columns, rows, lse, g, dz),
        HAS_CAP=softcap is not None,
        HAS_MEAN=upstream[3] is not None,
        BLOCK=block,
        num_warps=warps,
    )
    return dz
