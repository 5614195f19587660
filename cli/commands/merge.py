"""`treetune merge`: a plain model folder from a model and an adapter, checked on a probe before it is kept."""

from pathlib import Path

from treetune.cli.options.commands import Merge
from treetune.cli.screen import Screen
from treetune.core.run.errors import checking_input
from treetune.models import loading, merging, target


def run(config: Merge, given: frozenset[str]) -> int:
    """Merge, compare, save; the exit code."""
    screen, named = Screen(), config.model is not None
    with checking_input():
        options = {"revision": config.revision, "dtype": "float32", "device": "cpu"}
        chosen = target.choose(config.adapter, model=config.model or "", named=named, **options)
        tokenizer = target.load_tokenizer(chosen, say=screen.line)
        model, lora, head = merging.load(chosen, say=screen.line)
        merged = merging.merge(model, lora, tokenizer, dtype=loading.DTYPES[config.save_dtype], head=head)
        screen.line(merging.describe(merged))
        merging.check(merged, config.max_logit_diff)
        merging.save(merged, Path(config.output), chosen, tokenizer)
    screen.line(f"saved {Path(config.output)}")
    return 0
