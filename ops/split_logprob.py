"""`linear_logprob` of a head whose rows, one for each token of the vocabulary, are split among ranks.

No rank makes the logits of the whole vocabulary: each has the statistics of its own columns, and all exchange these few numbers a row.
Rank i has the mass w_i = exp(lse_i - lse) of softmax p, and p_i = p / w_i inside of its columns:
lse = log sum_i exp(lse_i); logp = logp_i + log w_i of the rank i that has the target; entropy = sum_i w_i (entropy_i - log w_i);
mean_logit = sum_i n_i mean_logit_i / sum_i n_i with n_i the finite ones; logsq = log sum_i w_i^2 exp(logsq_i);
top1: the target is the first maximum of its own columns, and those of no rank before it are as large, of no rank behind it larger;
topk_entropy: of the largest logits of all ranks' largest ones.
Backward: the formulas of linear_logprob for own columns with the common lse and entropy, so dweight is that of own rows and dhidden this
rank's share. One message of at most 28 numbers a row, forward only.
Shapes: N scored positions, D hidden, V vocabulary, v columns of this rank, n ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from treetune.ops import backend, linear_logprob, logprob_torch
from treetune.ops.linear_logprob import Inputs, Part, TokenStats
from treetune.ops.logprob_torch import TOP, Grads, Options
from treetune.ops.tensor_parallel import Split

EXACT = 40.0  # beyond which log(1 + e^x) is x in float64, too


class _Extras(NamedTuple):
    """Of own logits of each row: the largest [N], the TOP largest [N, TOP], and how many are finite [N]; None where not wanted."""

    best: Tensor | None
    top: Tensor | None
    count: Tensor | None


def _no_extras(hidden: Tensor, want: frozenset[str]) -> _Extras:
    rows, dtype = hidden.shape[0], backend.stat_dtype(hidden)
    best = hidden.new_empty(rows, dtype=dtype) if "top1" in want else None
    top = hidden.new_full((rows, TOP), -torch.inf, dtype=dtype) if "topk_entropy" in want else None
    return _Extras(best, top, hidden.new_empty(rows, dtype=dtype) if "mean_logit" in want else None)


def _look(extras: _Extras, tau: Tensor | float, softcap: float | None, z: Tensor, rows: slice) -> None:
    """Fill the rows of a chunk of raw logits z [r, v], which stays as it is. Soft-cap and temperature keep the order."""
    one = logprob_torch.rows_of(tau, rows)
    if extras.best is not None:
        extras.best[rows] = logprob_torch.final_logits(z.amax(-1, keepdim=True), softcap, one)[:, 0]
    if extras.top is not None:
        largest = z.topk(min(TOP, z.shape[1]), -1).values
        extras.top[rows, : largest.shape[1]] = logprob_torch.final_logits(largest, softcap, one)
    if extras.count is not None:
        extras.count[rows] = float(z.shape[1]) if softcap is not None else (z > -torch.inf).sum(-1).to(extras.count.dtype)


def _everywhere(rows: dict[str, Tensor], split: Split) -> dict[str, Tensor]:
    """[n, ...] of each tensor on all ranks, of floats of one dtype: one message."""
    sizes = [value.numel() for value in rows.values()]
    own = torch.cat([value.reshape(-1) for value in rows.values()])
    every = own.new_empty(split.size * own.numel())
    dist.all_gather(list(every.chunk(split.size)), own, group=split.group)
    pieces = every.view(split.size, -1).split(sizes, dim=1)
    return {name: piece.reshape(split.size, *value.shape) for (name, value), piece in zip(rows.items(), pieces, strict=True)}


def _combined(every: dict[str, Tensor], has_target: Tensor) -> dict[str, Tensor]:
    """The statistics [N] of those of all ranks [n, N]; has_target [n, N]: which rank has the target of a row."""
    lses = every["lse"]
    lse = lses.logsumexp(0)
    # Of the rank of the target: from the other ranks' mass over its own, because lse - lse_i has no digits left of a small one.
    own = torch.where(has_target, lses, 0).sum(0)
    rest = torch.where(has_target, -torch.inf, lses).logsumexp(0)
    log_share = -F.softplus(rest - own, threshold=EXACT)
    out = {"lse": lse, "logp": torch.where(has_target, every["logp"], 0).sum(0) + log_share}
    logs = torch.where(has_target, log_share, lses - lse)
    if "entropy" in every:
        mass = logs.exp()
        out["entropy"] = torch.where(mass > 0, mass * (every["entropy"] - logs), 0).sum(0)
    if "mean_logit" in every:
        out["mean_logit"] = (every["count"] * every["mean_logit"]).sum(0) / every["count"].sum(0)
    if "logsq" in every:
        out["logsq"] = (2 * logs + every["logsq"]).logsumexp(0)
    if "top1" in every:
        out["top1"] = _first_maximum(every["best"], has_target) & (torch.where(has_target, every["top1"], 0).sum(0) > 0)
    if "top" in every:
        largest = every["top"].movedim(0, 1).flatten(1)
        out["topk_entropy"] = logprob_torch.entropy_of(largest.topk(TOP, -1).values)
    return out


def _first_maximum(best: Tensor, has_target: Tensor) -> Tensor:
    """Whether the largest logit [n, N] of the rank of the target is that of all, and of no rank before it."""
    number = torch.arange(best.shape[0], device=best.device)[:, None]
    own, place = torch.where(has_target, best, 0).sum(0), torch.where(has_target, number, 0).sum(0)
    return torch.where(number < place, best < own, best <= own).all(0)


class _SplitLogprob(torch.autograd.Function):
    @staticmethod
    def forward(hidden, weight, targets, elsewhere, tau, options, split):
        extras = _no_extras(hidden, options.want)

        def see(z: Tensor, rows: slice) -> None:
            _look(extras, tau, options.softcap, z, rows)

        own = options._replace(want=options.want - {"topk_entropy"})
        stats, _ = linear_logprob.forward_chunks(Inputs(hidden, weight, None, targets, tau), own, see)
        rows = stats | {name: value for name, value in extras._asdict().items() if value is not None} | {"own": ~elsewhere}
        every = _everywhere({name: value.to(stats["lse"].dtype) for name, value in rows.items()}, split)
        combined = _combined(every, every["own"] > 0)
        share = None if extras.count is None else extras.count / every["count"].sum(0)
        return *(combined.get(name) for name in TokenStats._fields), extras.count, share

    @staticmethod
    def setup_context(ctx, inputs, output):
        hidden, weight, targets, elsewhere, tau, ctx.options, _ = inputs
        stats, count, share = TokenStats(*output[:-2]), *output[-2:]
        constant = (stats.logsq, stats.top1, stats.topk_entropy, count, share)
        ctx.mark_non_differentiable(*(x for x in constant if x is not None))
        ctx.set_materialize_grads(False)
        ctx.tau = None if isinstance(tau, Tensor) else tau
        known = (tau if ctx.tau is None else None, stats.lse, stats.entropy, count, share)
        ctx.save_for_backward(hidden, weight, targets, elsewhere, *known)

    @staticmethod
    @once_differentiable
    def backward(ctx, logp, entropy, lse, mean_logit, *_):
        hidden, weight, targets, elsewhere, tau, saved_lse, saved_entropy, count, share = ctx.saved_tensors
        if all(x is None for x in (logp, entropy, lse, mean_logit)):
            return (None,) * 7
        # Own columns divide by how many of them are finite: their share of the mean makes that the number of all.
        g = Grads(logp, entropy, lse, None if mean_logit is None else mean_logit * share)
        inputs = Inputs(hidden, weight, None, targets, ctx.tau if tau is None else tau)
        needs = (*ctx.needs_input_grad[:2], False)
        d_hidden, d_weight, _ = linear_logprob.backward_chunks(
            inputs, saved_lse, saved_entropy, g, needs, ctx.options, Part(elsewhere, count)
        )
        return d_hidden, d_weight, None, None, None, None, None


def split_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    split: Split,
    vocabulary: int,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    want: tuple[str, ...] = (),
) -> TokenStats:
    """What `linear_logprob` gives of hidden [N, D] and the whole head, of which this rank has the rows `split.part(vocabulary)` [v, D].

    hidden and targets [N] are equal on all ranks, and so are the results. The gradient of hidden is this rank's share: it enters before.
    Errors: ValueError as there, and for a weight of another number of rows.
    """
    first, end = split.part(vocabulary)
    if weight.shape[0] != end - first:
        raise ValueError(
            f"split_logprob got {weight.shape[0]} rows of the head: expected {end - first}, of {vocabulary} on {split.size} ranks"
        )
    linear_logprob.check(hidden, weight, targets, None, softcap, temperature, want)
    elsewhere = (targets < first) | (targets >= end)
    options = Options(softcap, frozenset(want), linear_logprob.ROWS[linear_logprob.kind(hidden)], False, hidden.dtype)
    tau: Any = temperature.to(hidden.device, backend.stat_dtype(hidden)) if isinstance(temperature, Tensor) else float(temperature)
    own = torch.where(elsewhere, 0, targets - first)
    return TokenStats(*_SplitLogprob.apply(hidden, weight, own, elsewhere, tau, options, split)[:-2])
