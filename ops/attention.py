"""Attention over a packed stream of token trees, one rule for every backend.

A trunk token sees the trunk tokens of its document up to itself; a branch token sees the first `start` trunk tokens of its document and its
own branch up to itself; a window further asks positions[q] - positions[k] < window; nothing crosses documents.
The mask work is done once per micro-batch by `plan`, for each window of the model's layers; a layer then calls `attention` with the plan of
its window. Backends: "sdpa" (CPU, document by document: see attention_torch), "varlen" (CUDA; no branches, soft-cap or sinks), "flex"
(CUDA, FlexAttention). Where ranks share a stream a plan is of this rank's queries, which see the keys of all: `attention_of_part`.
Shapes: T tokens, H heads, K kv heads (H a multiple of K), d key width, e value width; q [T, H, d], k [T, K, d], v [T, K, e].
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from treetune.ops import attention_mask, attention_torch, backend, kept
from treetune.ops.attention_torch import Weighting
from treetune.ops.context_parallel import Part
from treetune.ops.tensor_parallel import Split

BACKENDS = ("sdpa", "varlen", "flex")
GRAPHS = 64  # that FlexAttention may be compiled to: by dtype, widths, windows, soft-caps, short streams, and with gradients or without
WIDEST, WIDTHS, CAPABILITY = 256, 8, (8, 0)  # of FlashAttention: the widest head, what divides a width, the oldest GPUs


class Call(NamedTuple):
    """A call of varlen attention: rows of q and of k and v, from the first to before the second, and where documents begin in these.

    A query sees the keys of its document up to its own, counted from the ends of both.
    """

    queries: tuple[int, int]
    keys: tuple[int, int]
    cu_q: torch.Tensor  # int32 [D + 1], on the device of the attention
    cu_k: torch.Tensor
    longest_q: int
    longest_k: int


class Pattern(NamedTuple):
    """The attention of layers with one window: None where it reaches every document's start."""

    window: int | None
    backend: str
    documents: tuple[attention_torch.Document, ...] = ()  # "sdpa" only
    block_mask: object = None  # "flex" only: torch.nn.attention.flex_attention.BlockMask
    pieces: tuple[attention_torch.Piece, ...] = ()  # "sdpa" only, of the queries of a part, as are
    calls: tuple[Call, ...] = ()  # "varlen" only: one for each of its chunks


class Plan(NamedTuple):
    """The attention of one micro-batch: a pattern for each window of the model's layers, which `of` chooses by."""

    tokens: int
    cu_docs: torch.Tensor  # int32 [D + 1], on the device of the attention
    longest: int  # tokens of the longest document
    plain: bool  # no layer has a soft-cap or sinks
    windows: tuple[int | None, ...]  # of the layers, in tokens
    patterns: tuple[Pattern, ...]  # one for each of the windows
    part: Part | None = None  # the tokens of this rank, where several share the stream

    def of(self, window: int | None) -> Plan:
        """The plan of the layers with this window; ValueError where the plan was made for others."""
        if window not in self.windows:
            raise ValueError(f"the plan is of windows {self.windows} and the layer's is {window}: call plan(batch, windows=...) with all")
        return self._replace(windows=(window,), patterns=(self.patterns[self.windows.index(window)],))


