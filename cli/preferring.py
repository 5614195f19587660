"""Methods on pairs and on judged completions: from their options to objectives, reference and state."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from treetune.cli import method, reference, setup
from treetune.cli.methods.cpo import CpoLoss
from treetune.cli.methods.dpo import LOSSES, DpoLoss
from treetune.cli.methods.kto import KtoLoss
from treetune.cli.methods.orpo import OrpoLoss
from treetune.cli.methods.simpo import SimpoLoss
from treetune.cli.options import import_path
from treetune.core import registry, shard
from treetune.core.data import kinds, pack, trees
from treetune.core.state import TrainState
from treetune.losses import kto, kto_objective, limits, preference, preference_objective, presets, reduce, reference_free
from treetune.models import Model

EVERY = ("mean_logit", "entropy", "top1")


def name(loss: str) -> str:
    """Our name of a loss, whatever tool its name comes from."""
    return LOSSES.get(loss, loss)


def weights(options: DpoLoss) -> dict[str, float]:
    """{loss: weight} as asked. Errors: ValueError when there are not as many weights as losses."""
    if options.loss_weights and len(options.loss_weights) != len(options.loss):
        raise ValueError(f"--loss-weights has {len(options.loss_weights)} numbers for {len(options.loss)} losses; give one for each")
    return dict(zip(map(name, options.loss), options.loss_weights or (1.0,) * len(options.loss), strict=True))


def pair_loss(options: DpoLoss) -> preference_objective.PairLoss | None:
    """The loss of a pair that the options name, sft aside, which is a mean over tokens; None when that is all."""
    parts = [(_one(key, options), weight) for key, weight in weights(options).items() if key != "sft"]
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    return preference.weighted(tuple(parts)) if parts else None


def _one(key: str, options: DpoLoss) -> preference_objective.PairLoss:
    smoothing = {"label_smoothing": options.dpo_label_smoothing} if options.dpo_label_smoothing else {}  # 0: the loss's own
    row = import_path.row(presets.PAIR_LOSSES, key)
    return preference_objective.pair_loss(row, beta=options.rl_beta, score=score(options), tau=options.discopop_tau, **smoothing)


def score(options: DpoLoss) -> Callable[[Tensor], Tensor]:
    """The function of log-ratios that a divergence stands for."""
    return registry.bind(presets.PAIR_SCORES[name(options.f_divergence)], alpha=options.f_alpha_divergence_coef)


def _logprobs(config: Any, model: Model, used: setup.Trees) -> tuple[Callable, Callable]:
    """Log-probs for training and for evaluation."""
    remat = "full" if config.optim.gradient_checkpointing else None
    return setup.logprob(model, used.lora, remat=remat), setup.logprob(model, used.lora)


def dpo(config: Any, model: Model, used: setup.Trees, *, on: torch.device, say=print, **_: Any) -> method.Parts:
    """DPO and its family: pairs held to a reference."""
    options: DpoLoss = config.loss
    found = reference.build(config.reference, model, used, config, on=on, say=say)
    train, held = _logprobs(config, model, found.trees)
    nll = weights(options).get("sft", 0.0) + (options.rpo_alpha or 0.0)
    choices = preference_objective.Options(nll_coef=nll, ld_alpha=options.ld_alpha, weighting=options.dpo_use_weighting)
    make = partial(
        preference_objective.objective,
        loss=pair_loss(options),
        rewards=preference_objective.implicit_rewards(options.rl_beta),
        options=choices,
    )
    return method.Parts(
        found.trees,
        make(train),
        make(held, want=EVERY),
        (pack.collate_trees,),
        found.extra,
        reference.preparer(found.logp),
        reference.syncer(config.reference) if config.reference.sync_ref_model else None,
        reference.enricher(found.logp) if config.reference.precompute_ref_logps else None,
    )


def _free(
    config: Any,
    model: Model,
    used: setup.Trees,
    loss: preference_objective.PairLoss,
    rewards: preference_objective.Rewards,
    options: preference_objective.Options,
    more: Callable | None = None,
) -> method.Parts:
    """A method on pairs that needs no reference."""
    train, held = _logprobs(config, model, used)
    make = partial(preference_objective.objective, loss=loss, rewards=rewards, options=options, more=more)
    return method.Parts(used, make(train), make(held, want=EVERY), (partial(pack.collate_trees, prompts=options.prompts),))


def cpo(config: Any, model: Model, used: setup.Trees, **_: Any) -> method.Parts:
    """CPO: summed log-probs and the chosen side's likelihood."""
    options: CpoLoss = config.loss
    entry = import_path.row(presets.CPO_LOSSES, "cpo" if options.loss == "sigmoid" else options.loss)
    loss = registry.bind(entry, beta=options.rl_beta, label_smoothing=options.dpo_label_smoothing)
    rewards = (preference_objective.mean_rewards if options.loss == "ipo" else preference_objective.implicit_rewards)(options.rl_beta)
    return _free(
        config,
        model,
        used,
        loss,
        rewards,
        preference_objective.Options(nll_coef=options.cpo_alpha),
    )


def simpo(config: Any, model: Model, used: setup.Trees, **_: Any) -> method.Parts:
    """SimPO, and AlphaPO where simpo_alpha is not 0."""
    options: SimpoLoss = config.loss
    loss = partial(reference_free.simpo, beta=options.rl_beta, gamma=options.simpo_gamma)
    if options.simpo_alpha:
        loss = partial(reference_free.alphapo, beta=options.rl_beta, gamma=options.simpo_gamma, alpha=options.simpo_alpha)
    return _free(
        config,
        model,
        used,
        loss,
        preference_objective.mean_rewards(options.rl_beta),
        preference_objective.Options(nll_coef=options.cpo_alpha),
    )


