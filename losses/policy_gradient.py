"""The objective of online RL over sampled completions: a policy loss, a divergence from a reference and an entropy bonus.

N scored tokens, B sequences, one per completion; a completion with nothing to train on has seq_lens 0 and still is one of B.
A batch has advantage [B], and may have old_logp, sampler_logp (nan: unknown), correction, ref_logp [N], entropy_keep bool [N] and the
scalar entropy_coef. Which of these it has must be the same for every micro-batch of a step, on all ranks.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from treetune.core.state import AXES, Batch, Metric, Objective, Params, Plan
from treetune.losses import correction as corrections
from treetune.losses import divergence, limits, policy, ratio, reduce

# What a term and a report may ask for, by the names of their parameters: [N] each but seq_lens [B]; correction and ref_logp may be None.
NAMES = ("ratio", "advantage", "logp", "log_ratio", "old_logp", "ref_logp", "correction", "seq", "seq_lens")
TOKEN = ratio.token
Tokens = dict[str, Tensor | None]
Term = Callable[..., Tensor]
Report = Callable[..., dict[str, Metric]]


def objective(
    logprob: Callable[..., Any],
    term: Term,
    *,
    ratio: Callable[..., Tensor] = ratio.token,
    reduction: Callable[..., tuple[Tensor, Tensor]] = reduce.by_token,
    kl: Callable[[Tensor, Tensor], Tensor] | None = None,
    kl_coef: float = 0.0,
    corrected_kl: bool = True,
    correction: Callable[..., Tensor] | None = None,
    opsm_threshold: float | None = None,
    entropy_coef: float = 0.0,
    reports: Sequence[Report] = (),
    want: tuple[str, ...] = ("entropy",),
) -> Objective:
    """reduction(m e c term + kl_coef r kl) - entropy_coef * mean entropy, per token, with the policy term alone masked and corrected.

    m leaves out sequences that moved too far (`opsm_threshold`), e keeps the tokens of `entropy_keep`, c is the weight between
    sampler and trainer: `correction` of the batch, else correction(old_logp, sampler_logp, seq, seq_lens), else 1. A term that takes
    `correction` itself is not multiplied by it. r is the ratio, or 1 without `corrected_kl`.

    logprob(params, frozen, batch, plan, want=...) -> TokenStats. A batch without old_logp was sampled by the policy as it is: the
    ratio is 1, with a gradient. term and reports are called with those of NAMES that they have as parameters, as partials of
    `policy.ppo_clip` and of `clip_ratio`. reduction(x [N], seq, seq_lens) -> (numerator, denominator) of `reduce`; sums per sequence
    are `by_constant` of length 1. The bonus is a mean over the kept tokens of the step; its coefficient is the batch's
    `entropy_coef` where there is one. `want` names statistics to report.
    Errors: ValueError for a term that needs what it is not given, for kl_coef without kl, and for `vespo` with weights per sequence.
    """
    if kl is None and kl_coef:
        raise ValueError(f"kl_coef={kl_coef} without kl; pass an estimator such as divergence.k3")
    takes, told = _taken(term), [(report, _taken(report)) for report in reports]
    if "correction" in takes and _by_sequence(correction):
        raise ValueError("a term that multiplies up the weights of tokens got one weight per sequence; take token_truncate or token_mask")
    alone = getattr(ratio, "func", ratio) is TOKEN
    needed = tuple(dict.fromkeys((*want, "entropy"))) if entropy_coef else want

    def counts(batch: Batch) -> dict[str, Tensor]:
        nothing = torch.zeros_like(batch["seq"], dtype=torch.float32)
        found = {"policy": reduction(nothing, batch["seq"], batch["seq_lens"])[1]}
        return found | ({"entropy": _kept_tokens(batch)} if entropy_coef or "entropy_coef" in batch else {})

    def terms(params: Params, frozen: Params, batch: Batch, plan: Plan) -> tuple[dict, dict]:
        stats = logprob(params, frozen, batch, plan, want=needed)
        tokens = _tokens(stats.logp, batch, ratio, correction)
        x = _policy_term(term, takes, tokens, batch, ratio, opsm_threshold, alone=alone and "seq" not in takes)
        top, bottom = reduction(x, batch["seq"], batch["seq_lens"])
        metrics = _metrics(stats, batch, tokens, correction) | {"policy_loss": _metric(top, bottom)}
        if kl is not None:
            away = _divergence(kl, tokens, corrected_kl, alone)
            metrics["kl"] = _token_mean(away)
            top = top + kl_coef * reduction(away, batch["seq"], batch["seq_lens"])[0] if kl_coef else top
        for report, names in told:
            metrics |= report(**_chosen(tokens, names))
        found = {"policy": top}
        if entropy_coef or "entropy_coef" in batch:
            coef = batch.get("entropy_coef", top.new_tensor(entropy_coef))
            found["entropy"] = -coef.to(top.dtype) * _kept_entropy(stats.entropy, batch)
            metrics["entropy_coef"] = Metric(coef, torch.ones_like(coef))
        return found, metrics

    return Objective(counts, terms)


def _taken(fn: Callable) -> tuple[str, ...]:
    """The parameters of a function that are among NAMES; ValueError when it needs others."""
    parameters = inspect.signature(fn).parameters.values()
    free = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if missing := [p.name for p in free if p.default is p.empty and p.name not in NAMES]:
        name = getattr(getattr(fn, "func", fn), "__name__", repr(fn))
        raise ValueError(f"{name} needs {', '.join(missing)}: give it by functools.partial({name}, {missing[0]}=...)")
    return tuple(p.name for p in free if p.name in NAMES)


def _by_sequence(correction: Callable | None) -> bool:
    return getattr(correction, "func", correction) in (corrections.sequence_truncate, corrections.sequence_mask)


def _chosen(tokens: Tokens, names: Sequence[str]) -> Tokens:
    return {name: tokens[name] for name in names}


def _tokens(logp: Tensor, batch: Batch, ratio: Callable, correction: Callable | None) -> Tokens:
    """All of NAMES for the scored tokens of a batch."""
    logp, seq, seq_lens = reduce.wide(logp), batch["seq"], batch["seq_lens"]
    old = batch["old_logp"].to(logp.dtype) if "old_logp" in batch else logp.detach()
    weight = batch.get("correction")
    if weight is None and correction is not None and "sampler_logp" in batch:
        weight = correction(old, batch["sampler_logp"], seq, seq_lens)
    advantage = batch["advantage"] if "advantage" in batch else torch.zeros_like(seq_lens)  # a batch without documents
    same = {"logp": logp, "seq": seq, "seq_lens": seq_lens, "ref_logp": batch.get("ref_logp")}
    same |= {"advantage": advantage.to(logp.dtype)[seq], "correction": None if weight is None else weight.to(logp.dtype)}
    return same | _against(old, logp, seq, seq_lens, ratio)


def _against(old: Tensor, logp: Tensor, seq: Tensor, seq_lens: Tensor, ratio: Callable) -> Tokens:
    return {"logp": logp, "old_logp": old, "log_ratio": limits.minus(logp, old), "ratio": ratio(logp, old, seq, seq_lens)}


def _policy_term(
    term: Term, takes: Sequence[str], tokens: Tokens, batch: Batch, ratio: Callable, threshold: float | None, *, alone: bool
) -> Tensor:
    """The term with what masks and corrects it: [N]. alone: a token's term is a function of its own numbers."""
    weight = None if "correction" in takes else tokens["correction"]
    whole = _on_policy(tokens, batch, threshold)
    masks = [mask for mask in (whole, batch.get("entropy_keep"), None if weight is None else weight != 0) if mask is not None]
    if not masks:
        return term(**_chosen(tokens, takes))
    keep = torch.stack(masks).all(0)
    x = torch.where(keep, term(**_chosen(_without(tokens, keep, whole, ratio, alone), takes)), 0.0)
    return x if weight is None else torch.where(keep, weight, 0.0) * x


