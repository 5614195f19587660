"""Torch formulas of linear_logprob on a chunk of logits: statistics, and the gradient with respect to them.

The formulas are in linear_logprob; `stats` and `grad` are what the kernels of logprob_kernels compute. A chunk is worked on a block of rows
at a time, in place, so that what is read again is still in the cache of the processor.
Shapes: z [r, V] raw logits, y int64 [r] targets, tau [r] temperatures or a number.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treetune.ops import backend

BLOCK = 1 << 18  # elements of a chunk that the CPU works on at a time: 1 MiB of float32 stays in its cache
TOP = 20
FLOOR = -1e4  # of log p where p multiplies it: exp(FLOOR) is 0, and 0 * -inf would be nan


class Options(NamedTuple):
    """What is computed of a chunk, and how."""

    softcap: float | None
    want: frozenset[str]
    rows: int
    ahead: bool  # make dlogp/dhidden in the forward
    dtype: torch.dtype  # of the matrix products


class Grads(NamedTuple):
    """Upstream gradients of a chunk [r], or None."""

    logp: Tensor | None
    entropy: Tensor | None
    lse: Tensor | None
    mean_logit: Tensor | None


def _blocks(z: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK // max(1, z.shape[1]))
    return (slice(i, i + step) for i in range(0, z.shape[0], step))


def final_logits(z: Tensor, softcap: float | None, tau: Tensor | float) -> Tensor:
    """Raw logits of a private block -> final logits in the statistics dtype, in place where the dtype allows."""
    z = z.to(backend.stat_dtype(z))  # a log-softmax of bfloat16 logits errs by 3e-2, the size of a clip band
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    if isinstance(tau, Tensor):
        return z.div_(tau[:, None])
    return z if tau == 1.0 else z.div_(tau)


def _slope(f: Tensor, softcap: float, tau: Tensor | float) -> Tensor:
    """d softcap(u) / du = 1 - tanh^2 from the final logits f = softcap(u) / tau."""
    t = f * ((tau[:, None] if isinstance(tau, Tensor) else tau) / softcap)
    return t.square_().neg_().add_(1)


def entropy_of(top: Tensor) -> Tensor:
    """Entropy [r] of the renormalised softmax of the largest logits [r, TOP]."""
    r = top.softmax(-1)
    return -(r * (r + 1e-10).log()).sum(-1)


def _block_stats(f: Tensor, y: Tensor | None, want: frozenset[str]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Statistics of a block of final logits, which this consumes; and e = exp(f - max) with its row sums."""
    stats = {}
    if "mean_logit" in want:
        finite = f > -torch.inf
        stats["mean_logit"] = torch.where(finite, f, 0).sum(-1) / finite.sum(-1)
    if "topk_entropy" in want:
        stats["topk_entropy"] = entropy_of(f.topk(min(TOP, f.shape[1]), -1).values)
    if "top1" in want and y is not None:
        stats["top1"] = f.argmax(-1) == y
    top = f.amax(-1, keepdim=True)
    top.masked_fill_(top == -torch.inf, 0)  # a row of -inf alone would give inf - inf
    d = f.sub_(top)
    # Read before exp_ and mul_ overwrite d.
    target = None if y is None else d.gather(1, y[:, None])[:, 0]
    e = d.exp() if "entropy" in want else d.exp_()
    total = e.sum(-1)
    log_total = total.log()
    if "entropy" in want:
        d.clamp_(min=FLOOR)
        stats["entropy"] = log_total - d.mul_(e).sum(-1) / total
    if "logsq" in want:
        stats["logsq"] = e.square().sum(-1).log() - 2 * log_total
    stats["lse"] = log_total + top[:, 0]
    if target is not None:
        stats["logp"] = target - log_total
    return stats, e, total


Chunk = tuple[dict[str, Tensor], Tensor | None, Tensor | None]  # statistics [r], dlogp/dz [r, V], and scales [r] of its rows


