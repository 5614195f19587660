"""`treetune merge`: a plain model folder from a model and an adapter, checked on a probe before it is kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from treetune.cli.options.commands import Merge
from treetune.cli.screen import Screen
from treetune.core import manifest
from treetune.core.quant import KINDS, Kind, Scheme
from treetune.core.run import cards
from treetune.core.run.errors import checking_input
from treetune.models import adapter, layered, loading, merging, quantising, target
from treetune.models.merging import Merged
from treetune.models.target import Target
from treetune.models.tokenizer import adapter_folder


class Plan(NamedTuple):
    """A merged model, what compares it with the adapter on the unquantised base, and what writes it."""

    merged: Merged
    unquantised: Callable[[], Merged | None]
    save: Callable[[], object]


def run(config: Merge, given: frozenset[str]) -> int:
    """Merge, compare, save; the exit code."""
    screen, named = Screen(), config.model is not None
    with checking_input():
        options = {"revision": config.revision, "dtype": "float32", "device": "cpu"}
        chosen = target.choose(config.adapter, model=config.model or "", named=named, **options)
        tokenizer = target.load_tokenizer(chosen, say=screen.line)
        plan = (_by_layers if config.merge_method == "memory_efficient" else _whole)(config, chosen, tokenizer, screen)
        screen.line(merging.describe(plan.merged))
        merging.check(plan.merged, config.max_logit_diff, config.save_dtype)
        if (other := plan.unquantised()) is not None:
            screen.line(f"against the adapter on the unquantised base: {merging.describe(other)}")
        plan.save()
        cards.add(Path(config.output), _facts(config, chosen, plan.merged, other), place=Path(config.output).name)
    screen.line(f"saved {Path(config.output)}")
    return 0


def _facts(config: Merge, chosen: Target, merged: Merged, other: Merged | None) -> dict[str, Any]:
    """What the card of the merged model says: all that of the adapter, and how far its outputs are from those before."""
    folder = adapter_folder(chosen.adapter or config.adapter)
    measured = {"save_dtype": config.save_dtype, "probe_tokens": merged.probe_tokens, **merged.difference._asdict()}
    if other is not None:
        measured["unquantised"] = other.difference._asdict()
    measured["adapter"] = manifest.entry(folder / adapter.WEIGHTS).sha256
    unknown = {"format": 1, "base": loading.base_name(chosen.model), "base_on_hub": not Path(chosen.model).expanduser().exists()}
    return unknown | cards.read(folder) | {"kind": "merged", "scores": merged.head is not None, "merge": measured}


def _form(config: Merge) -> tuple[torch.dtype, Scheme | None]:
    """The dtype of the weights, or of those that are not quantised by the scheme."""
    if config.save_dtype in KINDS:
        return torch.bfloat16, Scheme(cast(Kind, config.save_dtype), experts=False)
    return loading.DTYPES[config.save_dtype], None


def _by_layers(config: Merge, chosen: Target, tokenizer: Any, screen: Screen) -> Plan:
    dtype, scheme = _form(config)
    model, lora = layered.load(chosen, say=screen.line)
    quantising.check_scheme(model, scheme, chosen.name)
    merged = layered.merge(model, lora, tokenizer, dtype=dtype, scheme=scheme)
    form = {"dtype": dtype, "scheme": scheme}
    return Plan(
        merged,
        lambda: layered.unquantised(merged, chosen, tokenizer, **form, say=screen.line),
        lambda: layered.save(merged, Path(config.output), chosen, tokenizer, **form),
    )


def _whole(config: Merge, chosen: Target, tokenizer: Any, screen: Screen) -> Plan:
    (dtype, scheme), output = _form(config), Path(config.output)
    model, lora, head = merging.load(chosen, say=screen.line)
    if scheme is None:
        merged = merging.merge(model, lora, tokenizer, dtype=dtype, head=head)

        def save() -> object:
            return merging.save(merged, output, chosen, tokenizer)
    else:
        if head is not None:
            raise ValueError(f"{config.adapter} is a reward model's, which is not written quantised: save_dtype float32 or bfloat16")
        quantising.check_scheme(model, scheme, chosen.name)
        dense, merged = quantising.merge(model, lora, tokenizer, scheme, dtype)

        def save() -> object:
            return quantising.save(output, dense, scheme, dtype, tokenizer, chosen.model, chosen.revision)

    return Plan(merged, lambda: merging.unquantised(merged, chosen, tokenizer, say=screen.line), save)
