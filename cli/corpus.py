"""Documents from options, under their former names; see core/data/corpus.py and core/data/dataset.py."""

from functools import partial
from typing import Any

from treetune.cli import checks, row_settings
from treetune.core.data import corpus, dataset, kinds
from treetune.core.data.corpus import EncodedRows
from treetune.core.data.dataset import Dataset, Docs, lengths, total_steps
from treetune.core.data.dataset import Dataset as Corpus
from treetune.core.data.dataset import DocumentStream as Stream
from treetune.core.data.kinds import DatasetSpec

__all__ = ["Corpus", "Docs", "Stream", "batching", "check_fits", "lengths", "load", "read_and_encode", "total_steps"]


def load(options: Any, tokenizer: Any, *, seed: int, given: frozenset[str], kind: DatasetSpec = kinds.TEXT) -> Dataset:
    """Documents for training and evaluation; BadInput for options that these rows would ignore."""
    return corpus.load(kind, row_settings.documents(options), tokenizer, seed=seed, refuse=partial(checks.refuse_unused, given))


def read_and_encode(options: Any, tokenizer: Any, *, given: frozenset[str], kind: DatasetSpec = kinds.TEXT, **working: Any) -> EncodedRows:
    """All documents of the data sets, for commands that hold nothing out."""
    refuse = partial(checks.refuse_unused, given)
    return corpus.read_and_encode(kind, row_settings.documents(options), tokenizer, refuse=refuse, **working)


def check_fits(docs: Docs, sequence_len: int, cfg: Any) -> None:
    """`dataset.check_fits` for a model's sizes."""
    dataset.check_fits(docs, sequence_len, vocab_size=cfg.vocab_size, max_positions=cfg.max_positions)


def batching(options: Any, micro_batch_size: int, longest: int | None = None) -> dict[str, int]:
    """`dataset.batching` for options."""
    sizes = {"sequence_len": options.sequence_len, "micro_batch_size": micro_batch_size, "longest": longest}
    return dataset.batching(packing=options.sample_packing, **sizes)
