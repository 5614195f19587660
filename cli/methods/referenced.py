"""The reference of a method from its options, in the shape that a run takes."""

from typing import Any, NamedTuple, Protocol

from treetune.cli.methods.parts import AfterStep, Precompute, Prepare, Setting
from treetune.core.data import reference_logps
from treetune.models import reference
from treetune.models.policy import Policy
from treetune.models.reference import RefLogp


class ReferenceChoice(Protocol):
    """The options of a reference."""

    ref_model: str | None
    sync_ref_model: bool
    ref_model_sync_steps: int
    ref_model_mixup_alpha: float


class Referenced(NamedTuple):
    """A reference beside a policy: its log-probs, the policy with its trees, its state, and what a step does with it."""

    logp: RefLogp
    policy: Policy
    extra: dict[str, Any]
    prepare: Prepare
    after_step: AfterStep | None
    precompute: Precompute | None


def build(config: Any, policy: Policy, setting: Setting, *, temperature: float = 1.0, precompute: bool = False) -> Referenced:
    """The reference that the options of `config` name; temperature divides its logits, as those of the policy.

    precompute: its log-probs are computed once, before training.
    """
    options: ReferenceChoice = config.reference
    other = None
    if options.ref_model is not None:
        names = {"policy_tokenizer": policy.tokenizer, "dtype": config.model.dtype, "device": setting.device, "say": setting.say}
        other = reference.load_other(options.ref_model, policy, **names)
    built = reference.build(
        policy,
        other=other,
        moves=options.sync_ref_model,
        precompute=precompute,
        trained_adapter=policy.lora is not None and config.adapter.lora_model_dir is not None,
        temperature=temperature,
    )
    after_step = None
    if options.sync_ref_model:
        after_step = reference.mixer(every=options.ref_model_sync_steps, alpha=options.ref_model_mixup_alpha)
    compute = reference_logps.enricher(built.logp) if precompute else None
    return Referenced(built.logp, built.policy, built.extra, reference.preparer(built.logp), after_step, compute)
