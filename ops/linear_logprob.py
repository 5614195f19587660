"""Log-probabilities of targets under a linear head, with the statistics that losses need and no [N, V] tensor kept.

z = softcap(hidden W^T + bias) / temperature with softcap(u) = c tanh(u / c); p = softmax(z):
logp = z_y - lse(z); entropy = -sum p log p (0 log 0 = 0, nats); mean_logit = mean of the finite z; logsq = log sum p^2;
top1 = (first argmax == y); topk_entropy = -sum r log(r + 1e-10) over the 20 largest logits, renormalised to r.
Gradients with respect to z: dlogp = 1[y] - p; dlse = p; dentropy = -p (log p + entropy); dmean_logit = 1 / count; the others carry none.
Rows go in chunks: one matrix product makes the logits of a chunk, which the backward makes again. Where the head is frozen and only logp is
differentiated, dlogp/dhidden is made in the forward (one product more) and the backward scales its rows: 2 products instead of 3.
Saved for backward: hidden, lse [N], and entropy [N] when wanted (frozen head: dlogp/dhidden [N, D] too).
Statistics are float32 (float64 for float64 inputs): low-precision logits are widened before the softmax, and the head gradient is summed
over chunks in float32.
Shapes: N scored positions, D hidden, V vocab, r rows of a chunk.
Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2411.09009, section 4 (logits made again).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from treetune.ops import backend, logprob_kernels, logprob_torch, product
from treetune.ops.logprob_torch import TOP, Chunk, Grads, Options, entropy_of, final_logits, rows_of

WANT = ("entropy", "mean_logit", "logsq", "top1", "topk_entropy")
ROWS = {"cpu": 256, "cuda": 1024}  # rows of a chunk
SLAB = {"cpu": 1 << 11, "cuda": 1 << 14}  # rows of the head whose gradient is added at a time: the CPU keeps the product in its cache


def _by_kernel(x: Tensor) -> bool:
    """Whether rows are read at once; a CPU reads a few at a time, which would be counted for long."""
    return backend.use_triton(x) or backend.counted()


def kind(x: Tensor) -> str:
    """Where rows are, as `ROWS` and `SLAB` say it."""
    return "cuda" if backend.on_gpu(x) else x.device.type


class TokenStats(NamedTuple):
    """Per-row results [N]; None where not wanted. Without targets logp is None too, which no objective asks for."""

    logp: Tensor
    entropy: Tensor | None = None
    lse: Tensor | None = None
    mean_logit: Tensor | None = None
    logsq: Tensor | None = None
    top1: Tensor | None = None
    topk_entropy: Tensor | None = None


class Inputs(NamedTuple):
    """hidden [N, D], weight [V, D], bias [V], targets [N], temperature [N] or a number."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor | None
    tau: Tensor | float


class Part(NamedTuple):
    """Of a head of which other ranks have the other rows.

    elsewhere [N]: rows whose target is none of these, for which it is 0; count [N]: of finite logits, where their mean is differentiated.
    """

    elsewhere: Tensor
    count: Tensor | None


def linear_logprob_ref(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    want: tuple[str, ...] = (),
) -> TokenStats:
    """The formulas on the whole [N, V], differentiated by autograd: the twin that tests compare against."""
    z = hidden @ weight.to(hidden.dtype).T
    z = (z if bias is None else z + bias.to(z.dtype)).to(backend.stat_dtype(hidden))
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    lse, finite = z.logsumexp(-1), z > -torch.inf
    logs = torch.where(finite, z - lse[:, None], 0)
    p = torch.where(finite, logs.exp(), 0)
    top = z.detach().topk(min(TOP, z.shape[-1]), -1).values.softmax(-1)
    stats = {
        "entropy": -(p * logs).sum(-1),
        "mean_logit": torch.where(finite, z, 0).sum(-1) / finite.sum(-1),
        "logsq": (2 * z.detach()).logsumexp(-1) - 2 * lse.detach(),
        "top1": None if targets is None else z.argmax(-1) == targets,
        "topk_entropy": -(top * (top + 1e-10).log()).sum(-1),
    }
    logp: Any = None if targets is None else z.gather(-1, targets[:, None])[:, 0] - lse
    return TokenStats(logp, lse=lse, **{name: stats[name] for name in want})


