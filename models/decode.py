"""Sampling from the trainer's own weights: one packed prefill of all prompts, then one token at a time on a key/value cache.

P prompts, n completions of each, R = P n rows, S cache slots, M tokens of the longest completion, V vocabulary.
q(y) = softmax(logits / temperature); the sampler draws from q restricted to a kept set and renormalised.
A row's randomness is a function of (seed, id of its prompt, number of the completion, position): other rows do not matter.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from treetune.core.lora import Lora
from treetune.core.param import Params
from treetune.models import MODELS, Model, decoder_attention, dense, families, tensor_rules, together
from treetune.ops import noise, product, tensor_parallel


class Samples(NamedTuple):
    """Completions: row p n + j is completion j of prompt p; entries at and after `lens` are 0.

    tokens int64 [R, M], the stop token included; logp [R, M] log q in nats, float32; log_kept [R, M] the log of the mass
    under q of the set that was sampled from (0 where nothing was cut off); lens int64 [R].
    """

    tokens: Tensor
    logp: Tensor
    log_kept: Tensor
    lens: Tensor


class Draw(NamedTuple):
    """How tokens are drawn, and the tokens that end a completion."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: Sequence[int] = ()


class DrawOptions(TypedDict, total=False):
    """The fields of `Draw` as keywords."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    stop: Sequence[int]


class _Live(NamedTuple):
    """The rows still being written: their row numbers [r], next positions [r], last hidden states [r, D], and their cache."""

    row: Tensor
    position: Tensor
    hidden: Tensor
    cache: dense.Cache


@torch.no_grad()
def sample(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    n: int = 1,
    lora: Lora | None = None,
    max_new_tokens: int,
    seed: int,
    ids: Sequence[int] | None = None,
    tell: Callable[[Tensor, Tensor], Tensor | None] | None = None,
    **options: Unpack[DrawOptions],
) -> Samples:
    """n completions of each prompt (lists of token ids), each up to a token of `stop` or `max_new_tokens`.

    temperature 0 takes the most probable token; its logp is that of the untempered distribution, and so is its log_kept,
    since the set is that one token. Otherwise the kept set is cut by top_k (0: off), then top_p over what is left, then
    min_p times the largest probability. `ids` name the prompts for the randomness (default: their order).
    tell(rows [r], tokens [r]) is called with what was drawn as soon as it is; rows that are done may be among them. Where it returns
    bool [r] these rows end there, too.

    Where ranks have parts of the weights, all of them call this at the same time, or `join` in.
    Raises ValueError for an empty prompt, options out of range, or more positions than the model has.
    """
    draw = Draw(**options)
    _check(model, prompts, n, max_new_tokens, draw)
    go_on = together.agreed(model)
    weights = families.to_sample(model)
    quiet = None if lora is None else families.settled(lora, weights)
    live = _prefill(model, weights, prompts, n, quiet, max_new_tokens)
    family, device = MODELS[model.family], live.hidden.device
    head, rule = family.head(weights, model.cfg, quiet), family.logit_map(model.cfg)
    names = torch.tensor(list(range(len(prompts))) if ids is None else list(ids), device=device).repeat_interleave(n)
    key = noise.keys(seed, names, torch.arange(n, device=device).repeat(len(prompts)))
    stops = torch.tensor(list(draw.stop), dtype=torch.int64, device=device)
    out = empty(len(prompts) * n, max_new_tokens, device)
    done = torch.zeros(len(prompts) * n, dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        logits = all_logits(model, weights, logits_of(family.widen(live.hidden, model.cfg, quiet), head, rule))
        token, logp, log_kept = pick(logits, noise.keys(key[live.row], live.position), draw)
        check_finite(logp, live.row, n)
        _record(out, live.row, step, token, logp, log_kept, done)
        ended = None if tell is None else tell(live.row, token)
        done[live.row] |= torch.isin(token, stops) if ended is None else torch.isin(token, stops) | ended
        # The one wait for the device in a step: without it every call would go on to max_new_tokens.
        if step + 1 == max_new_tokens or bool(done.all()):
            break
        go_on(True)
        live = _advance(model, weights, live, token, done, quiet)
    while go_on(False):
        together.idle(model, weights, quiet)
    return trim(out)


@torch.no_grad()
def join(model: Model, lora: Lora | None) -> None:
    """Take part in a call of `sample` by other ranks, where ranks have parts of the weights."""
    weights, go_on = families.to_sample(model), together.agreed(model)
    quiet = None if lora is None else families.settled(lora, weights)
    together.idle(model, weights, quiet)
    MODELS[model.family].head(weights, model.cfg, quiet)
    while go_on(False):
        together.idle(model, weights, quiet)


def _check(model: Model, prompts: Sequence[Sequence[int]], n: int, max_new_tokens: int, draw: Draw) -> None:
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt is empty; expected at least one token in every prompt")
    ranges = {
        "n": (n, n >= 1, "at least 1"),
        "max_new_tokens": (max_new_tokens, max_new_tokens >= 1, "at least 1"),
        "temperature": (draw.temperature, draw.temperature >= 0, "0 or more"),
        "top_p": (draw.top_p, 0 < draw.top_p <= 1, "in (0, 1]"),
        "top_k": (draw.top_k, draw.top_k >= 0, "0 (off) or more"),
        "min_p": (draw.min_p, 0 <= draw.min_p < 1, "in [0, 1)"),
    }
    for name, (value, good, expected) in ranges.items():
        if not good:
            raise ValueError(f"{name} is {value}; expected {expected}")
    if (highest := max(max(prompt) for prompt in prompts)) >= model.cfg.vocab_size:
        raise ValueError(f"a prompt has the token id {highest}, and the model has {model.cfg.vocab_size} rows of vocabulary")
    longest = max(len(prompt) for prompt in prompts)
    if longest + max_new_tokens > model.cfg.shared_positions:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} need {longest + max_new_tokens} positions; "
            f"the model has {model.cfg.shared_positions}: shorten the prompt or lower max_new_tokens"
        )


def _prefill(model: Model, weights: Params, prompts: Sequence, n: int, lora: Lora | None, new: int) -> _Live:
    """All prompts as one packed stream, each once; its keys and values are then copied to the rows of its n completions."""
    device, cfg = weights["embed_tokens"].device, model.cfg
    lens = torch.tensor([len(prompt) for prompt in prompts])
    cu = torch.nn.functional.pad(lens.cumsum(0), (1, 0))
    positions = torch.arange(int(cu[-1])) - cu[:-1].repeat_interleave(lens)
    tokens = torch.tensor([token for prompt in prompts for token in prompt])
    batch = {"tokens": tokens, "positions": positions, "cu_docs": cu.int()}
    plan = decoder_attention.plan(batch, cfg, device=device)
    batch = {name: value.to(device) for name, value in batch.items()}
    own = tensor_rules.own_caches(cfg, tensor_rules.split_of(weights))
    k, v = decoder_attention.buffers(own, len(prompts) * n, int(lens.max()) + new, device)
    first = torch.arange(len(prompts), device=device) * n
    cache = dense.Cache(k, v, first.repeat_interleave(lens.to(device)), batch["positions"], int(lens.max()))
    hidden = MODELS[model.family].forward(weights, batch, plan, cfg, lora=lora, cache=cache).hidden
    # Only slots that a prompt fills: those behind are zeros in every row already.
    for buffer in (*cache.k, *cache.v) if n > 1 else ():
        rows = buffer.view(len(prompts), n, *buffer.shape[1:])
        rows[:, 1:, : cache.span] = rows[:, :1, : cache.span]
    last = (cu[1:] - 1).to(device)
    return _Live(
        torch.arange(len(prompts) * n, device=device), lens.to(device).repeat_interleave(n), hidden[last].repeat_interleave(n, 0), cache
    )


def _advance(model: Model, weights: Params, live: _Live, token: Tensor, done: Tensor, lora: Lora | None) -> _Live:
    """The hidden states of the tokens just drawn. Finished rows stay until a third of the rows are: copying the cache costs too."""
    row, position, cache = live.row, live.position, live.cache
    keep = (~done[row]).nonzero()[:, 0]
    if 3 * keep.shape[0] <= 2 * row.shape[0]:
        row, position, token = row[keep], position[keep], token[keep]
        cache = cache._replace(k=[side[keep] for side in cache.k], v=[side[keep] for side in cache.v])
    rows = torch.arange(row.shape[0], device=row.device)
    cache = cache._replace(rows=rows, slots=position, span=live.cache.span + 1)
    batch = {"tokens": token, "positions": position}
    hidden = MODELS[model.family].forward(weights, batch, None, model.cfg, lora=lora, cache=cache).hidden
    return _Live(row, position + 1, hidden, cache)


def logits_of(hidden: Tensor, head: Tensor, rule: dense.LogitMap) -> Tensor:
    """float32 [r, V]; the product has the precision of the trainer's (see ops.linear_logprob)."""
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        return dense.map_logits(torch.mm(hidden, head.T, out_dtype=torch.float32), rule)
    return dense.map_logits(product.rows_t(hidden, head).float(), rule)