def attention_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: dict[str, torch.Tensor],
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(cap(q k^T * scale) + mask) v with the dense [T, T] mask of the rule: the twin that tests compare against."""
    rows = torch.arange(q.shape[0], device=q.device)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~attention_mask.allowed(batch, rows[:, None], rows[None], window), -torch.inf)
    if sinks is None:
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    total = torch.logaddexp(scores.logsumexp(-1), sinks[:, None])  # [H, T]
    return torch.einsum("hqk,khd->qhd", (scores - total[..., None]).exp(), v)


def plan(
    batch: dict[str, torch.Tensor],
    *,
    windows: Sequence[int | None] = (None,),
    plain: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    width: int | None = None,
    backend: str | None = None,
    split: Split | None = None,
) -> Plan:
    """The attention plan of a batch, made on the host once per micro-batch.

    Reads cu_docs [D + 1], tokens [T], and positions, branch and start [T] where present. `windows` are the sliding windows of the model's
    layers in tokens, None for full attention. `device` is where the attention will run (default: where the batch is), `dtype` in what
    (default: bf16 on CUDA), `width` the widest head of keys or values (default: one that all backends serve), and `plain` says that no
    layer has a soft-cap or sinks; they choose the backend unless it is named. `split` are the ranks that share the stream.
    Errors: ValueError for boundaries that do not cover the tokens in order, branches out of order, or a backend that cannot serve.
    """
    tokens = (batch["tokens"] if "tokens" in batch else batch["positions"]).shape[0]
    offsets = attention_mask.check_boundaries(batch["cu_docs"], tokens)
    attention_mask.check_branches(batch, tokens)
    device = torch.device(batch["cu_docs"].device if device is None else device)
    longest = max((hi - lo for lo, hi in zip(offsets, offsets[1:], strict=False)), default=0)
    windows = tuple(dict.fromkeys(windows))
    reached = [_reaching(window, batch, tokens) for window in windows]
    need = _Need(device, dtype, "branch" in batch, plain, width)
    part = None if split is None or not tokens else Part(split, tokens)
    pattern_of = functools.partial(_pattern, batch, offsets) if part is None else functools.partial(_pattern_of_part, part, batch, offsets)
    patterns = {window: pattern_of(device, window, _choose(backend, need, window)) for window in dict.fromkeys(reached)}
    bounds = batch["cu_docs"].to(device, torch.int32, non_blocking=device.type == "cuda")
    return Plan(tokens, bounds, longest, plain, windows, tuple(patterns[window] for window in reached), part)


def _reaching(window: int | None, batch: dict[str, torch.Tensor], tokens: int) -> int | None:
    """The window, or None where it reaches every document's start: any backend can then serve, and trunks stay causal calls."""
    if window is not None and window < 1:
        raise ValueError(f"window got {window}: expected at least 1 token, or None for full attention")
    return None if window is not None and tokens and int(attention_mask.positions_of(batch).max()) < window else window


def _pattern(batch: dict[str, torch.Tensor], offsets: list[int], device: torch.device, window: int | None, backend: str) -> Pattern:
    if backend == "sdpa":
        return Pattern(window, backend, tuple(attention_torch.documents_of(batch, offsets, window)))
    return Pattern(window, backend, (), attention_mask.block_mask(batch, offsets[-1], window, device) if backend == "flex" else None)


def _pattern_of_part(
    part: Part, batch: dict[str, torch.Tensor], offsets: list[int], device: torch.device, window: int | None, backend: str
) -> Pattern:
    if backend == "sdpa":
        return Pattern(window, backend, pieces=tuple(attention_torch.pieces_of(batch, offsets, window, part)))
    if backend == "flex":
        return Pattern(window, backend, block_mask=attention_mask.block_mask(batch, part.tokens, window, device, part))
    return Pattern(window, backend, calls=tuple(_call(offsets, part, number, device) for number in range(len(part.spans))))


def _call(offsets: list[int], part: Part, number: int, device: torch.device) -> Call:
    """The queries of a chunk over the keys of their documents up to the chunk's end; of an empty chunk its first row, the last token."""
    begin = min(part.spans[number][0], part.tokens - 1)
    end = max(part.spans[number][1], begin + 1)
    inside = [(max(lo, begin), lo, min(hi, end)) for lo, hi in zip(offsets, offsets[1:], strict=False) if max(lo, begin) < min(hi, end)]
    first = inside[0][1]
    cu_q, cu_k = ([0, *(last - start for _, _, last in inside)] for start in (begin, first))
    cu_q, cu_k = (torch.tensor(cu, dtype=torch.int32).to(device, non_blocking=device.type == "cuda") for cu in (cu_q, cu_k))
    longest_q, longest_k = max(last - own for own, _, last in inside), max(last - lo for _, lo, last in inside)
    return Call((number * part.chunk, number * part.chunk + end - begin), (first, end), cu_q, cu_k, longest_q, longest_k)


class _Need(NamedTuple):
    """What a backend has to serve, whatever the window."""

    device: torch.device
    dtype: torch.dtype | None
    branches: bool
    plain: bool
    width: int | None = None


def _choose(backend: str | None, need: _Need, window: int | None) -> str:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"attention backend got {backend!r}: expected one of {', '.join(BACKENDS)}")
    missing, device = _varlen_lacks(need, window), need.device
    if backend == "varlen" and missing:
        raise ValueError(f"attention backend varlen cannot honour this plan: {missing}. Use backend='flex', or 'sdpa' on the CPU")
    if backend == "flex" and device.type == "cpu":
        raise ValueError("attention backend flex has no backward on the CPU: use backend='sdpa'")
    if backend == "sdpa" and device.type != "cpu":
        raise ValueError(f"attention backend sdpa runs document by document and is meant for the CPU, not {device}: use varlen or flex")
    if backend is None:
        backend = "sdpa" if device.type == "cpu" else "flex" if missing else "varlen"
    return backend