def _buffer(hidden: Tensor, weight: Tensor, options: Options) -> Tensor | None:
    """One buffer for the logits of every chunk, where torch makes them on the CPU: fresh pages cost as much as a pass over them."""
    return None if backend.on_gpu(hidden) or product.fast(hidden) else hidden.new_empty(min(options.rows, hidden.shape[0]), weight.shape[0])


def _logits(h: Tensor, w: Tensor, bias: Tensor | None, buffer: Tensor | None) -> Tensor:
    """Raw logits [r, V]: in the dtype of h on the CPU; on CUDA the product of low-precision inputs keeps its float32 sums."""
    if buffer is not None:
        out = buffer[: h.shape[0]]
        return torch.mm(h, w.T, out=out) if bias is None else torch.addmm(bias, h, w.T, out=out)
    low = h.dtype in (torch.bfloat16, torch.float16)
    z = torch.mm(h, w.T, out_dtype=torch.float32) if low and backend.on_gpu(h) else product.rows_t(h, w)
    return z if bias is None else z.add_(bias)


def _write(out: Tensor, dz: Tensor, weight: Tensor, scales: Tensor | None = None) -> None:
    """out [r, D] = dz W, its rows times scales [r] where given."""
    out.copy_(product.rows(dz, weight)) if product.fast(dz) else torch.mm(dz, weight, out=out)
    if scales is not None:
        out.mul_(scales[:, None])


def stats_triton(z: Tensor, y: Tensor | None, tau: Tensor | float, options: Options) -> Chunk:
    """What logprob_torch.stats gives, from the Triton kernel; dlogp/dz comes exact, without row scales."""
    stats = {}
    if "topk_entropy" in options.want:
        top = z.topk(min(TOP, z.shape[1]), -1).values  # softcap and temperature keep the order
        stats["topk_entropy"] = entropy_of(final_logits(top, options.softcap, tau))
    ahead = options.dtype if options.ahead else None
    rows, dz = logprob_kernels.stats(z, y, tau, options.softcap, extras=bool(options.want), ahead=ahead)
    wanted = {"lse", *options.want} if y is None else {"lse", "logp", *options.want}
    return stats | {name: row for name, row in rows.items() if name in wanted}, dz, None


def grad_triton(
    z: Tensor,
    y: Tensor | None,
    tau: Tensor | float,
    lse: Tensor,
    entropy: Tensor | None,
    g: Grads,
    options: Options,
) -> Tensor:
    """What logprob_torch.grad gives, from the Triton kernel."""
    return logprob_kernels.grad(z, y, tau, options.softcap, lse, (*g, entropy), dtype=options.dtype)


def _chunks(n: int, rows: int) -> Iterator[slice]:
    return (slice(i, min(i + rows, n)) for i in range(0, n, rows))


def _empty_stats(hidden: Tensor, has_targets: bool, want: frozenset[str]) -> dict[str, Tensor]:
    names = ["lse", *(["logp"] if has_targets else []), *sorted(want)]
    dtype = backend.stat_dtype(hidden)
    return {name: hidden.new_empty(hidden.shape[0], dtype=torch.bool if name == "top1" else dtype) for name in names}