def all_logits(model: Model, weights: Params, logits: Tensor) -> Tensor:
    """[r, V] of logits [r, v], of which this rank has those of its rows of the head: a collective where layers are split among ranks."""
    return tensor_parallel.gathered(tensor_rules.split_of(weights), logits, model.cfg.vocab_size)


def pick(logits: Tensor, key: Tensor, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """Token, log q and log kept mass [r] each. Inverse of the cumulative distribution in vocabulary order, at one uniform per row."""
    if draw.temperature == 0:
        logp, token = logits.log_softmax(-1).max(-1)
        return token, logp, logp
    logq = (logits / draw.temperature).log_softmax(-1)
    support = _support(logq, draw)
    # float64: in a float32 running sum near 1, a token of probability below 6e-8 adds nothing and could never be drawn.
    mass = logq.double().exp()
    total = (mass if support is None else mass.where(support, 0.0)).cumsum(-1)
    target = noise.uniform(key, 1).double() * total[:, -1:]
    # right: the first token whose running sum exceeds the target, so none of mass 0, also for a target of exactly 0.
    token = torch.searchsorted(total, target, right=True).clamp_(max=logits.shape[1] - 1)
    log_kept = torch.zeros_like(logq[:, 0]) if support is None else total[:, -1].log().clamp_(max=0.0).float()
    return token[:, 0], logq.gather(-1, token)[:, 0], log_kept


def _support(logq: Tensor, draw: Draw) -> Tensor | None:
    """bool [r, V]: the tokens that may be drawn, or None for all."""
    support = None
    if 0 < draw.top_k < logq.shape[1]:
        support = torch.zeros_like(logq, dtype=torch.bool).scatter_(-1, logq.topk(draw.top_k, -1).indices, True)
    if draw.top_p < 1:
        inside = logq if support is None else logq.where(support, -torch.inf)
        ordered, index = inside.sort(dim=-1, descending=True, stable=True)
        p = ordered.double().softmax(-1)
        before = p.cumsum(-1) - p  # the smallest set whose mass reaches top_p: a token stays if those before it fall short
        nucleus = torch.zeros_like(logq, dtype=torch.bool).scatter_(-1, index, before < draw.top_p)
        support = nucleus if support is None else support & nucleus
    if draw.min_p > 0:
        likely = logq >= logq.amax(-1, keepdim=True) + torch.tensor(draw.min_p).log()
        support = likely if support is None else support & likely
    return support


def empty(rows: int, length: int, device: torch.device) -> Samples:
    """Completions of so many rows of which none has a token yet."""
    zeros = torch.zeros(rows, length, device=device)
    return Samples(zeros.long(), zeros, zeros.clone(), torch.zeros(rows, dtype=torch.int64, device=device))


def _record(out: Samples, row: Tensor, step: int, token: Tensor, logp: Tensor, log_kept: Tensor, done: Tensor) -> None:
    """Write one step of the rows that are not done, in place."""
    going = ~done[row]
    for buffer, value in ((out.tokens, token), (out.logp, logp), (out.log_kept, log_kept)):
        buffer[row, step] = value.where(going, 0)
    out.lens[row] += going


def check_finite(logp: Tensor, row: Tensor, n: int) -> None:
    """Raise ValueError naming the prompt of the first of the rows [r], n of each prompt, whose logp [r] is not a number."""
    bad = (~torch.isfinite(logp)).nonzero()
    if bad.numel():
        raise ValueError(f"the model gives logits that are not numbers for prompt {int(row[bad[0, 0]]) // n}: its weights are not finite")


def trim(out: Samples) -> Samples:
    """Without the columns behind the longest completion."""
    longest = int(out.lens.max())
    return Samples(out.tokens[:, :longest], out.logp[:, :longest], out.log_kept[:, :longest], out.lens)
