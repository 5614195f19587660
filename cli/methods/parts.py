"""What several methods put together in the same way: supervised tokens, pairs, a head of scores, and a reference beside any of them."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from treetune.cli.methods.method import Parts, Setting
from treetune.cli.options.token_loss import LossOptions
from treetune.core import layer_offload, step
from treetune.core.data import pack, reference_logps
from treetune.core.run.ranks import Ranks
from treetune.core.state import Logprob, Objective, Scores
from treetune.losses import preference_objective, routing_objective, sft_objective
from treetune.models import Model, hf, logprobs_routed, quantised, reference, reward_model, tensor_rules
from treetune.models import policy as policies
from treetune.models.policy import Policy
from treetune.models.quantised import Home
from treetune.models.reference import Reference

EVERY = ("mean_logit", "entropy", "top1")  # statistics of pairs that evaluations report
NO_ROUTERS: Mapping[str, float] = MappingProxyType({})


def supervised(policy: Policy, options: LossOptions, *, remat: str | None) -> Parts:
    """The likelihood of supervised tokens, or the loss that the options name, and their terms on routers."""
    terms = {"z_loss_coef": options.z_loss_coef, "label_smoothing": options.label_smoothing}
    make = partial(sft_objective.named, name=options.loss, **terms)
    round_ = rounding(policy, options.qat)

    def logprob(**own: Any) -> Any:
        return round_(policies.logprob(policy, remat=remat, neftune=options.neftune_noise_alpha, **own))

    objective = routed(policy, logprob, make, router_coefs(options))
    return Parts(policy, objective, sft_objective.named(round_(policies.logprob(policy))), (pack.collate,))


def rounding(policy: Policy, kind: str) -> Callable[[Any], Any]:
    """What makes a log-prob function round the weights that train, for a model that is to be quantised; nothing for "none"."""
    scheme = quantised.scheme(quant=kind)
    if scheme is None:
        return lambda logprob: logprob
    chosen = quantised.paths(hf.abstract_of(Model(policy.family, policy.cfg, policy.params["model"])), scheme)
    return partial(quantised.rounding, chosen=chosen, scheme=scheme)


class RouterOptions(Protocol):
    """The options of terms on routers."""

    @property
    def router_aux_loss_coef(self) -> float:
        """Of the load balance."""
        ...

    @property
    def router_z_loss_coef(self) -> float:
        """Of the squared log-normaliser."""
        ...


def router_coefs(options: RouterOptions) -> dict[str, float]:
    """The weights of terms on routers by option."""
    return {"router_aux_loss_coef": options.router_aux_loss_coef, "router_z_loss_coef": options.router_z_loss_coef}


def routed(policy: Policy, logprob: Callable[..., Any], make: Callable[[Logprob], Objective], coefs: Mapping[str, float]) -> Objective:
    """make(logprob()), with terms on routers beside it where one has a weight. Raises ValueError for a model without experts."""
    if not any(coefs.values()):
        return make(logprob())
    if (experts := policy.cfg.experts) is None:
        name = next(name for name, coef in coefs.items() if coef)
        raise ValueError(f"{name} weighs a loss of routers, and a {policy.family} model has none: leave it at 0")
    router = routing_objective.Router(experts.top_k, *coefs.values())
    return routing_objective.objective(logprob(run=logprobs_routed), make, router)


def pairwise(
    remat: str | None,
    policy: Policy,
    loss: preference_objective.PairLoss | None,
    rewards: preference_objective.Rewards,
    terms: preference_objective.Options,
    more: Callable[[Any], dict[str, Tensor]] | None = None,
    routers: Mapping[str, float] = NO_ROUTERS,
) -> Parts:
    """A method on pairs, as it is without a reference; more(pairs) -> further metrics; routers: weights of terms on them, by option."""
    make = partial(preference_objective.objective, loss=loss, rewards=rewards, options=terms, more=more)
    train = routed(policy, partial(policies.logprob, policy, remat=remat), make, routers)
    return Parts(policy, train, make(policies.logprob(policy), want=EVERY), (partial(pack.collate_trees, prompts=terms.prompts),))


def scored(config: Any, policy: Policy, setting: Setting, *, classes: int, read: str, objective: Callable[[Scores], Objective]) -> Parts:
    """A head of `classes` scores at the tokens that `read` names, and the objective of its scores."""
    start = config.adapter.lora_model_dir if config.adapter.adapter == "lora" else None
    headed = reward_model.with_head(policy, classes=classes, start=start, seed=config.optim.seed, device=setting.device)
    train, evaluation = policies.scores(headed, remat=config.optim.remat), policies.scores(headed)
    return Parts(headed, objective(train), objective(evaluation), (partial(pack.collate_trees, read=read),))


def home(config: Any, ranks: Ranks, device: torch.device) -> Home | None:
    """Where the leaves of a run's models go as they are read, if not whole to the device."""
    put, split = layer_offload.home(config.optim.layer_offloading, device), tensor_rules.home(ranks.mesh, config.run.sharding)
    return put if split is None else split._replace(put=put)


def load_reference(config: Any, policy: Policy, setting: Setting, *, temperature: float = 1.0, precompute: bool = False) -> Reference:
    """The reference that the options of `config` name.

    temperature: divides its logits, as those of the policy. precompute: its log-probs are computed once, before training.
    """
    options, other = config.reference, None
    if options.ref_model is not None:
        layers = home(config, setting.ranks, setting.device)
        named = {"dtype": config.model.dtype, "device": setting.device, "scheme": quantised.of(config.model), "home": layers}
        other = reference.load_other(options.ref_model, policy, **named, say=setting.say)
    pace = reference.Pace(options.ref_model_sync_steps, options.ref_model_mixup_alpha)
    # An adapter that starts from what quantising loses is no identity, either.
    moved = config.adapter.lora_model_dir is not None or config.adapter.lora_init in ("loftq", "qera")
    return reference.build(
        policy,
        other=other,
        pace=pace if options.sync_ref_model else None,
        precompute=precompute,
        trained_adapter=policy.lora is not None and moved,
        temperature=temperature,
    )


def hold(parts: Parts, to: Reference, *, precompute: bool = False) -> Parts:
    """A method over the reference's policy, with its log-probs beside every batch, and with what makes it follow."""
    return parts._replace(
        extra=to.extra | parts.extra,
        prepare=step.prepare_in_sequence(parts.prepare, reference.preparer(to.logp)),
        after_step=step.in_sequence(to.after_step, parts.after_step),
        precompute=reference_logps.enricher(to.logp) if precompute else None,
    )
