"""What does not go with layers that are split among ranks, the axis `tensor` of --shard. Imports no torch."""

from typing import Any

from treetune.cli.options import meshes
from treetune.core import registry

MEASURED = ("loftq", "qera", "corda", "corda_ipm")  # starts of an adapter that are made of what is quantised, or of inputs of whole layers
# Optimisers of which one number of a leaf depends on no other.
EACH = ("adamw", "paged_adamw", "adopt", "schedule_free_adamw", "lion", "paged_lion", "adagrad", "sgd")
WHOLE = tuple(name for name in registry.OPTIMIZERS if name not in EACH)


def conflicts(config: Any) -> None:
    """Raise ValueError, one line, for an option that does not go with `shard tensor=N`."""
    size = meshes.sizes(config.run).get("tensor", 1) if meshes.processes(config.run) > 1 else 1
    if size == 1:
        return
    for named, reason in _reasons(config):
        if named:
            raise ValueError(f"{named} does not go with shard tensor={size}: {reason}")


def _reasons(config: Any) -> list[tuple[str, str]]:
    """(an option with its value, empty where it is not given, and why it is refused)."""
    run, adapter = config.run, getattr(config, "adapter", None)
    pipeline, rollout, loss = (getattr(config, name, None) for name in ("pipeline", "rollout", "loss"))
    named = [
        (_given(adapter, "fp8_products"), "products in float8 round rows of whole inputs, of which ranks have columns"),
        (_value(run, "sharding", "moments", "gradients"), "give sharding none, or full"),
        (_value(config.optim, "layer_offloading", "cpu", "disk"), "layers are split among ranks; give --shard data=N"),
        (_value(config.optim, "optimizer", *WHOLE), "it needs whole matrices, or blocks of numbers that ranks do not divide; give adamw"),
        (_value(adapter, "lora_init", *MEASURED), "it looks at whole layers; give default or pissa"),
        (_given(adapter, "relora_steps"), "the adapter would be merged into parts of weights"),
        (_value(loss, "qat", "nf4", "fp4", "int4", "int8", "fp8"), "weights are rounded whole"),
        (_given(getattr(config, "reference", None), "sync_ref_model"), "the moving reference is whole on every rank"),
        (_given(pipeline, "async_prefetch"), "ranks would sum the parts of a layer at different times"),
        (_given(pipeline, "streaming_partial_batch"), "ranks would score completions at different times"),
        (_given(rollout, "rollout_func"), "ranks would sum the parts of a layer at different times"),
    ]
    return [(text, reason) for text, reason in named if text]


def _value(options: Any, name: str, *values: str) -> str:
    """An option with its value, where it has one of these."""
    value = getattr(options, name, None)
    return f"{name} {value}" if value in values else ""


def _given(options: Any, name: str) -> str:
    """An option that is on."""
    return name if getattr(options, name, None) else ""
