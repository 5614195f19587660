"""Options of the reference that a policy is held to. Importing this imports no torch."""

from dataclasses import dataclass
from typing import Annotated

from treetune.core.config.marks import MODEL, REFERENCE_PACE, REFERENCE_WEIGHTS, listed, refused, unused_if, unused_unless
from treetune.core.config.ranges import COUNT, PART

MOVING = unused_unless("sync_ref_model", reason="sync_ref_model is off")
HELD = unused_unless("beta", reason="beta is 0, so there is no reference")


@dataclass(frozen=True)
class ReferenceOptions:
    """Reference: what the policy is held to; unless said otherwise the model as the run starts, with the adapter it starts from."""

    ref_model: Annotated[str | None, MODEL, REFERENCE_WEIGHTS] = None
    """Another model as the reference: folder, .gguf file, known name or Hugging Face id, with the same vocabulary."""
    precompute_ref_logps: Annotated[bool, listed("only says when the reference is computed")] = False
    """Compute the reference's log-probs once before training, instead of at every step; with dataset_prepared_path they are kept."""
    sync_ref_model: Annotated[bool, refused("decides whether the checkpoint holds a reference that moves")] = False
    """Let the reference follow the policy (TR-DPO)."""
    ref_model_sync_steps: Annotated[int, COUNT, REFERENCE_PACE, MOVING] = 512
    """Steps between two syncs."""
    ref_model_mixup_alpha: Annotated[float, PART, REFERENCE_PACE, MOVING] = 0.6
    """Weight of the policy when the reference is updated; 1 copies the policy. An adapter can only be copied."""


@dataclass(frozen=True)
class RlReference:
    """Reference, used where beta is not 0: the model as the run starts, with the adapter it starts from."""

    ref_model: Annotated[
        str | None,
        MODEL,
        REFERENCE_WEIGHTS,
        HELD,
        unused_if("sync_ref_model", reason="sync_ref_model makes the reference follow the policy"),
    ] = None
    """Another model as the reference: folder, .gguf file, known name or Hugging Face id, with the same vocabulary."""
    sync_ref_model: Annotated[bool, refused("decides whether the checkpoint holds a reference that moves"), HELD] = False
    """Let the reference follow the policy."""
    ref_model_sync_steps: Annotated[int, COUNT, REFERENCE_PACE, HELD, MOVING] = 512
    """Steps between two syncs."""
    ref_model_mixup_alpha: Annotated[float, PART, REFERENCE_PACE, HELD, MOVING] = 0.6
    """Weight of the policy when the reference is updated; 1 copies the policy. An adapter can only be copied."""


def conflicts(options: ReferenceOptions | RlReference, *, adapter: str, sharding: str | None) -> None:
    """Raise ValueError for a reference that cannot follow the policy."""
    if not options.sync_ref_model:
        return
    if isinstance(options, ReferenceOptions) and options.precompute_ref_logps:
        raise ValueError(
            "give precompute_ref_logps or sync_ref_model, not both: log-probs that were computed once cannot follow the policy"
        )
    if isinstance(options, ReferenceOptions) and options.ref_model is not None:
        raise ValueError("give ref_model or sync_ref_model, not both: another model cannot follow the policy")
    if adapter == "lora" and options.ref_model_mixup_alpha != 1:
        raise ValueError(
            "sync_ref_model with an adapter needs ref_model_mixup_alpha 1: a mean of two adapters is not the adapter of the mean; "
            "or train whole weights with --adapter none"
        )
    if sharding == "full":
        raise ValueError("sync_ref_model does not go with --sharding full: the moving reference is kept whole on every rank")