def _on_policy(tokens: Tokens, batch: Batch, threshold: float | None) -> Tensor | None:
    """Tokens [N] of the sequences that have not moved too far; None where all may."""
    if threshold is None:
        return None
    seq, seq_lens, logp, old = (tokens[name] for name in ("seq", "seq_lens", "logp", "old_logp"))
    sampler = batch.get("sampler_logp", old)
    return corrections.off_policy_mask(logp.detach(), sampler, tokens["advantage"], seq, seq_lens, threshold=threshold)


def _without(tokens: Tokens, keep: Tensor, whole: Tensor | None, ratio: Callable, alone: bool) -> Tokens:
    """The tokens with log-probs of 0, without a gradient, in place of those that are left out: a mask after the term is too late.

    Behind a `where` alone a ratio of inf, or a log-prob of nan, would still give a gradient of nan. A token that its sequence's ratio
    depends on stays, unless the sequence is left out whole or its numbers are not finite.
    """
    logp, old, ref = (tokens[name] for name in ("logp", "old_logp", "ref_logp"))
    drop = ~keep if alone else ~keep & ~(logp.isfinite() & old.isfinite())
    drop = drop if alone or whole is None else drop | ~whole
    logp, old = torch.where(drop, 0.0, logp), torch.where(drop, 0.0, old)
    changed = tokens | _against(old, logp, tokens["seq"], tokens["seq_lens"], ratio)
    return changed | {"ref_logp": None if ref is None else torch.where(drop, 0.0, ref)}


