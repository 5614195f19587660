"""What the options of preference and reward methods may not say together. Imports no torch."""

from typing import Any

from treetune.cli.configs import Cpo, Dpo, Kto, Prm, Reward
from treetune.cli.errors import BadInput
from treetune.cli.options.losses import LOSSES, SCORED, SMOOTHED, DpoLoss, KtoLoss, ReferenceOptions


def check(config: Any) -> None:
    """Raise BadInput for options out of range or that contradict each other."""
    if isinstance(config, Dpo):
        _check_dpo(config.loss)
    if isinstance(config, Dpo | Kto):
        _check_reference(config)


def ignored(config: Any) -> dict[str, str]:
    """{option: why this run would not look at it}."""
    out: dict[str, str] = {}
    if isinstance(config, Dpo):
        out |= _ignored_dpo(config.loss)
    if isinstance(config, Kto):
        out |= _ignored_kto(config.loss)
    if isinstance(config, Dpo | Kto) and not config.reference.sync_ref_model:
        out |= {key: "sync_ref_model is off" for key in ("ref_model_sync_steps", "ref_model_mixup_alpha")}
    if isinstance(config, Cpo) and config.loss.loss in ("hinge", "ipo"):
        out |= {"dpo_label_smoothing": f"the loss is {config.loss.loss}"}
    if isinstance(config, Reward | Prm):
        out |= {key: "a reward model writes no answers" for key in ("sample_prompt", "sample_tokens")}
    return out


def _names(options: DpoLoss) -> list[str]:
    return [LOSSES.get(name, name) for name in options.loss]


def _check_dpo(options: DpoLoss) -> None:
    names = _names(options)
    if not names or len(set(names)) < len(names):
        raise BadInput(f"--loss {' '.join(options.loss)}: give one or more losses, each once")
    if options.dpo_use_weighting and (aot := [name for name in names if name.startswith("aot")]):
        raise BadInput(f"dpo_use_weighting does not go with {aot[0]}, whose terms are not of single pairs")
    if options.loss_weights and len(options.loss_weights) != len(names):
        raise BadInput(f"loss_weights has {len(options.loss_weights)} numbers for {len(names)} losses; give one for each")
    if wrong := [weight for weight in options.loss_weights if not 0 < weight < float("inf")]:
        raise BadInput(f"loss_weights must be numbers above 0, got {wrong[0]}; leave out a loss that is not wanted")


def _ignored_dpo(options: DpoLoss) -> dict[str, str]:
    names, out = _names(options), {}
    listed = ", ".join(names)
    if not set(names) & set(SMOOTHED):
        out["dpo_label_smoothing"] = f"{listed} takes no label smoothing; cdpo, robust, exo and aot do"
    elif "exo" in names and options.dpo_label_smoothing == 0:
        out["dpo_label_smoothing"] = "exo is not defined without; give it a number above 0, or leave it at its own 0.001"
    if not set(names) & set(SCORED):
        out["f_divergence"] = f"{listed} is defined for reverse_kl only"
    if LOSSES.get(options.f_divergence, options.f_divergence) != "alpha":
        out["f_alpha_divergence_coef"] = f"the divergence is {options.f_divergence}"
    if "discopop" not in names:
        out["discopop_tau"] = f"the loss is {listed}"
    if names == ["sft"]:
        out |= dict.fromkeys(("rl_beta", "ld_alpha", "dpo_use_weighting"), "the loss is sft alone")
    return out


def _ignored_kto(options: KtoLoss) -> dict[str, str]:
    return (
        {key: "bco has no weights by class" for key in ("kto_desirable_weight", "kto_undesirable_weight")} if options.loss == "bco" else {}
    )


def _check_reference(config: Dpo | Kto) -> None:
    options: ReferenceOptions = config.reference
    if options.sync_ref_model and options.precompute_ref_logps:
        raise BadInput("give precompute_ref_logps or sync_ref_model, not both: log-probs that were computed once cannot follow the policy")
    if options.sync_ref_model and options.ref_model is not None:
        raise BadInput("give ref_model or sync_ref_model, not both: another model cannot follow the policy")
    if options.sync_ref_model and config.adapter.adapter == "lora" and options.ref_model_mixup_alpha != 1:
        raise BadInput(
            "sync_ref_model with an adapter needs ref_model_mixup_alpha 1: a mean of two adapters is not the adapter of the mean; "
            "or train whole weights with --adapter none"
        )
    if options.sync_ref_model and config.run.sharding == "full":
        raise BadInput("sync_ref_model does not go with --sharding full: the moving reference is kept whole on every rank")