def forward_chunks(
    inputs: Inputs, options: Options, see: Callable[[Tensor, slice], None] | None = None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """All statistics [N] by name, and dlogp/dhidden [N, D] with `ahead`. see: is given the raw logits [r, V] of each chunk."""
    hidden, weight, bias, targets, tau = inputs
    n, run = hidden.shape[0], stats_triton if _by_kernel(hidden) else logprob_torch.stats
    weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    stats = _empty_stats(hidden, targets is not None, options.want)
    jacobian = torch.empty_like(hidden) if options.ahead else None
    buffer = _buffer(hidden, weight, options)
    for rows in _chunks(n, options.rows):
        z = _logits(hidden[rows], weight, bias, buffer)
        if see is not None:
            see(z, rows)
        chunk, dz, scales = run(z, rows_of(targets, rows), rows_of(tau, rows), options)
        for name, value in chunk.items():
            stats[name][rows] = value
        if jacobian is not None:
            assert dz is not None
            _write(jacobian[rows], dz, weight, scales)
        del z, dz  # else the logits of two chunks are there at once
    return stats, jacobian


def backward_chunks(
    inputs: Inputs,
    lse: Tensor,
    entropy: Tensor | None,
    g: Grads,
    needs: Sequence[bool],
    options: Options,
    part: Part | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dhidden, dweight and dbias (None where not needed); the logits of a chunk are made again."""
    hidden, weight, bias, targets, tau = inputs
    run = grad_triton if _by_kernel(hidden) else logprob_torch.grad
    dtype = backend.stat_dtype(hidden)  # float32 sums over chunks: in bfloat16 64 chunks would err by 1e-2
    w, b = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    dh = torch.empty_like(hidden) if needs[0] else None
    dw = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if needs[1] else None
    db = torch.zeros(weight.shape[0], dtype=dtype, device=weight.device) if needs[2] else None
    buffer = _buffer(hidden, w, options)
    for rows in _chunks(hidden.shape[0], options.rows):
        h, chunk = hidden[rows], Grads(*(rows_of(x, rows) for x in g))
        z, known = _logits(h, w, b, buffer), (rows_of(tau, rows), lse[rows], rows_of(entropy, rows))
        first = None if part is None else z[:, :1].clone()
        dz = run(z, rows_of(targets, rows), *known, chunk, options)
        if part is not None and first is not None:
            _mend(dz, logprob_torch.grad(first, None, *known, _of_one(chunk, part, rows), options), part.elsewhere[rows])
        if dh is not None:
            _write(dh[rows], dz, w)
        if db is not None:
            db += dz.sum(0, dtype=dtype)
        if dw is not None:
            _accumulate(dw, dz, h, rows_of(targets, rows))
        del dz
    return dh, None if dw is None else dw.to(weight.dtype), None if db is None or bias is None else db.to(bias.dtype)


def _of_one(g: Grads, part: Part, rows: slice) -> Grads:
    """Gradients of statistics as a block of one column takes them."""
    return g if g.mean_logit is None or part.count is None else g._replace(mean_logit=g.mean_logit / part.count[rows])


def _mend(dz: Tensor, ordinary: Tensor, elsewhere: Tensor) -> None:
    """The gradient [r, 1] of the first logit in rows whose target is elsewhere, which was taken for that of the target."""
    dz[:, :1] = torch.where(elsewhere[:, None], ordinary.to(dz.dtype), dz[:, :1])


def _accumulate(dw: Tensor, dz: Tensor, h: Tensor, y: Tensor | None) -> None:
    """dw += dz^T h, summed over chunks in the dtype of dw; consumes dz. A slab of the vocabulary at a time: no second [V, D]."""
    if dw.dtype == h.dtype:
        dw.addmm_(dz.T, h)
        return
    if not backend.on_gpu(h) and y is not None:
        # Products are rounded to h.dtype on the CPU. The targets' entries, the large ones, go around that: they are a sparse sum
        entries = dz.gather(1, y[:, None]).to(dw.dtype)
        dw.index_add_(0, y, entries * h)
        dz.scatter_(1, y[:, None], 0)
    width = SLAB[kind(h)]
    for i in range(0, dw.shape[0], width):
        slab = dz[:, i : i + width].T
        dw[i : i + width].add_(torch.mm(slab, h, out_dtype=dw.dtype) if backend.on_gpu(h) else slab @ h)  # `+=` would copy it onto itself


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(hidden, weight, bias, targets, tau, options):
        stats, jacobian = forward_chunks(Inputs(hidden, weight, bias, targets, tau), options)
        return *(stats.get(name) for name in TokenStats._fields), jacobian

    @staticmethod
    def setup_context(ctx, inputs, output):
        hidden, weight, bias, targets, tau, ctx.options = inputs
        stats, jacobian = TokenStats(*output[:-1]), output[-1]
        constant = (stats.logsq, stats.top1, stats.topk_entropy, jacobian)
        ctx.mark_non_differentiable(*(x for x in constant if x is not None))
        ctx.set_materialize_grads(False)
        ctx.tau = None if isinstance(tau, Tensor) else tau
        ctx.save_for_backward(hidden, weight, bias, targets, tau if ctx.tau is None else None, stats.lse, stats.entropy, jacobian)

    @staticmethod
    @once_differentiable
    def backward(ctx, logp, entropy, lse, mean_logit, *_):
        hidden, weight, bias, targets, tau, saved_lse, saved_entropy, jacobian = ctx.saved_tensors
        g, needs = Grads(logp, entropy, lse, mean_logit), ctx.needs_input_grad
        if all(x is None for x in g):
            return (None,) * 6
        if jacobian is not None and all(x is None for x in g[1:]):
            return (jacobian * logp[:, None]).to(hidden.dtype), *(None,) * 5
        tau = ctx.tau if tau is None else tau
        grads = backward_chunks(Inputs(hidden, weight, bias, targets, tau), saved_lse, saved_entropy, g, needs, ctx.options)
        return *grads, None, None, None


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    want: tuple[str, ...] = (),
) -> TokenStats:
    """log p(target) and the wanted statistics of softmax(softcap(hidden W^T + bias) / temperature), row by row.

    hidden [N, D], weight [V, D], targets int64 [N] or None, bias [V], temperature a number or [N] (a constant). `want` names any of
    entropy, mean_logit, logsq, top1, topk_entropy. Returns float32 [N] (float64 for float64; top1 is bool), logp and entropy in nats.
    logp, entropy, lse and mean_logit are differentiable in hidden, weight and bias. The product runs in the dtype of hidden; a weight
    of another dtype is cast to it and its gradient comes back in its own, so that a float32 weight keeps the float32 sum.
    Errors: ValueError for shapes that do not fit, an unknown name in want, or a temperature or softcap that is not positive.
    """
    check(hidden, weight, targets, bias, softcap, temperature, want)
    constant_head = not weight.requires_grad and (bias is None or not bias.requires_grad)
    ahead = torch.is_grad_enabled() and hidden.requires_grad and constant_head and targets is not None and "mean_logit" not in want
    options = Options(softcap, frozenset(want), ROWS[kind(hidden)], ahead, hidden.dtype)
    tau = temperature.to(hidden.device, backend.stat_dtype(hidden)) if isinstance(temperature, Tensor) else float(temperature)
    return TokenStats(*_LinearLogprob.apply(hidden, weight, bias, targets, tau, options)[:-1])


def check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float | Tensor,
    want: tuple[str, ...],
) -> None:
    """Raise ValueError, as `linear_logprob` says, for what it does not take."""
    n = hidden.shape[0]
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"linear_logprob got hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}: expected [N, D] and [V, D]")
    if targets is not None and (targets.shape != (n,) or targets.dtype != torch.int64):
        raise ValueError(f"linear_logprob got targets {targets.dtype} {tuple(targets.shape)}: expected int64 [{n}], one per row of hidden")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_logprob got bias {tuple(bias.shape)}: expected [{weight.shape[0]}], one per row of weight")
    unknown = sorted(set(want) - set(WANT))
    if unknown or ("top1" in want and targets is None):
        raise ValueError(f"linear_logprob cannot give {unknown or ['top1']}: it knows {', '.join(WANT)}, and top1 needs targets")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"linear_logprob got softcap {softcap}: expected a positive number, or None for no cap")
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"linear_logprob got temperature {temperature}: expected a positive number or a tensor [N]")
    if isinstance(temperature, Tensor) and (temperature.shape != (n,) or temperature.requires_grad):
        raise ValueError(f"linear_logprob got temperature {tuple(temperature.shape)}: expected a number or a constant tensor [{n}]")