def _divergence(kl: Callable, tokens: Tokens, corrected: bool, alone: bool) -> Tensor:
    """The divergence from the reference [N], with a factor r that makes its gradient that of the reverse one."""
    ref, logp = tokens["ref_logp"], tokens["logp"]
    if ref is None and logp.shape[0]:
        raise ValueError("kl of a batch without ref_logp: add the reference's log-probs [N], or leave kl out")
    ref = logp if ref is None else ref
    if corrected and alone and kl is divergence.k3:
        return divergence.corrected_k3(logp, ref, tokens["old_logp"], tokens["ratio"])
    value = kl(logp, ref)
    return divergence.corrected(value, tokens["ratio"]) if corrected else value


def _kept_tokens(batch: Batch) -> Tensor:
    return batch["entropy_keep"].sum() if "entropy_keep" in batch else batch["seq_lens"].sum()


def _kept_entropy(entropy: Tensor | None, batch: Batch) -> Tensor:
    if entropy is None:
        raise ValueError('an entropy bonus without entropy: add "entropy" to want')
    return torch.where(batch["entropy_keep"], entropy, 0.0).sum() if "entropy_keep" in batch else entropy.sum()


def _metric(top: Tensor, bottom: Tensor) -> Metric:
    return Metric(top.detach() / bottom.clamp(min=1), bottom)


def _token_mean(x: Tensor) -> Metric:
    return _metric(x.sum(), torch.tensor(x.shape[0], device=x.device))


def _metrics(stats: Any, batch: Batch, tokens: Tokens, correction: Callable | None) -> dict[str, Metric]:
    """What every run reports, of the tokens that were read."""
    read = torch.tensor(batch["seq"].shape[0], device=batch["seq"].device)
    out = {"num_tokens": Metric(reduce.real_tokens(batch), read, "sum"), "supervised_tokens": Metric(read, read, "sum")}
    one = torch.ones_like(read)
    out["skipped_zero_adv_batches"] = Metric((batch["seq_lens"].sum() > read).to(one.dtype), one)
    if stats.entropy is not None:
        out["entropy"] = _token_mean(stats.entropy)
    if "sampler_logp" in batch:
        out |= _sampling(batch["sampler_logp"], tokens, correction)
    return out


