"""Sampling continuations from rows inside documents: one prefill of the documents, then one short step per position for all of them.

T tokens of the documents, M anchors, n rollouts of each, R = M n branches, G tokens of each branch, S trunk tokens a call sees,
H heads, K key/value heads, d head dim, L layers.
The keys and values of the documents are kept once, [T, K, d] a layer, and those of the branches beside them, [R, G, K, d]: a branch reads
both without a copy of its prefix, so memory grows with T + R G. Every branch has G tokens; an end token does not stop it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from treetune.core import strided
from treetune.core.lora import Lora
from treetune.core.param import Params
from treetune.models import MODELS, Model, decode, decoder_attention, dense, families, tensor_rules, together
from treetune.models.decoder_attention import Rule
from treetune.ops import attention_torch, noise
from treetune.ops.attention_torch import Weighting

CHUNK = 64  # branches of a document in one call: scores are [CHUNK, H, S], and no call reads trunk tokens after its last anchor
HEAD_ROWS = 256  # rows of logits at a time


class _Run(NamedTuple):
    """Branches lo:hi, which share a document: the trunk tokens that the last of them sees, at the rows `trunk` of the stream."""

    lo: int
    hi: int
    trunk: slice


_Sides = tuple[list[Tensor], list[Tensor]]  # keys and values, a tensor per layer


class _Trunk(NamedTuple):
    """What the branches start from: keys and values [1, T, K, d] per layer, runs, and the anchor of each branch [R].

    before: the ids up to each branch, of a model that keeps ids.
    """

    k: list[Tensor]
    v: list[Tensor]
    runs: tuple[_Run, ...]
    start: Tensor
    before: tuple[Tensor, ...] = ()


@torch.no_grad()
def branches(
    model: Model,
    batch: dict[str, Tensor],
    anchors: strided.Anchors,
    n: int,
    *,
    lora: Lora | None = None,
    seed: int,
    ids: Sequence[int] | None = None,
    **options: Unpack[decode.DrawOptions],
) -> decode.Samples:
    """n continuations of anchors.length tokens from each anchor of the documents of a stream; row m n + j is rollout j of anchor m.

    Reads tokens, positions [T] and cu_docs [D + 1] of bare documents, which stay on the host. temperature 0 takes the most probable
    token; otherwise the draw is from q = softmax(logits / temperature) cut as in `decode.sample`, and logp is of q before the cut. A
    token is a function of (seed, id of its document, anchor, rollout, position); `ids` [D] name the documents (default: their order).
    Adapters' dropout is off. lens is G everywhere. Where ranks have parts of the weights, all call this at the same time.

    Raises ValueError for options out of range, anchors outside their documents, or more positions than the model has.
    """
    draw, count = decode.Draw(**options), anchors.start.shape[0] * n
    _check(model, batch, anchors, n, draw)
    weights = families.to_sample(model)
    quiet = None if lora is None else families.settled(lora, weights)
    device, length = weights["embed_tokens"].device, anchors.length
    if count == 0:
        _pass(model, weights, quiet, length)
        empty = torch.zeros(0, length, device=device)
        return decode.Samples(empty.long(), empty, empty.clone(), torch.zeros(0, dtype=torch.int64, device=device))
    trunk, hidden = _prefill(model, weights, batch, anchors, n, quiet)
    key = _keys(seed, anchors, n, ids).to(device)
    own = tensor_rules.own_caches(model.cfg, tensor_rules.split_of(weights))
    branch_cache = decoder_attention.buffers(own, count, length, device)
    family, steps = MODELS[model.family], []
    head, rule = family.head(weights, model.cfg, quiet), family.logit_map(model.cfg)

    def logits(rows: Tensor) -> Tensor:
        return decode.all_logits(model, weights, decode.logits_of(rows, head, rule))

    for step in range(length):
        steps.append(_draw(family.widen(hidden, model.cfg, quiet), logits, noise.keys(key, trunk.start + step), draw))
        decode.check_finite(steps[-1][1], torch.arange(count, device=device), n)
        if step + 1 < length:
            hidden = _advance(model, weights, trunk, branch_cache, steps[-1][0], step, quiet)
    token, logp, log_kept = (torch.stack(parts, dim=1) for parts in zip(*steps, strict=True))
    return decode.Samples(token, logp, log_kept, torch.full((count,), length, device=device))


def _pass(model: Model, weights: Params, lora: Lora | None, length: int) -> None:
    """Take part in the branches of other ranks, where ranks have parts of the weights."""
    if families.in_parts(model):
        together.idle(model, weights, lora)
        MODELS[model.family].head(weights, model.cfg, lora)
        for _ in range(length - 1):
            together.idle(model, weights, lora)


def _check(model: Model, batch: dict, anchors: strided.Anchors, n: int, draw: decode.Draw) -> None:
    if "branch" in batch:
        raise ValueError("the stream branches already; expected bare documents to continue")
    if draw.temperature < 0 or not 0 < draw.top_p <= 1:
        raise ValueError(f"temperature is {draw.temperature} and top_p {draw.top_p}; expected 0 or more, and in (0, 1]")
    if draw.stop:
        raise ValueError(f"stop is {list(draw.stop)}; a branch has {anchors.length} tokens, whichever they are: leave stop out")
    strided.check(batch["cu_docs"].long().diff(), anchors, n)
    furthest = int(anchors.start.max()) + anchors.length if anchors.start.numel() else 0
    if furthest > model.cfg.shared_positions:
        raise ValueError(
            f"the last rollout ends at position {furthest}; the model has {model.cfg.shared_positions}: "
            "shorten the documents or the rollouts"
        )


def _prefill(model: Model, weights: Params, batch: dict, anchors: strided.Anchors, n: int, lora: Lora | None) -> tuple[_Trunk, Tensor]:
    """The documents' keys and values, and the hidden states [R, D] that predict the first token of each branch."""
    device, cfg = weights["embed_tokens"].device, model.cfg
    stream = {name: batch[name] for name in ("tokens", "positions", "cu_docs")}
    plan = decoder_attention.plan(stream, cfg, device=device)
    stream = {name: value.to(device) for name, value in stream.items()}
    size = stream["tokens"].shape[0]
    own = tensor_rules.own_caches(cfg, tensor_rules.split_of(weights))
    rows, (k, v) = torch.arange(size, device=device), decoder_attention.buffers(own, 1, size, device)
    cache = dense.Cache(k, v, torch.zeros_like(rows), rows, size)
    hidden = MODELS[model.family].forward(weights, stream, plan, cfg, lora=lora, cache=cache).hidden
    last = strided.prefix_rows(batch["cu_docs"], anchors).to(device)
    start = anchors.start.repeat_interleave(n)
    runs = _runs(batch["cu_docs"].tolist(), anchors.document.repeat_interleave(n), start)
    before = _before(stream["tokens"], runs, start.tolist()) if cfg.keeps_ids else ()
    return _Trunk(k, v, runs, start.to(device), before), hidden[last].repeat_interleave(n, 0)