def _varlen_lacks(need: _Need, window: int | None) -> str:
    """Why variable-length attention cannot serve, or an empty string."""
    if need.branches:
        return "it knows no branches"
    if not need.plain:
        return "it knows no soft-caps and no sinks"
    if need.device.type != "cuda":
        return f"it runs on CUDA only, not on {need.device.type}"
    if need.dtype not in (None, torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {need.dtype}"
    if need.width is not None and (need.width > WIDEST or need.width % WIDTHS):
        return f"it takes heads of at most {WIDEST} features in multiples of {WIDTHS}, not {need.width}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(need.device) < CAPABILITY:
        return "this GPU has a compute capability below 8.0"
    names = _varlen()[1]
    if not names:
        return "this torch has no torch.nn.attention.varlen"
    return "this torch's varlen_attn takes no window" if window is not None and "window_size" not in names else ""


@functools.cache
def _varlen() -> tuple[Callable[..., Any] | None, tuple[str, ...]]:
    """varlen_attn and its parameter names, which differ between torch 2.10 and 2.13; (None, ()) where it is missing."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None, ()
    return varlen_attn, tuple(inspect.signature(varlen_attn).parameters)


def _attention_varlen(q, k, v, plan: Plan, weighting: Weighting) -> torch.Tensor:
    whole = Call((0, plan.tokens), (0, plan.tokens), plan.cu_docs, plan.cu_docs, plan.longest, plan.longest)
    return _call_varlen(q, k, v, whole, plan.patterns[0].window, weighting)


def _call_varlen(q, k, v, call: Call, window: int | None, weighting: Weighting) -> torch.Tensor:
    varlen_attn, names = _varlen()
    assert varlen_attn is not None
    width, scale = v.shape[-1], weighting.scale
    if q.shape[-1] != width:
        # FlashAttention has one width for all: zeros behind the shorter change no score, and are cut off the values.
        q, k, v = (F.pad(x, (0, max(q.shape[-1], width) - x.shape[-1])) for x in (q, k, v))
    options: dict[str, Any] = {"scale": scale}
    if "scale" not in names:
        # This torch's varlen_attn scales by d^-0.5 itself: what is left of the scale goes into q.
        q, options = q * (scale * q.shape[-1] ** 0.5), {}
    if "window_size" in names:
        # Keys to the left of the query besides its own, and none to the right, which makes it causal.
        options["window_size"] = (-1 if window is None else window - 1, 0)
    else:
        options["is_causal"] = True
    if "num_splits" in names:
        options["num_splits"] = 1  # a document's result must not depend on what it is packed with
    if "enable_gqa" in names:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    elif q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return varlen_attn(q, k, v, call.cu_q, call.cu_k, call.longest_q, call.longest_k, **options)[..., :width]


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import flex_attention

    # Without compilation flex_attention holds the scores of all pairs, [heads, T, T]. Compiled once, for all layers. Where there are more
    # graphs than torch compiles (8 unless told otherwise) it runs without, silently, unless the whole of it has to be one graph.
    config.recompile_limit = max(config.recompile_limit, GRAPHS)
    return torch.compile(flex_attention, fullgraph=True)


def _capped(softcap: float, q: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A score_mod for queries [1, H, T, d]."""
    # A tensor and not the number: a second number in one process would be compiled as a symbol, which fails.
    caps = torch.full(q.shape[1:2], softcap, dtype=torch.float32, device=q.device)

    def score_mod(score, b, h, q, k):
        return caps[h] * torch.tanh(score / caps[h])

    return score_mod


def _attention_flex(q, k, v, plan: Plan, weighting: Weighting) -> torch.Tensor:
    from torch.nn.attention.flex_attention import AuxRequest

    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, T, width]
    options: dict[str, Any] = {"block_mask": plan.patterns[0].block_mask, "scale": weighting.scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if weighting.softcap is not None:
        options["score_mod"] = _capped(weighting.softcap, q)
    if weighting.sinks is None:
        return _compiled_flex()(q, k, v, **options)[0].transpose(0, 1)
    values, extra = _compiled_flex()(q, k, v, return_aux=AuxRequest(lse=True), **options)
    # A sink s in the denominator scales the values by e^lse / (e^lse + e^s).
    share = torch.sigmoid(extra.lse - weighting.sinks.to(extra.lse.dtype)[:, None])  # [1, H, T]
    return (values * share[..., None]).to(values.dtype)[0].transpose(0, 1)


def _counted(q, k, v, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    backend.tell("attention", q, k, v, out, lse, pairs)
    return out, lse


class _Counted(torch.autograd.Function):
    """A kernel of attention that is told of and computes nothing, with the memory of FlashAttention's."""

    @staticmethod
    def forward(ctx, q, k, v, pairs):
        ctx.pairs = pairs * q.shape[1]
        out, lse = kept.result(functools.partial(_counted, q, k, v, ctx.pairs))
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        grads, sums = [torch.empty_like(x) for x in (q, k, v)], torch.empty_like(q, dtype=torch.float32)
        backend.tell("attention_backward", q, k, v, out, lse, grad, *grads, sums, ctx.pairs)
        return *grads, None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(cap(q k^T * scale)) v under the mask of a plan of one window; q [T, H, d], k [T, K, d], v [T, K, e] -> [T, H, e].

    scale defaults to d^-0.5; cap(x) is c tanh(x / c) for a soft-cap c; sinks [H] are logits that join the denominator and carry no value.
    Errors: ValueError when the shapes do not fit, or the plan was made for several windows, another device or dtype, or plain attention.
    """
    weighting = Weighting(q.shape[-1] ** -0.5 if scale is None else scale, softcap, sinks)
    _check(q, k, v, plan, weighting)
    pattern = plan.patterns[0]
    if backend.on_gpu(q) and not q.is_cuda:
        return _Counted.apply(q, k, v, attention_torch.pairs(pattern.documents))
    if pattern.backend == "sdpa":
        return attention_torch.attention(q, k, v, pattern.documents, weighting)
    if pattern.backend == "flex":
        return _attention_flex(q, k, v, plan, weighting)
    _check_half(q)
    return _attention_varlen(q, k, v, plan, weighting)


def attention_of_part(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, weighting: Weighting) -> torch.Tensor:
    """`attention` of this rank's queries [t, H, d] over the keys and values [T, K, d] of the whole stream -> [t, H, e].

    What rows have that repeat the last token of the stream may be anything. Errors: those of `attention`.
    """
    pattern = plan.patterns[0]
    _check_plan(q, plan, weighting)
    if plan.part is None or q.shape[0] != plan.part.rows or k.shape[0] != plan.tokens:
        raise ValueError(f"attention of a part got q {tuple(q.shape)} and k {tuple(k.shape)}, and the plan's part is {plan.part}")
    if backend.on_gpu(q) and not q.is_cuda:
        return _Counted.apply(q, k, v, attention_torch.pairs_of(pattern.pieces))
    if pattern.backend == "sdpa":
        return attention_torch.attention_of(q, k, v, pattern.pieces, weighting)
    if pattern.backend == "flex":
        return _attention_flex(q, k, v, plan, weighting)
    _check_half(q)
    chunks = []
    for call in pattern.calls:
        (begin, end), (first, last) = call.queries, call.keys
        out = _call_varlen(q[begin:end], k[first:last], v[first:last], call, pattern.window, weighting)
        chunks.append(F.pad(out, (0, 0, 0, 0, 0, plan.part.chunk - out.shape[0])))
    return torch.cat(chunks)


def _check(q, k, v, plan: Plan, weighting: Weighting) -> None:
    if q.shape[1] % k.shape[1] or k.shape[:2] != v.shape[:2] or (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2]):
        raise ValueError(
            f"attention got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected [T, H, d], [T, K, d], [T, K, e], K | H"
        )
    if plan.tokens != q.shape[0]:
        raise ValueError(f"the plan was made for {plan.tokens} tokens and q has {q.shape[0]}: make one plan per micro-batch")
    if plan.part is not None:
        raise ValueError("the plan is of the queries of one of several ranks: call attention_of_part, or plan without split")
    _check_plan(q, plan, weighting)


def _check_half(q: torch.Tensor) -> None:
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"the plan is for bfloat16 or float16 (varlen attention) and q is {q.dtype}: call plan(batch, dtype=q.dtype)")


def _check_plan(q, plan: Plan, weighting: Weighting) -> None:
    softcap, sinks = weighting.softcap, weighting.sinks
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ValueError(f"sinks got shape {tuple(sinks.shape)}: expected [{q.shape[1]}], one per head")
    if plan.cu_docs.device != q.device:
        raise ValueError(f"the plan was made for {plan.cu_docs.device} and q is on {q.device}: call plan(batch, device=q.device)")
    if len(plan.patterns) != 1:
        raise ValueError(f"the plan serves layers of windows {plan.windows}: call attention with plan.of(window) of the layer")
    if plan.plain and (softcap is not None or sinks is not None):
        raise ValueError("the plan is for plain attention, and the layer has a soft-cap or sinks: call plan(batch, plain=False)")
