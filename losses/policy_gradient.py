"""The policy-gradient objective over sampled completions: a policy loss, a divergence from a reference and an entropy bonus.

N scored tokens, B sequences, one per completion; a completion with nothing to train on has seq_lens 0 and still is one of B.
A batch has advantage [B], and may have old_logp, sampler_logp (nan: unknown), correction, ref_logp [N], entropy_keep bool [N] and the
scalar entropy_coef. Which of these it has must be the same for every micro-batch of a step, on all ranks.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from treetune.core import registry
from treetune.core.state import AXES, Batch, Logprob, Metric, Metrics, Objective, Params, Plan, Terms, TokenStats
from treetune.losses import correction as corrections
from treetune.losses import divergence, limits, policy, presets, ratio, reduce


class Tokens(NamedTuple):
    """What a term and a report may take of the scored tokens, by the names of their parameters: [N] each but seq_lens [B]."""

    ratio: Tensor
    advantage: Tensor
    logp: Tensor
    log_ratio: Tensor
    old_logp: Tensor
    seq: Tensor
    seq_lens: Tensor
    ref_logp: Tensor | None
    correction: Tensor | None


Term = Callable[..., Tensor]  # of some of Tokens, by name -> [N]
Report = Callable[..., Metrics]  # of some of Tokens, by name
Estimator = Callable[[Tensor, Tensor], Tensor]  # (logp, ref_logp) -> [N]


class Ratio(Protocol):
    """A function of `losses.ratio`."""

    def __call__(self, logp: Tensor, old_logp: Tensor, seq: Tensor, seq_lens: Tensor, /) -> Tensor:
        """Ratio of the policy to an older one at each token, [N]."""
        ...


class Reduction(Protocol):
    """A function of `losses.reduce`."""

    def __call__(self, x: Tensor, seq: Tensor, seq_lens: Tensor, /) -> tuple[Tensor, Tensor]:
        """(numerator, denominator) of the mean of x [N]."""
        ...


class Correction(Protocol):
    """A function of `losses.correction`."""

    def __call__(self, old_logp: Tensor, sampler_logp: Tensor, seq: Tensor, seq_lens: Tensor, /) -> Tensor:
        """Weight of each token between trainer and sampler, [N], a constant."""
        ...


class Surrogate(NamedTuple):
    """A policy loss: the term of a token, its ratio, the mean over tokens, and what is reported of it.

    term, reports: called with those of `Tokens` that they have as parameters, as partials of `policy.ppo_clip` and of `clip_ratio`.
    reduction: sums per sequence are `reduce.by_sum`.
    """

    term: Term
    ratio: Ratio = ratio.token
    reduction: Reduction = reduce.by_token
    reports: Sequence[Report] = ()


class Divergence(NamedTuple):
    """coef times an estimate of KL(policy || reference); a coefficient of 0 reports it only, without an estimator there is none.

    corrected: multiply it by the ratio, which makes its gradient that of the divergence.
    """

    estimator: Estimator | None = None
    coef: float = 0.0
    corrected: bool = True


NO_DIVERGENCE = Divergence()


def surrogate(preset: presets.PolicyPreset, *, length: int = 1, **options: Any) -> Surrogate:
    """The policy loss of a row of `presets.POLICY_LOSSES`.

    length: tokens that "constant" divides a sequence by. options: what the row takes, and epsilon and epsilon_high for its report.
    """
    aggregate = registry.bind(presets.AGGREGATES[preset.aggregate], length=length, count_empty=True)
    return Surrogate(
        registry.bind(preset, **options), registry.resolve(presets.RATIOS[preset.ratio].function), aggregate, _reports(preset, options)
    )


def _reports(preset: presets.PolicyPreset, options: dict[str, Any]) -> list[Report]:
    """What only this term reports, at its own bounds."""
    if preset.report is None:
        return []
    low, high = presets.clip_bounds(preset, options.get("epsilon"), options.get("epsilon_high"))
    bounds = {"low": 1 - low, "high": 1 + high, "epsilon_high": high, "by_sequence": preset.ratio in presets.ONE_RATIO_PER_SEQUENCE}
    report = registry.resolve(preset.report)
    return [partial(report, **{name: bounds[name] for name in inspect.signature(report).parameters if name in bounds})]


def objective(
    logprob: Logprob,
    loss: Surrogate,
    *,
    kl: Divergence = NO_DIVERGENCE,
    correction: Correction | None = None,
    opsm_threshold: float | None = None,
    entropy_coef: float = 0.0,
    want: tuple[str, ...] = ("entropy",),
) -> Objective:
    """reduction(m e c term + kl_coef r kl) - entropy_coef * mean entropy, per token, with the policy term alone masked and corrected.

    m leaves out sequences that moved too far (`opsm_threshold`), e keeps the tokens of `entropy_keep`, c is the weight between
    sampler and trainer: `correction` of the batch, else correction(old_logp, sampler_logp, seq, seq_lens), else 1. A term that takes
    `correction` itself is not multiplied by it. r is the ratio, or 1 where the divergence is not corrected.

    A batch without old_logp was sampled by the policy as it is: the ratio is 1, with a gradient. The bonus is a mean over the kept tokens
    of the step; its coefficient is the batch's `entropy_coef` where there is one. `want` names statistics to report.
    Errors: ValueError for a term that needs what it is not given, for a coefficient of the divergence without an estimator, and for
    `vespo` with weights per sequence.
    """
    if kl.estimator is None and kl.coef:
        raise ValueError(f"a divergence with coef={kl.coef} has no estimator; pass one such as divergence.k3")
    takes, reports = _parameters(loss.term), [(report, _parameters(report)) for report in loss.reports]
    if "correction" in takes and _by_sequence(correction):
        raise ValueError("a term that multiplies up the weights of tokens got one weight per sequence; take token_truncate or token_mask")
    weighing = _Weighing(loss, takes, correction, opsm_threshold)
    outputs = tuple(dict.fromkeys((*want, "entropy"))) if entropy_coef else want

    def counts(batch: Batch) -> Terms:
        nothing = torch.zeros_like(batch["seq"], dtype=torch.float32)
        tokens = {"policy": loss.reduction(nothing, batch["seq"], batch["seq_lens"])[1]}
        return tokens | ({"entropy": _kept_tokens(batch)} if entropy_coef or "entropy_coef" in batch else {})

    def terms(params: Params, frozen: Params, batch: Batch, plan: Plan) -> tuple[Terms, Metrics]:
        stats = logprob(params, frozen, batch, plan, want=outputs)
        tokens = _tokens(stats.logp, batch, loss.ratio, correction)
        top, bottom = loss.reduction(_policy_term(weighing, tokens, batch), batch["seq"], batch["seq_lens"])
        metrics = _metrics(stats, batch, tokens, correction) | {"policy_loss": _metric(top, bottom)}
        if kl.estimator is not None:
            distance = _divergence(kl.estimator, tokens, kl.corrected, weighing.ratio_of_token)
            metrics["kl"] = _token_mean(distance)
            top = top + kl.coef * loss.reduction(distance, batch["seq"], batch["seq_lens"])[0] if kl.coef else top
        for report, names in reports:
            metrics |= report(**_named(tokens, names))
        numerators = {"policy": top}
        if entropy_coef or "entropy_coef" in batch:
            coef = batch.get("entropy_coef", top.new_full((), entropy_coef))
            numerators["entropy"] = -coef.to(top.dtype) * _kept_entropy(stats.entropy, batch)
            metrics["entropy_coef"] = Metric(coef, torch.ones_like(coef))
        return numerators, metrics

    return Objective(counts, terms)


class _Weighing(NamedTuple):
    """How the policy term of a token is masked and corrected."""

    loss: Surrogate
    takes: tuple[str, ...]
    correction: Correction | None
    opsm_threshold: float | None

    @property
    def ratio_of_token(self) -> bool:
        """Whether a token's ratio depends on no other token."""
        return _function(self.loss.ratio) is ratio.token

    @property
    def alone(self) -> bool:
        """Whether a token's term is a function of its own numbers."""
        return self.ratio_of_token and "seq" not in self.takes


