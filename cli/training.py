"""What all training commands share: checks, assembly of a job from options, the run, and what is left at its end."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from treetune.cli import bases, cadence, corpus, finish, loop, parse, precompute, products, provenance, rundir, setup, sharing
from treetune.cli import method as methods
from treetune.cli.errors import checking_input, running
from treetune.cli.screen import Screen
from treetune.core import masking, param, step, tree
from treetune.core.data import chat_templates, fingerprint, ledger, loader, pack, sources, spans, streaming
from treetune.core.state import Params, TrainState
from treetune.models import Model, bare
from treetune.ops import attention, noise


class Assembly(NamedTuple):
    """Everything a run needs, made before anything is written."""

    job: loop.Job
    state: TrainState
    model: Model
    trees: setup.Trees
    tokenizer: Any
    where: rundir.RunDir
    meta: dict | None
    corpus: corpus.Corpus
    peak: float
    method: methods.Method


def micro_batch(
    indices: Sequence[int],
    docs: list,
    *,
    seed: torch.Tensor | None,
    model: Model,
    on: torch.device,
    pad_to: int | None,
    streams: tuple[methods.Collate, ...],
) -> tuple:
    """(Batch, Plan) on the device for some documents, one for each of the streams that a method makes of them."""
    made = tuple(_stream(collate, [docs[i] for i in indices], seed, model, on, pad_to) for collate in streams)
    return made[0] if len(made) == 1 else made


def _stream(collate: methods.Collate, docs: list, seed: torch.Tensor | None, model: Model, on: torch.device, pad_to: int | None) -> tuple:
    """The mask work is done before the batch moves."""
    batch = collate(docs, budget=pad_to, pad=pad_to is not None)
    plan = attention.plan(batch, window=model.cfg.window, device=on, dtype=model.cfg.dtype)
    batch = {key: value.to(on, non_blocking=True) for key, value in batch.items()}
    return (batch if seed is None else batch | {"seed": seed.to(on)}), plan


def maker(model: Model, on: torch.device, *, pad_to: int | None = None, streams: tuple[methods.Collate, ...] = (methods.plain,)):
    """`micro_batch` for a model; streams are padded to their budget on CUDA only, where fixed shapes save recompilation."""
    return partial(micro_batch, model=bare(model), on=on, pad_to=pad_to if on.type == "cuda" else None, streams=streams)


Dealt = Iterator[tuple[list[list[spans.Doc]], loop.Cursor]]  # step by step: documents of this rank's micro-batches, the cursor after them


class Reading(NamedTuple):
    """How a run reads its training documents: from a cursor on, from where, for how many steps.

    order: fingerprint of how documents form steps. digest: the one of earlier versions, over the lengths of documents as well. Of a
    stream, mark(cursor) says what it has read, and go_on(cursor, mark) checks that this is still there.
    """

    deal: Callable[[loop.Cursor], Dealt]
    start: loop.Cursor
    total_steps: int
    digest: str
    order: str
    mark: Callable[[loop.Cursor], dict] | None = None
    go_on: Callable[[loop.Cursor, dict], None] | None = None


def reading(config: Any, data: corpus.Corpus, model: Model, ranks: setup.Ranks) -> Reading:
    """The reading of documents in memory, or of a stream."""
    optim = config.optim
    plan = batching(config, data) | {"shuffle": config.data.shuffle, "seed": optim.seed}
    dealt = {"accum": optim.gradient_accumulation_steps, "world": ranks.world, "rank": ranks.rank}
    return _of_memory(optim, data, plan, dealt) if data.stream is None else _of_stream(config, data.stream, model, plan, dealt)


def batching(config: Any, data: corpus.Corpus) -> dict:
    """How documents form micro-batches; a document always fits in one."""
    longest = max((len(doc.tokens) for doc in data.train + data.val), default=0) if data.stream is None else 0
    return corpus.batching(config.data, config.optim.micro_batch_size, longest=longest)


def _step_size(dealt: dict) -> int:
    """Micro-batches of a step on all ranks: any number of ranks may continue a run that takes as many."""
    return dealt["accum"] * dealt["world"]


def _of_memory(optim: Any, data: corpus.Corpus, plan: dict, dealt: dict) -> Reading:
    plan = plan | {"weights": data.weights}
    sizes = {"accum": dealt["accum"], "world": dealt["world"]}
    total = corpus.total_steps(data.train, epochs=optim.num_epochs, max_steps=optim.max_steps, **sizes, **plan)
    deal = partial(_from_memory, data.train, epochs=optim.num_epochs if optim.max_steps is None else None, **dealt, **plan)
    digest = loader.plan_fingerprint(corpus.lengths(data.train), step=_step_size(dealt), **plan)
    order = fingerprint.values("memory", _step_size(dealt), plan | {"weights": None})
    return Reading(deal, loader.START, total, digest, order)


def _of_stream(config: Any, source: corpus.Stream, model: Model, plan: dict, dealt: dict) -> Reading:
    data = config.data
    plan = plan | {"buffer": data.streaming_multipack_buffer_size}
    encode = partial(_fitting, encode=source.encode, size=data.sequence_len, model=bare(model))
    choices = {"step": _step_size(dealt), "sequence_len": data.sequence_len, "text_column": data.text_column}
    rows = ledger.Ledger(source.parts, data.text_column)
    deal = partial(_from_stream, source.parts, encode, note=rows.note, **dealt, **plan)
    go_on = partial(rows.go_on, **{name: plan[name] for name in ("buffer", "shuffle", "seed")})
    digest = streaming.stream_fingerprint(source.parts, **choices, **plan)
    order = fingerprint.values("stream", choices, plan)
    return Reading(deal, streaming.START, config.optim.max_steps, digest, order, rows.mark, go_on)


def _from_memory(docs: list, cursor: loader.PlanCursor, **options) -> Dealt:
    for groups, after in loader.epoch_steps(corpus.lengths(docs), cursor=cursor, **options):
        yield [[docs[i] for i in group] for group in groups], after


def _from_stream(parts: list, encode, cursor: streaming.StreamCursor, **options) -> Dealt:
    """A bad row may be found at any time, and is the user's to fix."""
    with checking_input():
        yield from streaming.prefetch(streaming.stream_steps(parts, encode, cursor=cursor, **options))