def _sampling(sampler_logp: Tensor, tokens: Tokens, correction: Callable | None) -> dict[str, Metric]:
    """How far trainer and sampler disagree; without a correction, the ratios themselves."""
    old, weight, seq, lens = (tokens[name] for name in ("old_logp", "correction", "seq", "seq_lens"))
    if weight is None:
        weight = corrections.token_mask(old, sampler_logp, seq, lens, high=None)
    read = torch.zeros_like(lens).index_add(0, seq, torch.ones_like(seq))
    return corrections.stats(old, sampler_logp, weight, seq, read, by_sequence=_by_sequence(correction))


def clip_ratio(
    ratio: Tensor, advantage: Tensor, seq: Tensor, seq_lens: Tensor, *, low: float, high: float, by_sequence: bool = False
) -> dict[str, Metric]:
    """Parts of the tokens whose ratio has left [low, high] in the direction of their advantage, and the extremes over sequences.

    by_sequence: for ratios that are one per sequence, so that every sequence counts once.
    """
    ratio = ratio.detach()
    below, above = (ratio < low) & (advantage < 0), (ratio > high) & (advantage > 0)
    flags = {"low_mean": below, "high_mean": above, "region_mean": below | above}
    out = {f"clip_ratio/{name}": _mean(flag, seq, seq_lens, by_sequence) for name, flag in flags.items()}
    for name, flag in (("low_min", below), ("high_max", above)):
        parts, filled = _sequence_means(flag, seq, seq_lens)
        edge = torch.inf if name == "low_min" else -torch.inf
        values = torch.cat([parts.new_full((1,), edge), torch.where(filled, parts, edge)])
        out[f"clip_ratio/{name}"] = Metric(values.amin() if name == "low_min" else values.amax(), filled.sum(), name[-3:])
    return out


def cispo_clip_ratio(
    ratio: Tensor, advantage: Tensor, seq: Tensor, seq_lens: Tensor, *, epsilon_high: float, by_sequence: bool = False
) -> dict[str, Metric]:
    """Part of the tokens with a positive advantage and a ratio above the cap of `policy.cispo`."""
    return {"cispo_clip_ratio": _mean((ratio.detach() > epsilon_high) & (advantage > 0), seq, seq_lens, by_sequence)}


def vespo_phi(
    log_ratio: Tensor, advantage: Tensor, seq: Tensor, seq_lens: Tensor, correction: Tensor | None = None, **knobs: float
) -> dict[str, Metric]:
    """Mean weight of a sequence under `policy.vespo`, with the same knobs."""
    phi = policy.vespo_weight(log_ratio, advantage, seq, seq_lens, correction, **knobs)
    return {"vespo/phi_seq_mean": _mean(phi, seq, seq_lens, True)}


def _sequence_means(x: Tensor, seq: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
    """(token mean of each sequence, whether any of its tokens was read), [B]."""
    x = x.detach().to(x.dtype if x.is_floating_point() else torch.float32)
    lens = reduce.per_sequence(torch.ones_like(x), seq, seq_lens)
    return reduce.per_sequence(x, seq, seq_lens) / lens.clamp(min=1), lens > 0


def _mean(x: Tensor, seq: Tensor, seq_lens: Tensor, by_sequence: bool) -> Metric:
    if by_sequence:
        return reduce.masked_mean(*_sequence_means(x, seq, seq_lens))
    return _token_mean(x.float() if not x.is_floating_point() else x)


def hollow(batch: Batch) -> Batch:
    """What stands in for a micro-batch whose advantages are all 0: one token, no row to read, and the same denominators.

    Only where nothing but a loss that is proportional to the advantage would train: no divergence, no bonus, not `policy.a_star`.
    """
    short = {"T": slice(1), "N": slice(0), "M": slice(0)}
    out = {key: value[short[axis]] if (axis := AXES[key]) in short else value for key, value in batch.items()}
    return out | {"cu_docs": batch["cu_docs"].new_tensor([0, 1]), "doc_of_seq": torch.zeros_like(batch["doc_of_seq"])}