def _function(fn: Any) -> Any:
    """The function below a `functools.partial`."""
    return getattr(fn, "func", fn)


def _parameters(fn: Callable) -> tuple[str, ...]:
    """The parameters of a function that are among `Tokens`; ValueError when it needs others."""
    parameters = inspect.signature(fn).parameters.values()
    free = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if missing := [p.name for p in free if p.default is p.empty and p.name not in Tokens._fields]:
        name = getattr(_function(fn), "__name__", repr(fn))
        raise ValueError(f"{name} needs {', '.join(missing)}: give it by functools.partial({name}, {missing[0]}=...)")
    return tuple(p.name for p in free if p.name in Tokens._fields)


def _by_sequence(correction: Correction | None) -> bool:
    return _function(correction) in (corrections.sequence_truncate, corrections.sequence_mask)


def _named(tokens: Tokens, names: Sequence[str]) -> dict[str, Tensor | None]:
    return {name: getattr(tokens, name) for name in names}


def _tokens(logp: Tensor, batch: Batch, ratio: Ratio, correction: Correction | None) -> Tokens:
    """The numbers of the scored tokens of a batch."""
    logp, seq, seq_lens = reduce.upcast(logp), batch["seq"], batch["seq_lens"]
    old_logp = batch["old_logp"].to(logp.dtype) if "old_logp" in batch else logp.detach()
    weight = batch.get("correction")
    if weight is None and correction is not None and "sampler_logp" in batch:
        weight = correction(old_logp, batch["sampler_logp"], seq, seq_lens)
    advantage = batch["advantage"] if "advantage" in batch else torch.zeros_like(seq_lens)  # a batch without documents
    log_ratio = limits.minus(logp, old_logp)
    return Tokens(
        ratio=ratio(logp, old_logp, seq, seq_lens),
        advantage=advantage.to(logp.dtype)[seq],
        logp=logp,
        log_ratio=log_ratio,
        old_logp=old_logp,
        seq=seq,
        seq_lens=seq_lens,
        ref_logp=batch.get("ref_logp"),
        correction=None if weight is None else weight.to(logp.dtype),
    )


