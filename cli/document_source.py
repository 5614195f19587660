"""Documents as the source of a run: the rows that the options name, with what the method makes of them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from treetune.cli import row_settings
from treetune.cli.methods.method import Parts
from treetune.cli.run import TrainRun
from treetune.core import ckpt
from treetune.core.config import checks, table
from treetune.core.data import chat_templates, dataset, kinds, loading, pack, reference_logps
from treetune.core.data.dataset import Dataset
from treetune.core.data.reference_logps import Enrich
from treetune.core.run import documents
from treetune.core.run.errors import checking_input
from treetune.core.run.source import Cursor, Supply
from treetune.core.state import Params, TrainState
from treetune.models.batches import batcher
from treetune.models.dense import Config
from treetune.ops import noise

NOTHING = Dataset([], [], None, "chat", [])  # the data of a run with a source of its own


def dataset_kind(run: TrainRun) -> kinds.DatasetSpec:
    """The kind of rows that the method reads."""
    return kinds.KINDS[run.method.data] if run.method.rows is None else run.method.rows(run.config)


def reading_of(run: TrainRun) -> str | None:
    """What the documents are read for, as `pack.collate_trees` names it; None for plain documents."""
    return None if run.method.data in loading.PROMPTS else dataset_kind(run).read


def read(run: TrainRun, tokenizer: Any) -> Dataset:
    """The documents of the config's data. Errors: ValueError naming file, row and fix."""
    options, refuse = run.config.data, partial(checks.refuse_unused, run.options)
    data = loading.load(dataset_kind(run), row_settings.documents(options), tokenizer, seed=run.config.optim.seed, refuse=refuse)
    if (template := getattr(options, "chat_template", None)) is not None:
        # Sample answers and a saved model use it, too.
        tokenizer.chat_template = chat_templates.resolve(tokenizer, template) or tokenizer.chat_template
    return data


def check_fits(run: TrainRun, cfg: Config, docs: list[Any]) -> None:
    """Errors: ValueError for documents that are longer than the model's positions, or hold ids that it lacks."""
    sizes = {"vocab_size": cfg.vocab_size, "max_positions": cfg.max_positions, "shared_positions": cfg.shared_positions}
    dataset.check_fits(docs, run.config.data.sequence_len, **sizes)


def some(run: TrainRun, cfg: Config, data: Dataset, rows: int) -> list[tuple[Any, Any]]:
    """At most so many of the training documents, evenly spaced and in their order, as micro-batches without padding or noise."""
    docs = [data.train[i * len(data.train) // rows] for i in range(rows)] if rows < len(data.train) else data.train
    check_fits(run, cfg, docs)
    batching, sizes = documents.batching(data._replace(train=docs), table.record(documents.Settings, run.config)), dataset.lengths(docs)
    groups = pack.group_rows(sizes, batching["rows"]) if "rows" in batching else pack.pack(sizes, batching["budget"], seed=None)
    read = reading_of(run)
    collate = batcher(cfg, run.device, (pack.collate if read is None else partial(pack.collate_trees, read=read),))
    return [collate([docs[i] for i in group]) for group in groups]


def supply(run: TrainRun, parts: Parts, data: Dataset, state: TrainState) -> tuple[Supply, Dataset]:
    """Micro-batches and evaluation of documents, and the documents with what the method computes of them once."""
    cfg, settings = parts.policy.cfg, table.record(documents.Settings, run.config)
    batching = documents.batching(data, settings)
    collate = batcher(cfg, run.device, parts.collates, budget=batching.get("budget"))
    collate_held_out = batcher(cfg, run.device, parts.collates, budget=documents.batching(data, settings.held_out).get("budget"))
    if parts.precompute is not None:
        data = _precompute(run, parts, parts.precompute, data, state, batching)

    def seeded(batch: list[Any], cursor: Cursor) -> Any:
        # Dropout and noise are functions of the place in the data, so that a resumed run draws what it would have drawn.
        return collate(batch, seed=noise.keys(settings.seed, *cursor))

    calls = documents.Calls(seeded, collate_held_out, parts.evaluation, parts.prepare, partial(check_fits, run, cfg), checking_input)
    return documents.supply(data, settings, calls, ranks=run.ranks, unit=run.method.unit), data


def _precompute(run: TrainRun, parts: Parts, enrich: Enrich, data: Dataset, state: TrainState, batching: dict[str, int]) -> Dataset:
    """The documents with the log-probs of the reference, kept on disk where prepared rows are."""
    policy, root = parts.policy, run.config.data.dataset_prepared_path
    collate = batcher(policy.cfg, run.device, (pack.collate_trees,), budget=batching.get("budget"))

    def compute(docs: Sequence[Any], groups: list[list[int]]) -> list[Any]:
        with run.observers.busy("reading documents with the reference"):
            return enrich(state, list(docs), collate, groups, lambda count: None)

    store = None
    if root is not None:
        other = getattr(getattr(run.config, "reference", None), "ref_model", None)
        computes = repr((policy.cfg, policy.lora and policy.lora.scale, other))
        store = reference_logps.Store(root, ckpt.digest(_start(state)), computes, policy.tokenizer)
    return reference_logps.precompute(data, compute, batching, store, say=run.say)


def _start(state: TrainState) -> Params:
    """The weights that a reference starts from: without an adapter those that train are among them."""
    return state.frozen | ({} if "lora" in state.params else {"trained": state.params})