def orpo(config: Any, model: Model, used: setup.Trees, **_: Any) -> method.Parts:
    """ORPO: likelihood of the chosen side, and the odds ratio of the two."""
    options: OrpoLoss = config.loss

    def more(pairs: preference.Pairs) -> dict[str, Tensor]:
        odds = reference_free.odds_ratio(pairs)
        return {"log_odds_chosen": odds, "log_odds_ratio": torch.nn.functional.logsigmoid(odds)}

    choices = preference_objective.Options(nll_coef=1.0, prompts=options.orpo_nll_scope == "full")
    loss = partial(reference_free.orpo, beta=options.orpo_alpha)
    return _free(config, model, used, loss, preference_objective.mean_rewards(options.orpo_alpha), choices, more)


def _branch(docs: list, *, which: int, **options: Any) -> dict:
    """The stream of documents with one of their two completions only."""
    return pack.collate_trees([trees.only(doc, which) for doc in docs], **options)


def _unpaired_loss(options: KtoLoss) -> kto_objective.CompletionLoss:
    weights = {"desirable_weight": options.kto_desirable_weight, "undesirable_weight": options.kto_undesirable_weight}
    return kto_objective.completion_loss(options.loss, beta=options.rl_beta, **weights)


def judged(config: Any, model: Model, used: setup.Trees, *, on: torch.device, mesh: Any = None, say=print) -> method.Parts:
    """KTO, its variant without a baseline, and BCO."""
    options: KtoLoss = config.loss
    found = reference.build(config.reference, model, used, config, on=on, say=say)
    train, held = _logprobs(config, model, found.trees)
    make = partial(kto_objective.objective, loss=_unpaired_loss(options), beta=options.rl_beta)
    streams = (partial(_branch, which=1), partial(_branch, which=2)) if options.loss == "kto" else (partial(_branch, which=1),)
    extra, between = found.extra, []
    if config.reference.sync_ref_model:
        between.append(reference.syncer(config.reference))
    if options.loss == "bco":
        zero = torch.zeros((), dtype=torch.float64, device=on)
        extra, between = extra | {"bco": {"mean": zero, "count": zero.long()}}, [*between, _count_rewards]
    return method.Parts(
        found.trees,
        make(train),
        make(held, want=EVERY),
        streams,
        extra,
        _preparer(options, found.logp, held, mesh),
        partial(method.in_turn, between) if between else None,
        reference.enricher(found.logp) if config.reference.precompute_ref_logps else None,
    )


def _count_rewards(state: TrainState, metrics: dict, step: int) -> TrainState:
    """BCO's running mean with the rewards of the step that ends."""
    running = kto.merge(kto.Running(**state.extra["bco"]), metrics["rewards/mean"], metrics["rows"])
    return state._replace(extra=state.extra | {"bco": running._asdict()})


def _preparer(options: KtoLoss, ref_logp: reference.Logp, logprob: Callable, mesh: Any) -> Callable:
    """`prepare`: the reference beside each batch; KTO's baseline over the whole step, or BCO's mean of the steps before."""

    def prepare(state: TrainState, micro_batches: list) -> list:
        if options.loss != "kto":
            scalar = {"delta": state.extra["bco"]["mean"]} if options.loss == "bco" else {}
            return [(reference.with_logp(ref_logp, state, batch, plan) | scalar, plan) for batch, plan in micro_batches]
        own = [(reference.with_logp(ref_logp, state, batch, plan), plan) for (batch, plan), _ in micro_batches]
        ratios = [_log_ratios(ref_logp, logprob, state, *foreign) for _, foreign in micro_batches]
        scalar = {"baseline": _baseline(torch.cat(ratios), mesh)}
        return [(batch | scalar, plan) for batch, plan in own]

    return prepare


def _log_ratios(ref_logp: reference.Logp, logprob: Callable, state: TrainState, batch: dict, plan: Any) -> Tensor:
    """log p - log p_ref of completions of other prompts, summed over each: [B]."""
    batch = {key: value for key, value in reference.with_logp(ref_logp, state, batch, plan).items() if key != "seed"}
    logp = logprob(state.params, state.frozen, batch, plan).logp
    return reduce.per_sequence(limits.minus(logp, batch["ref_logp"]), batch["seq"], batch["seq_lens"])


def _baseline(ratios: Tensor, mesh: Any) -> Tensor:
    """max(0, mean of the log-ratios of all micro-batches and ranks)."""
    total, count = shard.all_sum([ratios.double().sum(), ratios.new_tensor(len(ratios), dtype=torch.float64)], mesh)
    return kto.baseline((total / count.clamp(min=1)).reshape(1), total.new_zeros(1)).float()


PAIRS, UNPAIRED, JUDGED = (kinds.KINDS[name] for name in ("pairs", "unpaired", "judged"))  # only KTO needs foreign completions
SHOWN = ("rewards/margins", "rewards/accuracies")
RATES = (5e-5, 1e-6)
DPO = method.Method(PAIRS, dpo, RATES, SHOWN)
ORPO = method.Method(PAIRS, orpo, RATES, ("nll_loss", "rewards/accuracies"), "tokens and pairs")
SIMPO = method.Method(PAIRS, simpo, RATES, SHOWN)
CPO = method.Method(PAIRS, cpo, RATES, SHOWN)
JUDGE = method.Method(JUDGED, judged, RATES, SHOWN, "completions")
KTO = method.Method(UNPAIRED, judged, RATES, SHOWN, "completions")