def _policy_term(weighing: _Weighing, tokens: Tokens, batch: Batch) -> Tensor:
    """The term with what masks and corrects it: [N]."""
    term, takes = weighing.loss.term, weighing.takes
    weight = None if "correction" in takes else tokens.correction
    near = _on_policy(tokens, batch, weighing.opsm_threshold)
    masks = [mask for mask in (near, batch.get("entropy_keep"), None if weight is None else weight != 0) if mask is not None]
    if not masks:
        return reduce.elementwise(term(**_named(tokens, takes)), tokens.logp, "policy loss of tokens")
    # Masked inputs and a masked result: either alone would let a nan through, as value or as gradient.
    keep = torch.stack(masks).all(0)
    x = term(**_named(_without_gradient(tokens, keep, near, weighing), takes))
    x = torch.where(keep, reduce.elementwise(x, tokens.logp, "policy loss of tokens"), 0.0)
    return x if weight is None else torch.where(keep, weight, 0.0) * x


def _on_policy(tokens: Tokens, batch: Batch, threshold: float | None) -> Tensor | None:
    """Tokens [N] of the sequences that have not moved too far; None where all may."""
    if threshold is None:
        return None
    sampler_logp = batch.get("sampler_logp", tokens.old_logp)
    return corrections.off_policy_mask(
        tokens.logp.detach(), sampler_logp, tokens.advantage, tokens.seq, tokens.seq_lens, threshold=threshold
    )


def _without_gradient(tokens: Tokens, keep: Tensor, near: Tensor | None, weighing: _Weighing) -> Tokens:
    """The tokens with log-probs of 0, without a gradient, in place of those that are left out: a mask after the term is too late.

    Behind a `where` alone a ratio of inf, or a log-prob of nan, would still give a gradient of nan. A token that its sequence's ratio
    depends on stays, unless the sequence is left out whole or its numbers are not finite.
    """
    alone = weighing.alone
    drop = ~keep if alone else ~keep & ~(tokens.logp.isfinite() & tokens.old_logp.isfinite())
    drop = drop if alone or near is None else drop | ~near
    logp, old_logp = torch.where(drop, 0.0, tokens.logp), torch.where(drop, 0.0, tokens.old_logp)
    return tokens._replace(
        logp=logp,
        old_logp=old_logp,
        log_ratio=limits.minus(logp, old_logp),
        ratio=weighing.loss.ratio(logp, old_logp, tokens.seq, tokens.seq_lens),
        ref_logp=None if tokens.ref_logp is None else torch.where(drop, 0.0, tokens.ref_logp),
    )


def _divergence(estimator: Estimator, tokens: Tokens, corrected: bool, ratio_of_token: bool) -> Tensor:
    """The divergence from the reference [N], with a factor r that makes its gradient that of the reverse one."""
    ref_logp, logp = tokens.ref_logp, tokens.logp
    if ref_logp is None and logp.shape[0]:
        raise ValueError("kl of a batch without ref_logp: add the reference's log-probs [N], or leave kl out")
    ref_logp = logp if ref_logp is None else ref_logp
    # With one ratio for each token the product of ratio and k3 has a closed form that stays finite where k3 alone overflows.
    if corrected and ratio_of_token and estimator is divergence.k3:
        return divergence.corrected_k3(logp, ref_logp, tokens.old_logp, tokens.ratio)
    value = estimator(logp, ref_logp)
    return divergence.corrected(value, tokens.ratio) if corrected else value


def _kept_tokens(batch: Batch) -> Tensor:
    return batch["entropy_keep"].sum() if "entropy_keep" in batch else batch["seq_lens"].sum()


def _kept_entropy(entropy: Tensor | None, batch: Batch) -> Tensor:
    if entropy is None:
        raise ValueError('an entropy bonus without entropy: add "entropy" to want')
    return torch.where(batch["entropy_keep"], entropy, 0.0).sum() if "entropy_keep" in batch else entropy.sum()


def _metric(top: Tensor, bottom: Tensor) -> Metric:
    return Metric(top.detach() / bottom.clamp(min=1), bottom)


