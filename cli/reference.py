"""The reference that the options of a method name; what it computes is in `models.reference`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from treetune.cli import setup
from treetune.cli.options.reference import ReferenceOptions
from treetune.core.data.reference_logps import enricher as enricher
from treetune.core.state import TrainState
from treetune.models import Model
from treetune.models import reference as references
from treetune.models.policy import Policy
from treetune.models.reference import RefLogp as Logp
from treetune.models.reference import preparer as preparer
from treetune.models.reference import with_logp as with_logp


class Reference(NamedTuple):
    """As `models.reference.Reference`."""

    logp: Logp
    trees: Policy
    extra: dict


def build(
    options: ReferenceOptions, model: Model, used: Policy, config: Any, *, on: torch.device, say: Callable = print, temperature: float = 1.0
) -> Reference:
    """The reference that the options name; temperature divides its logits, as those of the policy."""
    other = None
    if options.ref_model is not None:
        dtype, ours = config.model.dtype, setup.load_tokenizer(config.model)
        other = references.load_other(options.ref_model, used, policy_tokenizer=ours, dtype=dtype, device=on, say=say)
    found = references.build(
        used,
        other=other,
        moves=options.sync_ref_model,
        precompute=options.precompute_ref_logps,
        trained_adapter=used.lora is not None and config.adapter.lora_model_dir is not None,
        temperature=temperature,
    )
    return Reference(*found)


def syncer(options: ReferenceOptions) -> Callable[[TrainState, dict, int], TrainState]:
    """What runs after each step where the reference follows the policy."""
    return references.mixer(every=options.ref_model_sync_steps, alpha=options.ref_model_mixup_alpha)
