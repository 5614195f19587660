"""Projections of one input, each with an optional low-rank adapter: y_i = x W_i^T + s (u A_i^T) B_i^T.

T tokens, I inputs, O outputs, r rank, n projections that share x (q, k, v are one call). u is x, or x after dropout.
Saved for backward: x (and u when it differs) and the rank-r product, nothing of shape [T, O].
Bytes moved beyond the base products: one read-modify-write of each y in forward, none of shape [T, O] in backward.
Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, eq. 3.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from treetune.ops import fp8_linear, kept, magnitude, product
from treetune.ops.fp8_linear import Rows

SQUARES, CALLS = "C", "N"  # of an adapter that computes nothing and sees inputs


def lora_linears_ref(x: Tensor, weights: Sequence[Tensor], adapters: Sequence[dict], *, scale: float, u: Tensor | None = None) -> list:
    """The formula, one projection at a time, through plain autograd."""
    u = x if u is None else u
    return [x @ w.T + scale * (u @ ab["A"].T) @ ab["B"].T for w, ab in zip(weights, adapters, strict=True)]


def _forward(x: Tensor, u: Tensor | None, scale: float, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    weights, downs, ups = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
    # One product for all adapters: n products of rank r would each read the input again and leave most of the cores idle.
    low = (x if u is None else u) @ torch.cat(downs).T  # [T, n r]
    ranks = [down.shape[0] for down in downs]
    outs = []
    for w, up, part in zip(weights, ups, low.split(ranks, dim=1), strict=True):
        outs.append(product.rows_t(x, w).addmm_(part, up.T, alpha=scale))  # [T, O]
    return (*outs, low)


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):
        return kept.result(partial(_forward, *inputs))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, u, scale, n, *tensors = inputs
        ctx.save_for_backward(x, u, output[-1], *tensors)
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.n = scale, n

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, u, low, *tensors = ctx.saved_tensors
        n, scale = ctx.n, ctx.scale
        weights, downs, ups = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        source, ranks = x if u is None else u, [down.shape[0] for down in downs]
        grads = [x.new_zeros(x.shape[0], w.shape[0]) if g is None else g for g, w in zip(grads[:n], weights, strict=True)]
        g_low = torch.cat([g @ up for g, up in zip(grads, ups, strict=True)], dim=1).mul_(scale)  # [T, n r]
        d_ups = [(part.T @ g).T.mul_(scale) for g, part in zip(grads, low.split(ranks, dim=1), strict=True)]
        d_downs = (g_low.T @ source).split(ranks)
        d_u = g_low @ torch.cat(downs) if u is not None and ctx.needs_input_grad[1] else None
        d_x = _input_grad(grads, weights, None if u is not None else (g_low, downs)) if ctx.needs_input_grad[0] else None
        d_weights = [product.outer(g, x) if ctx.needs_input_grad[4 + i] else None for i, g in enumerate(grads)]
        return (d_x, d_u, None, None, *d_weights, *d_downs, *d_ups)


def _input_grad(grads: Sequence[Tensor], weights: Sequence[Tensor], low: tuple | None) -> Tensor:
    d_x = None  # [T, I]
    for g, w in zip(grads, weights, strict=True):
        d_x = product.rows(g, w, add=d_x)
    assert d_x is not None
    return d_x if low is None else d_x.addmm_(low[0], torch.cat(low[1]))


def unseen(size: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """An adapter that computes nothing: it sums x^T x / max(x)^2 [I, I] of the inputs of its projection, and counts the calls."""
    return {SQUARES: torch.zeros(size, size, dtype=dtype, device=device), CALLS: torch.zeros((), dtype=dtype, device=device)}


def _see(ab: dict, x: Tensor) -> None:
    rows = x.detach().to(ab[SQUARES].dtype)
    rows = rows / rows.max().abs()
    ab[SQUARES].addmm_(rows.T, rows)
    ab[CALLS].add_(1)


def lora_linears(
    x: Tensor, weights: Sequence[Tensor | Rows], adapters: Sequence[dict | None], *, scale: float, u: Tensor | None = None
) -> list:
    """x [T, I], weights [O_i, I] each, adapters {"A": [r, I], "B": [O_i, r]} or None -> list of [T, O_i] in the dtype of x.

    Projections without an adapter are plain products; the adapted ones share one backward pass. `u` [T, I] replaces x
    as the adapters' input (dropout). An adapter with "M" or "G" [O_i] is DoRA's (`magnitude`). Weights that are `Rows` meet x in float8.
    One of `unseen` is told of x.
    """
    for ab in adapters:
        if ab and SQUARES in ab:
            _see(ab, x)
    adapters = [None if ab and SQUARES in ab else ab for ab in adapters]
    small = [i for i, w in enumerate(weights) if isinstance(w, Rows)]
    rest = [i for i in range(len(weights)) if i not in small]
    results: dict[int, Tensor] = dict(zip(small, _in_float8(x, u, [(weights[i], adapters[i]) for i in small], scale), strict=True))
    results |= zip(rest, _dense_linears(x, [weights[i] for i in rest], [adapters[i] for i in rest], scale=scale, u=u), strict=True)
    return [results[i] for i in range(len(weights))]


def _in_float8(x: Tensor, u: Tensor | None, pairs: Sequence[tuple], scale: float) -> list[Tensor]:
    """The projections through weights in float8, with their adapters beside them in the dtype of x."""
    if not pairs:
        return []
    out = fp8_linear.linears(x, [w for w, _ in pairs])
    for i, (_, ab) in enumerate(pairs):
        if ab and magnitude.has(ab):
            raise ValueError("DoRA needs the numbers of a weight, and this one is multiplied in float8: leave fp8_products out")
        if ab:
            low = (x if u is None else u) @ ab["A"].to(x.dtype).T
            out[i] = torch.addmm(out[i], low, ab["B"].to(x.dtype).T, alpha=scale)
    return out


def _dense_linears(x: Tensor, weights: Sequence, adapters: Sequence[dict | None], *, scale: float, u: Tensor | None) -> list:
    adapted = {i: ab for i, ab in enumerate(adapters) if ab}
    projections: list = [None if ab else product.linear(x, w) for w, ab in zip(weights, adapters, strict=True)]
    if adapted:
        downs = [ab["A"].to(x.dtype) for ab in adapted.values()]
        ups = [ab["B"].to(x.dtype) for ab in adapted.values()]
        results = _LoraLinears.apply(x, u, scale, len(adapted), *(weights[i] for i in adapted), *downs, *ups)
        moved = u - x if u is not None and any(magnitude.has(ab) for ab in adapted.values()) else None
        for (i, ab), y in zip(adapted.items(), results, strict=False):
            projections[i] = magnitude.rescaled(y, weights[i], ab, scale=scale, moved=moved) if magnitude.has(ab) else y
    return projections
