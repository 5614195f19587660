"""`treetune merge`: a plain model folder from a model and an adapter, checked on a probe before it is kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from treetune.cli.options.commands import Merge
from treetune.cli.screen import Screen
from treetune.core.lora import Lora
from treetune.core.quant import KINDS, Kind, Scheme
from treetune.core.run.errors import checking_input
from treetune.models import Model, layered, loading, merging, quantising, target
from treetune.models.merging import Merged
from treetune.models.target import Target

Save = Callable[[], object]


def run(config: Merge, given: frozenset[str]) -> int:
    """Merge, compare, save; the exit code."""
    screen, named = Screen(), config.model is not None
    with checking_input():
        options = {"revision": config.revision, "dtype": "float32", "device": "cpu"}
        chosen = target.choose(config.adapter, model=config.model or "", named=named, **options)
        tokenizer = target.load_tokenizer(chosen, say=screen.line)
        merged, save = _merged(config, chosen, tokenizer, screen)
        screen.line(merging.describe(merged))
        merging.check(merged, config.max_logit_diff)
        # The model on its unquantised base would be whole in memory.
        whole = config.merge_method == "legacy"
        if whole and (other := merging.unquantised(merged, chosen, tokenizer, say=screen.line)) is not None:
            screen.line(f"against the adapter on the unquantised base: {merging.describe(other)}")
        save()
    screen.line(f"saved {Path(config.output)}")
    return 0


def _merged(config: Merge, chosen: Target, tokenizer: Any, screen: Screen) -> tuple[Merged, Save]:
    """The merged model, and what writes it."""
    output = Path(config.output)
    if config.merge_method == "memory_efficient":
        model, lora = layered.load(chosen, say=screen.line)
        merged = layered.merge(model, lora, tokenizer, dtype=loading.DTYPES[config.save_dtype])
        return merged, lambda: layered.save(merged, output, chosen, tokenizer)
    model, lora, head = merging.load(chosen, say=screen.line)
    if config.save_dtype not in KINDS:
        merged = merging.merge(model, lora, tokenizer, dtype=loading.DTYPES[config.save_dtype], head=head)
        return merged, lambda: merging.save(merged, output, chosen, tokenizer)
    if head is not None:
        raise ValueError(f"{config.adapter} is a reward model's, which is not written quantised: save_dtype float32 or bfloat16")
    return _quantised(config, chosen, tokenizer, model, lora)


def _quantised(config: Merge, chosen: Target, tokenizer: Any, model: Model, lora: Lora) -> tuple[Merged, Save]:
    """The merged model in 4 or 8 bits, all else in bfloat16, and what writes it."""
    scheme, dtype = Scheme(cast(Kind, config.save_dtype), experts=False), torch.bfloat16
    dense, merged = quantising.merge(model, lora, tokenizer, scheme, dtype)
    return merged, lambda: quantising.save(Path(config.output), dense, scheme, dtype, tokenizer, chosen.model, chosen.revision)