def _fitting(rows: sources.Rows, *, encode, size: int, model: Model) -> list[spans.Doc]:
    docs = encode(rows)
    corpus.check_fits(docs, size, model.cfg)
    return docs


def stream(deal: Callable[[loop.Cursor], Dealt], make, *, seed: int):
    """A function from a cursor to (micro-batches of a step, cursor after it)."""

    def batches(cursor: loop.Cursor):
        before = cursor
        for groups, after in deal(cursor):
            key = noise.keys(seed, *before)
            yield [make(range(len(docs)), docs, seed=key) for docs in groups], after
            before = after

    return batches


def evaluator(objective, docs: list, make, on_ranks: setup.Ranks, plan: dict, prepare=None):
    """A function from a state to metrics over all held-out documents; None when there are none."""
    if not docs:
        return None
    groups = loader.epoch_plan(corpus.lengths(docs), shuffle=False, **plan)
    mine, _ = loader.next_step(
        groups, loader.PlanCursor(), accum=-(-len(groups) // on_ranks.world), world=on_ranks.world, rank=on_ranks.rank
    )
    evaluate = step.make_eval(objective, prepare=prepare, mesh=on_ranks.mesh)
    return lambda state: evaluate(state, [make(group, docs, seed=None) for group in mine])


def assemble(
    where: rundir.RunDir, config: Any, given: frozenset[str], method: methods.Method, load_model, screen: Screen, ranks: setup.Ranks
) -> Assembly:
    """All of a run's parts from its options and its folder; reads everything, writes nothing."""
    has_adapter = hasattr(config, "adapter") and config.adapter.adapter == "lora"
    start = config.adapter.lora_model_dir if has_adapter else None
    on = setup.device(config.model.device)
    origin = provenance.begin(where, config, method.rates, on, processes=ranks.world, say=screen.line)
    dtype = setup.compute_dtype(config.model.dtype, on)
    products.settle(where.resume, dtype, on, share=partial(sharing.share, ranks), say=screen.line)
    words = setup.load_words(config.model, config.vocabulary, start, say=screen.line)
    tokenizer = words.tokenizer
    data = corpus.load(config.data, tokenizer, seed=config.optim.seed, given=given, kind=method.kind)
    if (own := getattr(config.data, "chat_template", None)) is not None:
        # sample answers and a saved model use it too
        tokenizer.chat_template = chat_templates.resolve(tokenizer, own) or tokenizer.chat_template
    for text in data.lines:
        screen.line(text)
    base = load_model(on)
    known = bases.started_on(config.model, base, start, say=screen.line)
    model = setup.with_rows(base, words, config.vocabulary, start)
    changed = setup.describe_rows(words, base, model)
    if changed:
        screen.line(changed)
    corpus.check_fits(data.train + data.val, config.data.sequence_len, model.cfg)
    if has_adapter:
        how = {"base": known, "seed": config.optim.seed, "new_rows": changed != "", "head": method.head}
        trees = setup.adapted(model, config.adapter, **how, say=screen.line)
    else:
        trees = setup.full(model)
    parts = method.build(config, model, trees, on=on, mesh=ranks.mesh, say=screen.line)
    origin = provenance.with_words(provenance.loaded(origin, config, model, trees, parts.trees.frozen), tokenizer)
    parts = parts._replace(trees=setup.place(parts.trees, model, ranks, config.run.sharding))
    return _assemble(config, method, data, tokenizer, bare(model), parts, origin, where, on, ranks, screen)


def _assemble(config, method, data, tokenizer, model, parts, origin, where, on, ranks, screen) -> Assembly:
    optim, trees = config.optim, parts.trees
    plan = batching(config, data)
    make = maker(model, on, pad_to=plan.get("budget"), streams=parts.streams)
    peak = optim.learning_rate or method.rates[trees.lora is None]
    ratio = config.adapter.loraplus_lr_ratio if trees.lora else None
    optimizer = setup.optimizer(optim, loraplus=ratio)
    state = TrainState(trees.params, trees.frozen, optimizer.init(trees.params), parts.extra, torch.tensor(0, device=on))
    if parts.enrich is not None:
        whole = maker(model, on, pad_to=plan.get("budget"), streams=(pack.collate_trees,))
        root = config.data.dataset_prepared_path
        computes = repr((model.cfg, trees.lora and trees.lora.scale, getattr(config.reference, "ref_model", None)))
        kept = {"root": root, "computes": computes, "tokenizer": tokenizer}
        data = precompute.enriched(data, parts.enrich, state, whole, plan, **kept, screen=screen)
    read = reading(config, data, model, ranks)
    stepper = step.make_step(
        parts.objective,
        optimizer,
        schedule=cadence.schedule(optim, peak, read.total_steps),
        clip=optim.max_grad_norm or None,
        prepare=parts.prepare,
        mesh=ranks.mesh,
    )
    documents = {"train": data.digests[0], "held out": data.digests[1], "order": read.order}
    meta, changed = provenance.check(origin, config, documents=documents, stream=read.digest)
    meta |= products.record()
    batches = stream(read.deal, make, seed=optim.seed)
    evaluate = evaluator(parts.held, data.val, make, ranks, plan, parts.prepare)
    job = loop.Job(
        stepper,
        evaluate,
        parts.objective,
        batches,
        read.total_steps,
        meta,
        on,
        rank=ranks.rank,
        start=read.start,
        prepare=parts.prepare,
        between=parts.between,
        perplexity=method.perplexity,
        goal=method.goal,
        mark=read.mark,
    )
    state, found = loop.restore(where, state, read.start)
    if found is not None and read.go_on is not None:
        read.go_on(read.start._make(found["progress"]["cursor"]), found.get("rows"))
    tell(changed, screen, where, state, read.total_steps)
    return Assembly(job, state, model, trees, tokenizer, where, found, data, peak, method)


def _weights(trees: setup.Trees) -> Params:
    """The weights of the model, trained over frozen ones."""
    return tree.merge(trees.frozen.get("model", {}), trees.params.get("model", {}))


def tell(changed: list[str], screen: Screen, where: rundir.RunDir, state: TrainState, total_steps: int) -> None:
    """What is otherwise than when the checkpoint was written, as a list. Errors: ValueError where no step is left that would see it."""
    if where.resume is not None:
        provenance.reached(where.resume, int(state.step), total_steps, changed)
    if changed:
        screen.line("changed since the checkpoint:", "bold")
    for text in changed:
        screen.line(f"  {text}")


def describe(config: Any, made: Assembly, ranks: setup.Ranks) -> dict[str, str]:
    """What is about to run, with the numbers that let two configs be compared by eye."""
    trained, total = param.count(made.trees.params), param.count(_weights(made.trees))
    optim, data = config.optim, made.corpus.train
    read = f"{len(data)} documents, {sum(corpus.lengths(data))} tokens"
    if made.corpus.stream is not None:
        read = f"a stream of {len(made.corpus.stream.parts)} files or shards"
    batch = f"{optim.micro_batch_size} rows"
    if getattr(config.data, "sample_packing", False):
        batch = f"up to {optim.micro_batch_size * config.data.sequence_len} tokens"
    resumed = f", resumed from {made.where.resume.name}" if made.where.resume else ""
    return {
        "run": f"{made.where.root}{resumed}",
        "model": f"{config.model.model}: {made.model.family}, {total / 1e6:.1f} M parameters, computes in {str(made.model.cfg.dtype)[6:]}",
        "trains": f"{trained / 1e6:.2f} M parameters in {len(tree.leaves(made.trees.params))} leaves ({100 * trained / total:.2f} %)",
        "data": f"{read}, {len(made.corpus.val)} documents held out",
        "step": f"{optim.gradient_accumulation_steps} micro-batches of {batch} on {ranks.world} rank{'s' * (ranks.world > 1)}; "
        f"loss and gradient are means over all {made.method.unit} of a step",
        "length": f"{made.job.total_steps} steps, {cadence.describe(optim, made.peak, made.job.total_steps)}",
    }


def train(command: str, config: Any, given: frozenset[str], method: methods.Method, load_model=None) -> int:
    """A whole run; returns the exit code. `load_model(device) -> Model`, if not simply the one that the options name."""
    load_model = load_model or (lambda on: setup.load_model(config.model, on=on)[0])
    with contextlib.ExitStack() as held:
        with checking_input():
            on = setup.device(config.model.device)
            ranks = setup.ranks(on)
            screen = Screen(quiet=ranks.rank > 0, every=config.run.logging_steps, shown=method.shown)
            where = held.enter_context(rundir.hold(command, config, share=partial(sharing.share, ranks)))
            made = assemble(where, config, given, method, load_model, screen, ranks)
            sampler = finish.sampler(config, made)
            setup.wait_for_all(ranks)  # every rank has read what it resumes from
            sharing.share(ranks, partial(create, config, made))
        return _train(config, made, sampler, screen, ranks)


def create(config: Any, made: Assembly) -> None:
    """Begin the run in its folder."""
    described = parse.to_yaml(config, without=("resume", "overwrite"))  # these say how it was started, not what it is
    rundir.create(made.where, masking.mask_secrets(described), makes=("model" if made.trees.lora is None else "adapter",))


def _train(config: Any, made: Assembly, sampler: Callable, screen: Screen, ranks: setup.Ranks) -> int:
    about = describe(config, made, ranks)
    screen.table("", about)
    for text in cadence.warnings(config, made.job, made.peak):
        screen.warn(text)
    with running(made.where.root):
        sampler(made.state, "before", screen)
        outcome = loop.run(made.job, made.state, made.where, config.run, screen, made.meta)
        finish.leave(config, made, outcome, sampler, screen, about)
    return 0 if outcome.signum is None or outcome.stopped != "interrupted" else 128 + outcome.signum