def _token_mean(x: Tensor) -> Metric:
    return _metric(x.sum(), torch.full((), x.shape[0], device=x.device))


def _metrics(stats: TokenStats, batch: Batch, tokens: Tokens, correction: Correction | None) -> Metrics:
    """What every run reports, of the tokens that were read."""
    count = torch.full((), batch["seq"].shape[0], device=batch["seq"].device)
    metrics = {"num_tokens": Metric(reduce.real_tokens(batch), count, "sum"), "supervised_tokens": Metric(count, count, "sum")}
    one = torch.ones_like(count)
    metrics["skipped_zero_adv_batches"] = Metric((batch["seq_lens"].sum() > count).to(one.dtype), one)
    if stats.entropy is not None:
        metrics["entropy"] = _token_mean(stats.entropy)
    if "sampler_logp" in batch:
        metrics |= _sampling(batch["sampler_logp"], tokens, correction)
    return metrics


def _sampling(sampler_logp: Tensor, tokens: Tokens, correction: Correction | None) -> Metrics:
    """How far trainer and sampler disagree; without a correction, the ratios themselves."""
    weight, seq, seq_lens = tokens.correction, tokens.seq, tokens.seq_lens
    if weight is None:
        weight = corrections.token_mask(tokens.old_logp, sampler_logp, seq, seq_lens, high=None)
    # Of a micro-batch without signal no token is read, though its seq_lens stay: count the tokens that are there.
    lens = torch.zeros_like(seq_lens).index_add(0, seq, torch.ones_like(seq))
    return corrections.stats(tokens.old_logp, sampler_logp, weight, seq, lens, by_sequence=_by_sequence(correction))


def clip_ratio(
    ratio: Tensor, advantage: Tensor, seq: Tensor, seq_lens: Tensor, *, low: float, high: float, by_sequence: bool = False
) -> Metrics:
    """Shares of the tokens whose ratio has left [low, high] in the direction of their advantage, and the extremes over sequences.

    by_sequence: for ratios that are one per sequence, so that every sequence counts once.
    """
    ratio = ratio.detach()
    below, above = (ratio < low) & (advantage < 0), (ratio > high) & (advantage > 0)
    flags = {"low_mean": below, "high_mean": above, "region_mean": below | above}
    metrics = {f"clip_ratio/{name}": _mean(flag, seq, seq_lens, by_sequence) for name, flag in flags.items()}
    least, filled = _with_edge(below, seq, seq_lens, torch.inf)
    most, _ = _with_edge(above, seq, seq_lens, -torch.inf)
    metrics["clip_ratio/low_min"] = Metric(least.amin(), filled.sum(), "min")
    metrics["clip_ratio/high_max"] = Metric(most.amax(), filled.sum(), "max")
    return metrics


def _with_edge(flag: Tensor, seq: Tensor, seq_lens: Tensor, edge: float) -> tuple[Tensor, Tensor]:
    """(edge and the share of each sequence, with the edge where nothing was read, [1 + B]; which sequences were read, [B])."""
    shares, filled = _sequence_means(flag, seq, seq_lens)
    return torch.cat([shares.new_full((1,), edge), torch.where(filled, shares, edge)]), filled


def cispo_clip_ratio(
    ratio: Tensor, advantage: Tensor, seq: Tensor, seq_lens: Tensor, *, epsilon_high: float, by_sequence: bool = False
) -> Metrics:
    """Share of the tokens with a positive advantage and a ratio above the cap of `policy.cispo`."""
    return {"cispo_clip_ratio": _mean((ratio.detach() > epsilon_high) & (advantage > 0), seq, seq_lens, by_sequence)}


def vespo_phi(
    log_ratio: Tensor, advantage: Tensor, seq: Tensor, seq_lens: Tensor, correction: Tensor | None = None, **knobs: tuple[float, float]
) -> Metrics:
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


def zero_signal_batch(batch: Batch) -> Batch:
    """The stand-in of a micro-batch whose advantages are all 0: one token, no scored position, and the same denominators.

    Only where nothing but a loss that is proportional to the advantage would train: no divergence, no bonus, not `policy.a_star`.
    """
    # Left out altogether it would change denominators and metrics, and a rank without it would miss a collective of the others.
    short = {"T": slice(1), "N": slice(0), "M": slice(0)}
    stand_in = {key: value[short[axis]] if (axis := AXES[key]) in short else value for key, value in batch.items()}
    for key in ("branch", "start"):  # a first token is of the trunk; FlexAttention would be compiled anew for one token
        stand_in.pop(key, None)
    bounds = torch.arange(2, dtype=batch["cu_docs"].dtype, device=batch["cu_docs"].device)
    return stand_in | {"cu_docs": bounds, "doc_of_seq": torch.zeros_like(batch["doc_of_seq"])}