def _before(tokens: Tensor, runs: tuple[_Run, ...], start: list[int]) -> tuple[Tensor, ...]:
    """The ids of the document up to each branch."""
    return tuple(tokens[trunk.start : trunk.start + start[row]] for lo, hi, trunk in runs for row in range(lo, hi))


def _runs(bounds: list[int], document: Tensor, start: Tensor) -> tuple[_Run, ...]:
    """Branches of each document, at most CHUNK together."""
    runs, lo = [], 0
    for doc, count in enumerate(torch.bincount(document, minlength=len(bounds) - 1).tolist()):
        for first in range(lo, lo + count, CHUNK):
            hi = min(first + CHUNK, lo + count)
            runs.append(_Run(first, hi, slice(bounds[doc], bounds[doc] + int(start[first:hi].max()))))
        lo += count
    return tuple(runs)


def _keys(seed: int, anchors: strided.Anchors, n: int, ids: Sequence[int] | None) -> Tensor:
    """int64 [R]: a key per branch."""
    names = anchors.document if ids is None else torch.as_tensor(ids, dtype=torch.int64)[anchors.document]
    rollout = torch.arange(n).repeat(anchors.start.shape[0])
    return noise.keys(seed, names.repeat_interleave(n), anchors.start.repeat_interleave(n), rollout)


