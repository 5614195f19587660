"""From rows to what a run trains on, whatever its kind: documents, prompts, or prompts with a true reply."""

from typing import Any

from treetune.core.data import corpus, ebft_rows, kinds, prompt_rows, stream_rows
from treetune.core.data.dataset import Dataset, Refuse, RowSettings

PROMPTS = {"prompts": prompt_rows.load, "truths": ebft_rows.load}


def load(
    kind: str | kinds.DatasetSpec, settings: RowSettings, tokenizer: Any, *, seed: int, refuse: Refuse = lambda unused: None
) -> Dataset:
    """The data sets of the settings, to train on and to hold out.

    kind: a name in `kinds.KINDS`, a spec of one's own (`kinds.strided`), "prompts" or "truths". seed: decides what is held out.
    refuse: called with the options that rows of the detected formats would ignore, and why.
    Errors: ValueError naming file, row and fix.
    """
    if isinstance(kind, str) and kind in PROMPTS:
        return PROMPTS[kind](settings, tokenizer, seed=seed)
    if not settings.training_entries():
        raise ValueError("no training data: give --data at least one file or data set")
    spec = kinds.KINDS[kind] if isinstance(kind, str) else kind
    if settings.stream_buffer is not None:
        return stream_rows.load(spec, settings, tokenizer, refuse=refuse)
    return corpus.load(spec, settings, tokenizer, seed=seed, refuse=refuse)