def stats(z: Tensor, y: Tensor | None, tau: Tensor | float, options: Options) -> Chunk:
    """Statistics of a chunk of raw logits z [r, V], which this consumes; with `ahead` also dlogp/dz [r, V] up to row scales [r]."""
    parts, scales = [], []
    for rows in _blocks(z):
        block, tau_rows, y_rows = z[rows], rows_of(tau, rows), rows_of(y, rows)
        f = final_logits(block, options.softcap, tau_rows)
        slope = _slope(f, options.softcap, tau_rows) if options.ahead and options.softcap is not None else None
        numbers, e, total = _block_stats(f, y_rows, options.want)
        parts.append(numbers)
        if options.ahead:
            assert y_rows is not None
            # dlogp/dz = (1[y] - p) / tau = -(e - total 1[y]) / (total tau): the target's entry by expm1, which keeps the digits of 1 - p.
            e.scatter_(1, y_rows[:, None], (numbers["logp"].expm1() * total)[:, None])
            _store(block, e if slope is None else e.mul_(slope))
            scales.append(-1 / (total * tau_rows))
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return (whole, z, torch.cat(scales)) if options.ahead else (whole, None, None)


def rows_of(x: Any, rows: slice) -> Any:
    """Rows of a tensor; a number or None as it is."""
    return x[rows] if isinstance(x, Tensor) else x


def _store(block: Tensor, value: Tensor) -> None:
    if value.untyped_storage()._cdata != block.untyped_storage()._cdata:
        block.copy_(value)


def _target_grad(logp: Tensor, g: Grads, entropy: Tensor | None, count: Tensor | None) -> Tensor:
    """Gradient of a row with respect to the final logit of its target, whose log-prob is logp [r].

    Apart from the others, because 1 - p of a sure target has no digits left where it is made of p: -expm1(logp) has them all.
    """
    assert g.logp is not None
    p, grad = logp.exp(), -g.logp * logp.expm1()
    if g.lse is not None:
        grad = grad + g.lse * p
    if g.entropy is not None:
        assert entropy is not None
        grad = grad - g.entropy * p * (logp.clamp(min=FLOOR) + entropy)
    if g.mean_logit is None:
        return grad
    assert count is not None
    return grad + torch.where(logp > -torch.inf, g.mean_logit / count, 0)


def _block_grad(f: Tensor, y: Tensor | None, lse: Tensor, entropy: Tensor | None, g: Grads) -> Tensor:
    """Gradient with respect to a block of final logits, which this consumes."""
    logs = f.sub_(lse[:, None])
    target_logp = None if g.logp is None or y is None else logs.gather(1, y[:, None])[:, 0]
    finite = logs > -torch.inf if g.mean_logit is not None else None
    count = None if finite is None else finite.sum(-1)
    slope = (0 if g.lse is None else g.lse) - (0 if g.logp is None else g.logp)
    if g.entropy is None:
        dz = logs.exp_().mul_(_column(slope))
    else:
        assert entropy is not None
        p = logs.exp()
        logs.clamp_(min=FLOOR).add_(entropy[:, None])
        dz = logs.mul_(-g.entropy[:, None]).add_(_column(slope)).mul_(p)
    if g.mean_logit is not None:
        assert finite is not None and count is not None
        dz.add_(torch.where(finite, (g.mean_logit / count)[:, None], 0))
    if target_logp is None or y is None:
        return dz
    return dz.scatter_(1, y[:, None], _target_grad(target_logp, g, entropy, count)[:, None])


def _column(x: Tensor | float) -> Tensor | float:
    return x[:, None] if isinstance(x, Tensor) else x


def grad(z: Tensor, y: Tensor | None, tau: Tensor | float, lse: Tensor, entropy: Tensor | None, g: Grads, options: Options) -> Tensor:
    """Raw logits z [r, V] of a chunk -> gradient with respect to them, in place."""
    for rows in _blocks(z):
        block, tau_rows, g_rows = z[rows], rows_of(tau, rows), Grads(*(rows_of(x, rows) for x in g))
        f = final_logits(block, options.softcap, tau_rows)
        slope = None if options.softcap is None else _slope(f, options.softcap, tau_rows)
        dz = _block_grad(f, rows_of(y, rows), lse[rows], rows_of(entropy, rows), g_rows)
        dz = dz if slope is None else dz.mul_(slope)
        _store(block, dz.div_(_column(tau_rows)) if isinstance(tau, Tensor) or tau != 1.0 else dz)
    return z