def _draw(hidden: Tensor, logits: Callable[[Tensor], Tensor], key: Tensor, draw: decode.Draw) -> tuple[Tensor, Tensor, Tensor]:
    """Token, log q and log kept mass [R] each, a few rows of logits at a time."""
    parts = [decode.pick(logits(rows), keys, draw) for rows, keys in zip(hidden.split(HEAD_ROWS), key.split(HEAD_ROWS), strict=True)]
    token, logp, log_kept = zip(*parts, strict=True)
    return torch.cat(token), torch.cat(logp), torch.cat(log_kept)


def _advance(model: Model, weights: Params, trunk: _Trunk, branch_cache: _Sides, token: Tensor, step: int, lora: Lora | None) -> Tensor:
    """The hidden states [R, D] of the tokens just drawn, each the token number `step` of its branch."""
    rows = torch.arange(token.shape[0], device=token.device)
    attend = partial(_attend, trunk=trunk, branch_cache=branch_cache, step=step)
    cache = dense.Cache(*branch_cache, rows, torch.full_like(rows, step), step + 1, attend, trunk.before)
    batch = {"tokens": token, "positions": trunk.start + step}
    return MODELS[model.family].forward(weights, batch, None, model.cfg, lora=lora, cache=cache).hidden


def _attend(q: Tensor, layer: int, rule: Rule, *, trunk: _Trunk, branch_cache: _Sides, step: int) -> Tensor:
    """q [R, H, d] over the first `start` trunk tokens of each branch's document and its own tokens up to this one."""
    since = 0 if rule.window is None else max(0, step + 1 - rule.window)
    out = []
    for lo, hi, seen in trunk.runs:
        start, index = trunk.start[lo:hi, None], torch.arange(seen.stop - seen.start, device=q.device)
        visible = index < start  # [r, S]
        if rule.window is not None:
            visible = visible & (index > start + step - rule.window)
        far = tuple(side[layer][0, seen] for side in (trunk.k, trunk.v))
        near = tuple(side[layer][lo:hi, since : step + 1] for side in branch_cache)
        out.append(_mix(q[lo:hi], far, near, visible, rule.weighting))
    return torch.cat(out)


def _mix(q: Tensor, far: tuple[Tensor, ...], near: tuple[Tensor, ...], visible: Tensor, weighting: Weighting) -> Tensor:
    """One softmax over shared keys [S, K, d] and values [S, K, e] where visible [r, S], and each query's own [r, s, K, ...].

    q [r, H, d] -> [r, H, e]; the heads of a group share keys.
    """
    (far_k, far_v), (near_k, near_v) = far, near
    kv_heads = far_k.shape[1]
    grouped = q.view(q.shape[0], kv_heads, -1, q.shape[2]) * weighting.scale  # [r, K, H / K, d]
    scores = torch.cat([torch.einsum("rkhd,skd->rkhs", grouped, far_k), torch.einsum("rkhd,rskd->rkhs", grouped, near_k)], dim=-1)
    visible = F.pad(visible, (0, near_k.shape[1]), value=True)[:, None, None]
    sinks = None if weighting.sinks is None else weighting.sinks.view(kv_heads, -1, 1)
    p = attention_torch.probabilities(scores, visible, weighting.softcap, sinks).to(far_v.dtype)
    p_far, p_near = p.split([far_k.shape[0], near_k.shape[1]], dim=-1)
    return (torch.einsum("rkhs,ske->rkhe", p_far, far_v) + torch.einsum("rkhs,rske->rkhe", p_near, near_v)).flatten(1, 2)
