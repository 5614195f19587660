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
from treetune.models import Model, loading, merging, quantising, target
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
        model, lora, head = merging.load(chosen, say=screen.line)
        if config.save_dtype in KINDS:
            if head is not None:
                raise ValueError(f"{config.adapter} is a reward model's, which is not written quantised: save_dtype float32 or bfloat16")
            merged, save = _quantised(config, chosen, tokenizer, model, lora)
        else:
            merged = merging.merge(model, lora, tokenizer, dtype=loading.DTYPES[config.save_dtype], head=head)
            save = lambda: merging.save(merged, Path(config.output), chosen, tokenizer)  # noqa: E731
        screen.line(merging.describe(merged))
        merging.check(merged, config.max_logit_diff)
        if (other := merging.unquantised(merged, chosen, tokenizer, say=screen.line)) is not None:
            screen.line(f"against the adapter on the unquantised base: {merging.describe(other)}")
        save()
    screen.line(f"saved {Path(config.output)}")
    return 0


def _quantised(config: Merge, chosen: Target, tokenizer: Any, model: Model, lora: Lora) -> tuple[Merged, Save]:
    """The merged model in 4 or 8 bits, all else in bfloat16, and what writes it."""
    scheme, dtype = Scheme(cast(Kind, config.save_dtype), experts=False), torch.bfloat16
    dense, merged = quantising.merge(model, lora, tokenizer, scheme, dtype)
    return merged, lambda: quantising.save(Path(config.output), dense, scheme, dtype, tokenizer, chosen.model, chosen.revision)
