"""Documents as the source of a run: read and encoded, in memory or streamed, with what is held out of them."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from treetune.cli import row_settings
from treetune.cli.errors import checking_input
from treetune.cli.methods import ebft_strided
from treetune.cli.methods.method import Parts
from treetune.cli.run import Run
from treetune.core import ckpt
from treetune.core.config import checks
from treetune.core.data import chat_templates, corpus, dataset, kinds, loader, pack, reference_logps, streaming
from treetune.core.data.dataset import Dataset
from treetune.core.run import evaluation, reading
from treetune.core.run.source import Cursor, Supply
from treetune.core.state import TrainState
from treetune.models.batches import batcher
from treetune.models.dense import Config
from treetune.ops import noise


def dataset_kind(run: Run) -> kinds.DatasetSpec:
    """The kind of rows that the method reads."""
    if run.method.data == "strided":
        return ebft_strided.dataset(run.config.ebft)
    return kinds.KINDS[run.method.data]


def reading_of(run: Run) -> str | None:
    """What the documents are read for, as `pack.collate_trees` names it; None for plain documents."""
    return None if run.method.data in ("prompts", "truths") else dataset_kind(run).read


def read(run: Run, tokenizer: Any) -> Dataset:
    """The documents of the config's data. Errors: ValueError naming file, row and fix."""
    options = run.config.data
    data = corpus.load(
        dataset_kind(run),
        row_settings.documents(options),
        tokenizer,
        seed=run.config.optim.seed,
        refuse=partial(checks.refuse_unused, run.options),
    )
    if (template := getattr(options, "chat_template", None)) is not None:
        # Sample answers and a saved model use it, too.
        tokenizer.chat_template = chat_templates.resolve(tokenizer, template) or tokenizer.chat_template
    return data


NOTHING = Dataset([], [], None, "chat", [])  # the data of a run with a source of its own


def check_fits(run: Run, data: Dataset, cfg: Config) -> None:
    """Errors: ValueError for documents that are longer than the model's positions, or hold ids that it lacks."""
    _check(data.train + data.val, run.config.data.sequence_len, cfg)


def _check(documents: list[Any], sequence_len: int, cfg: Config) -> None:
    dataset.check_fits(documents, sequence_len, vocab_size=cfg.vocab_size, max_positions=cfg.max_positions)


def supply(run: Run, parts: Parts, data: Dataset, state: TrainState) -> tuple[Supply, Dataset]:
    """Micro-batches and evaluation of documents, and the documents with what the method computes of them once."""
    cfg, batching = parts.policy.cfg, _batching(run, data)
    collate = batcher(cfg, run.device, parts.collates, budget=batching.get("budget"))
    if parts.precompute is not None:
        data = _precompute(run, parts, data, state, batching)
    optim = run.config.optim
    order = reading.Order(
        batching,
        run.config.data.shuffle,
        optim.seed,
        optim.gradient_accumulation_steps,
        optim.num_epochs,
        optim.max_steps,
        run.ranks,
    )
    documents = _streamed(run, data, order, cfg) if data.stream else reading.in_memory(data.train, order, weights=data.weights)
    # Dropout and noise are functions of the place in the data, so that a resumed run draws what it would have drawn.
    source = documents.source(lambda batch, cursor: collate(batch, seed=noise.keys(optim.seed, *cursor)))
    evaluate = evaluation.of_documents(parts.evaluation, data.val, collate, batching, ranks=run.ranks, prepare=parts.prepare)
    prints = {"train": data.digests[0], "held out": data.digests[1], "order": documents.order}
    return Supply(source, evaluate, prints, documents.digest, described=_describe(run, data)), data


def _batching(run: Run, data: Dataset) -> dict[str, int]:
    """How documents form micro-batches; a document always fits in one."""
    longest = max((len(document.tokens) for document in data.train + data.val), default=0) if data.stream is None else 0
    options, size = run.config.data, run.config.optim.micro_batch_size
    return dataset.batching(packing=options.sample_packing, sequence_len=options.sequence_len, micro_batch_size=size, longest=longest)


def _streamed(run: Run, data: Dataset, order: reading.Order, cfg: Any) -> reading.Reading:
    options, stream = run.config.data, data.stream
    assert stream is not None
    window = reading.Window(options.streaming_multipack_buffer_size, options.sequence_len, options.text_column)
    encode = partial(_encode_fitting, encode=stream.encode, size=options.sequence_len, cfg=cfg)
    return reading.streamed(stream.parts, encode, order, window, deal=_deal_checked)


def _deal_checked(parts: list, encode: Any, cursor: Cursor, **options: Any) -> Iterator[tuple[list[list[Any]], Cursor]]:
    """A bad row may be found at any step, and is the user's to fix."""
    with checking_input():
        # A thread reads ahead, so that a step does not wait for a disk or the hub.
        yield from streaming.prefetch(streaming.stream_steps(parts, encode, cursor=cursor, **options))


def _encode_fitting(rows: Any, *, encode: Any, size: int, cfg: Any) -> list[Any]:
    documents = encode(rows)
    _check(documents, size, cfg)
    return documents


def _precompute(run: Run, parts: Parts, data: Dataset, state: TrainState, batching: dict[str, int]) -> Dataset:
    """The documents with the log-probs of the reference, kept on disk where prepared rows are."""
    config, policy, root, precompute = run.config, parts.policy, run.config.data.dataset_prepared_path, parts.precompute
    assert precompute is not None
    plan = partial(loader.epoch_plan, shuffle=False, budget=batching.get("budget"), rows=batching.get("rows"))
    collate = batcher(policy.cfg, run.device, (pack.collate_trees,), budget=batching.get("budget"))

    def compute(documents: Sequence[Any]) -> list[Any]:
        groups = plan([len(document.tokens) for document in documents]) if documents else []
        with run.observers.busy("reading documents with the reference"):
            return precompute(state, list(documents), collate, groups, lambda count: None)

    store = None
    if root is not None:
        computes = repr((policy.cfg, policy.lora and policy.lora.scale, getattr(config.reference, "ref_model", None)))
        store = reference_logps.Store(root, ckpt.digest(state.frozen or state.params), computes, policy.tokenizer)
    train, val = (reference_logps.load_or_compute(documents, compute, store, say=run.say) for documents in (data.train, data.val))
    return data._replace(train=train, val=val)


def _describe(run: Run, data: Dataset) -> dict[str, str]:
    optim, options = run.config.optim, run.config.data
    read = f"{len(data.train)} documents, {sum(len(document.tokens) for document in data.train)} tokens"
    if data.stream is not None:
        read = f"a stream of {len(data.stream.parts)} files or shards"
    batch = f"{optim.micro_batch_size} rows"
    if getattr(options, "sample_packing", False):
        batch = f"up to {optim.micro_batch_size * options.sequence_len} tokens"
    ranks = f"{run.ranks.world} rank{'s' * (run.ranks.world > 1)}"
    return {
        "data": f"{read}, {len(data.val)} documents held out",
        "step": f"{optim.gradient_accumulation_steps} micro-batches of {batch} on {ranks}; "
        f"loss and gradient are means over all {run.method.unit} of a step",
    }
