"""The assembly of a run from its config: tokenizer, data, model, method, source and step. Reads everything, writes nothing."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh

from treetune.cli import document_source, memory_rows, resume_options, rollout_source
from treetune.cli.methods import parts as method_parts
from treetune.cli.methods.method import Parts, Setting
from treetune.cli.options import meshes, optim
from treetune.cli.options.model import AdapterOptions
from treetune.cli.run import TrainRun
from treetune.core import ckpt, layer_offload, loss_scale, optim_parts, option_pairs, quant, shard, step, tree
from treetune.core import optim as optimizers
from treetune.core.config import table
from treetune.core.data import chat_templates, fingerprint, template_date, template_marks
from treetune.core.data.dataset import Dataset
from treetune.core.protocols import Tokenizer
from treetune.core.run import cadence, loop, provenance, ranks, summary
from treetune.core.run.source import Source, Supply
from treetune.core.state import Params, TrainState
from treetune.models import (
    Model,
    certificate,
    describe,
    fetch,
    hf,
    identity,
    input_covariances,
    loading,
    policy,
    products,
    quantised,
    relora,
    resize,
    rule_names,
    tensor_rules,
)  # fmt: skip
from treetune.models import tokenizer as tokenizers
from treetune.models.adapter_starts import Given
from treetune.models.decoder_config import Config
from treetune.models.policy import AdapterSpec, Policy
from treetune.models.tokenizer import TokenizerSetup
from treetune.ops.tensor_parallel import Split


class Assembly(NamedTuple):
    """All parts of a run, before anything is written. policy: with the weights of the state. rate: of learning, over all steps.

    shown: the state with the weights that are evaluated, sampled from and saved.
    """

    policy: Policy
    state: TrainState
    supply: Supply
    step: loop.Step
    hooks: loop.Hooks
    data: Dataset
    rate: cadence.Rate
    stop_ids: list[int]
    shown: Callable[[TrainState], TrainState]


class Pieces(NamedTuple):
    """The method for a loaded model, the data, and what the run starts from as far as that is known."""

    parts: Parts
    data: Dataset
    origin: provenance.Origin
    stop_ids: list[int]


def assemble(run: TrainRun, source: Source | None, stack: contextlib.ExitStack) -> Assembly:
    """All parts of a run; what is started on the way (workers, a server, threads) stops with the stack.

    source: in place of the config's data. Errors: ValueError, one line, for input that cannot be used.
    """
    stack.enter_context(products.tf32(run.device, on=run.config.optim.tf32, say=run.say))
    stack.enter_context(products.deterministic(run.device, on=run.config.optim.deterministic, say=run.say))
    pieces = _load(run, source)
    parts, start = pieces.parts, pieces.parts.policy
    loraplus = None if run.adapter is None else run.adapter.loraplus_lr_ratio
    optimizer = optim.build(run.config.optim, rule_names.of(start), peak=run.peak, loraplus=loraplus)
    if meshes.sharding(run.config.run) in ("moments", "gradients") and run.ranks.mesh is not None:
        optimizer = optim_parts.parted(optimizer, shard.splitting(run.ranks.mesh))
    optimizer = loss_scale.scaled(optimizer) if start.cfg.dtype == torch.float16 else optimizer
    for note in optim.offloading_notes(run.config.optim, run.device.type):
        run.say(note)
    step_zero = torch.tensor(0, device=run.device)
    restarts = _restarts(run, optimizer, start)
    held = _held(start, restarts)
    state = TrainState(start.params, start.frozen, optimizer.init(start.params), parts.extra | held, step_zero)
    supply, data = _supply(run, pieces, state, source, stack)
    stack.callback(supply.source.close)
    rate = table.record(cadence.Rate, run.config, peak=run.peak, total_steps=supply.source.total_steps)
    stepper = step.make_step(
        parts.objective,
        optimizer,
        schedule=cadence.schedule(rate),
        clip=run.config.optim.max_grad_norm or None,
        prepare=parts.prepare,
        mesh=run.ranks.mesh,
        split_gradients=meshes.sharding(run.config.run) == "gradients",
    )
    if restarts is not None:
        again = relora.restarter(start, optimizer, restarts)
        pieces = pieces._replace(parts=parts._replace(after_step=step.in_sequence(again, parts.after_step)))
    state, hooks = _restore(run, pieces, state, supply)
    state = state._replace(frozen=_with_held(state))
    start = start._replace(params=state.params, frozen=state.frozen)
    model = describe.describe_policy(start, run.config.model.model)
    if line := memory_rows.of_run(run, start, state):
        model |= {"memory": line}
    about = summary.describe(run.folder, model, supply.described, rate)
    supply = supply._replace(evaluate=_of_shown(supply.evaluate, optimizer.shown))
    return Assembly(start, state, supply, stepper, hooks._replace(about=about), data, rate, pieces.stop_ids, optimizer.shown)


def _restarts(run: TrainRun, optimizer: optimizers.Optimizer, start: Policy) -> relora.Restarts | None:
    """When the adapter starts anew, if it does."""
    options = run.adapter
    if options is None or options.relora_steps is None:
        return None
    restarts = relora.Restarts(options.relora_steps, options.relora_prune_ratio, options.lora_init, run.config.optim.seed)
    relora.check(optimizer, start.params, restarts)
    return restarts


def _held(start: Policy, restarts: relora.Restarts | None) -> dict[str, Params]:
    """What of the frozen weights is in checkpoints, by name: where pairs started, and a base that moves.

    Another machine would decompose and merge the weights with other roundings.
    """
    begun = {"start": start.frozen["start"]} if "start" in start.frozen else {}
    return begun if restarts is None else begun | {relora.HELD: relora.base(start)}


def _with_held(state: TrainState) -> Params:
    """The frozen weights with those that the state holds."""
    begun = {name: state.extra[name] for name in ("start",) if name in state.extra}
    moved = {"model": tree.merge(state.frozen["model"], state.extra[relora.HELD])} if relora.HELD in state.extra else {}
    return state.frozen | begun | moved


def _of_shown(evaluate: loop.Evaluate | None, shown: Callable[[TrainState], TrainState]) -> loop.Evaluate | None:
    return None if evaluate is None else lambda state: evaluate(shown(state))


def _load(run: TrainRun, source: Source | None) -> Pieces:
    """All that is read before there is a state: tokenizer, data and model, and what the method makes of them."""
    config = run.config
    dtype = loading.compute_dtype(config.model.dtype, run.device)
    options = resume_options.describe(config, run.method, rate=run.rate, dtype=str(dtype)[6:])
    origin = provenance.begin(run.folder, options, processes=run.ranks.row_ranks, say=run.say)
    template_date.choose(ranks.share(run.ranks, lambda: provenance.date(origin)))
    _settle_products(run, dtype)
    words = _load_words(run)
    data = _read(run, words.tokenizer, source)
    model, start = _load_model(run, words, data if source is None else None)
    start = sharing_streams(run.ranks.mesh, start)
    if source is None and run.method.data not in rollout_source.READERS:
        document_source.check_fits(run, model.cfg, data.train + data.val)
    stop_ids = tokenizers.stop_ids(config.model.model, words.tokenizer, revision=config.model.revision)
    parts = run.method.parts(config, start, Setting(run.device, run.ranks, data, stop_ids, run.say, run.observers.warn))
    frozen = parts.policy.frozen
    origin = provenance.with_weights(origin, _weights(run, model, start, frozen), lambda: ckpt.digest(frozen) if frozen else "")
    origin = provenance.with_words(origin, words.tokenizer, stop_ids if parts.rollouts else ())
    del model, start  # the weights that train are copies, beside which the loaded ones must not live
    home = layer_offload.home(config.optim.layer_offloading, run.device)
    placed = policy.offload(policy.place(parts.policy, run.ranks.mesh, meshes.sharding(config.run)), home)
    return Pieces(parts._replace(policy=placed), data, origin, stop_ids)


def sharing_streams(mesh: DeviceMesh | None, start: Policy) -> Policy:
    """The policy with the ranks along `context` that share each of its streams. Errors: ValueError for modules that read whole ones."""
    if mesh is None or shard.size(mesh, "context") == 1:
        return start
    if not isinstance(start.cfg, Config):
        raise ValueError(f"shard context splits streams of native families, and {start.family} is computed by transformers' modules")
    split = Split(mesh.get_group("context"), mesh.get_local_rank("context"), shard.size(mesh, "context"))
    return start._replace(cfg=dataclasses.replace(start.cfg, context=split))


def _settle_products(run: TrainRun, dtype: torch.dtype) -> None:
    """The matrix products of the checkpoint to go on from, else those of the machine."""
    resume = run.folder.resume
    earlier = {} if resume is None else {"meta": ckpt.read_meta(resume), "source": resume.name}
    products.settle(dtype, run.device, **earlier, share=partial(ranks.share, run.ranks), say=run.say)


def _load_words(run: TrainRun) -> TokenizerSetup:
    """The tokenizer of the run, with special and extra tokens as the options ask; checks the model's configs before rows are read."""
    model, options = run.config.model, run.config.vocabulary
    words = tokenizers.set_up_tokenizer(
        model.model,
        revision=model.revision,
        start=run.start,
        other=options.tokenizer_config,
        special_tokens=option_pairs.named_texts(options.special_tokens, "special-tokens"),
        tokens=options.tokens,
        say=run.say,
    )
    loading.check_configs(model.model, revision=model.revision, sizes=getattr(model, "from_config", None) is None)
    return words


def _read(run: TrainRun, tokenizer: Tokenizer, source: Source | None) -> Dataset:
    """The data of the run, with a line about each data set."""
    if source is not None:
        return document_source.NOTHING
    reader = rollout_source if run.method.data in rollout_source.READERS else document_source
    data = reader.read(run, tokenizer)
    for text in data.lines:
        run.say(text)
    _check_template(run, tokenizer)
    return data


def _check_template(run: TrainRun, tokenizer: Tokenizer) -> None:
    """Warn of a template that the options name and that writes marks which the tokenizer does not know."""
    name = getattr(run.config.data, "chat_template", None)
    template = None if name is None else chat_templates.resolve(tokenizer, name)
    if name is not None and template is not None and (text := template_marks.warning(tokenizer, name, template)):
        run.observers.warn(text)


def _load_model(run: TrainRun, words: TokenizerSetup, data: Dataset | None) -> tuple[Model, Policy]:
    """The model that the run starts from, with a row for each token, and the policy over it; data: rows of the config, if it has any."""
    config = run.config
    loaded = _base_model(run)
    base = loading.identify_base(config.model.model, loaded, quantised.of(config.model))
    if run.start is not None:
        loading.check_base(run.start, base, say=run.say, train=True)
    model = tokenizers.resize_embeddings(loaded, words, multiple=config.vocabulary.embedding_multiple, start=run.start)
    changed = tokenizers.describe_resize(words, loaded, model)
    if changed:
        run.say(changed)
    if run.adapter is None:
        dtype = loading.DTYPES[config.optim.master_dtype]
        return model, policy.full(model, _unfrozen(run, model, grown=changed != ""), dtype)._replace(tokenizer=words.tokenizer)
    documents = None if run.method.data in rollout_source.READERS else data
    inputs = None if documents is None else partial(_covariances, run, model, documents)
    given = Given(partial(_reread, run), inputs)
    options = {"seed": config.optim.seed, "new_rows": changed != "", "head": run.method.head, "given": given}
    start = policy.adapt(model, adapter_spec(run.adapter), base=base, **options, say=run.say)
    return model, start._replace(tokenizer=words.tokenizer, folds=run.adapter.relora_steps is not None)


def _reread(run: TrainRun, see: Callable[[str, torch.Tensor, quant.Quantised], None]) -> None:
    """Read the model once more, telling of each leaf that is quantised."""
    options = run.config.model
    loading.load_model(options.model, **_reading(run), see=see)


def _reading(run: TrainRun) -> dict[str, Any]:
    """How the model is read."""
    options = run.config.model
    scheme, home = quantised.of(options), method_parts.home(run.config, run.ranks, run.device)
    return {"revision": options.revision, "dtype": options.dtype, "device": run.device, "scheme": scheme, "home": home}


def _covariances(run: TrainRun, model: Model, data: Dataset, paths: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Those of the inputs of linear layers, on rows of the training data."""
    rows = 0 if run.adapter is None else run.adapter.lora_init_rows
    batches = document_source.some(run, model.cfg, data, rows)
    with run.observers.busy("reading rows for the start of the adapter"):
        yield from input_covariances.measure(model, batches, paths)


def _unfrozen(run: TrainRun, model: Model, *, grown: bool) -> tuple[str, ...]:
    """Regular expressions of the only weights that train without an adapter; with new rows those of the vocabulary are among them."""
    options = getattr(run.config, "adapter", None)
    names = () if options is None else options.unfrozen_parameters
    rows = tuple(f"^{name}$" for name in resize.LEAVES if grown and names and name in model.params)
    if rows:
        run.say(f"the vocabulary has new rows: {' and '.join(name[1:-1] for name in rows)} train, too")
    return names + rows


def _base_model(run: TrainRun) -> Model:
    """The model that the options name, or one of random weights of the shape in a config.json."""
    options = run.config.model
    if (shape := getattr(options, "from_config", None)) is not None:
        split = tensor_rules.home(run.ranks.mesh, meshes.sharding(run.config.run))
        return loading.random_model(shape, seed=run.config.optim.seed, dtype=options.dtype, device=run.device, home=split)
    model, path = loading.load_model(options.model, **_reading(run), say=run.say)
    if certificate.needed(model):
        digest = identity.digest(model)
        ranks.share(run.ranks, partial(certificate.ensure, path, model, digest, say=run.say))
    if not getattr(getattr(run.config, "adapter", None), "fp8_products", False):
        return model
    if note := products.without_float8(run.device):
        run.say(note)
    return quantised.multiplied(model, hf.abstract_of(model))


def adapter_spec(options: AdapterOptions) -> AdapterSpec:
    """The adapter that the options describe."""
    return AdapterSpec(
        rank=options.lora_r,
        alpha=options.lora_alpha,
        rslora=options.lora_rslora,
        dropout=options.lora_dropout,
        targets=options.lora_target_modules,
        layers=options.lora_layers,
        modules_to_save=options.lora_modules_to_save,
        start=options.lora_model_dir,
        unfrozen=options.unfrozen_parameters,
        ranks=tuple(option_pairs.rules(options.lora_rank_pattern, "lora-rank-pattern")),
        alphas=tuple(option_pairs.rules(options.lora_alpha_pattern, "lora-alpha-pattern")),
        dora=options.lora_dora,
        init=options.lora_init,
        bias=options.lora_bias,
    )


def _weights(run: TrainRun, model: Model, start: Policy, frozen: Params) -> dict[str, str]:
    """Fingerprints of the model (of random weights their sizes), of the adapter that was there, and of another model as the reference."""
    if getattr(run.config.model, "from_config", None) is not None:
        prints = {"model": fingerprint.values(repr((model.family, model.cfg)))}
    else:
        prints = {"model": provenance.weights_digest(model.params, identity.settings(model.family, model.cfg))}
    if run.start is not None and start.lora is not None and start.adapter is not None:
        prints["adapter"] = provenance.weights_digest(start.params, start.lora.scale, sorted(start.adapter.paths))
    if "ref" in frozen and (other := table.flatten(run.config).get("ref_model")) is not None:
        file = Path(fetch.resolve(other)) / "config.json"
        shape = hf.read_config(file) if file.is_file() else (model.family, model.cfg)
        prints["reference"] = provenance.weights_digest(frozen["ref"], identity.settings(*shape))
    return prints


def _supply(run: TrainRun, pieces: Pieces, state: TrainState, source: Source | None, stack: contextlib.ExitStack) -> tuple[Supply, Dataset]:
    """Where the micro-batches come from, and the data with what the method computes of it once."""
    if source is not None:
        text = f"{type(source).__name__}, a source of {source.total_steps} steps"
        return Supply(source, None, described={"data": text, "step": "micro-batches of the source"}), pieces.data
    if pieces.parts.rollouts is not None:
        return rollout_source.supply(run, pieces.parts, pieces.data, stack, partial(extras, run, pieces.parts.policy))
    return document_source.supply(run, pieces.parts, pieces.data, state)


def _restore(run: TrainRun, pieces: Pieces, state: TrainState, supply: Supply) -> tuple[TrainState, loop.Hooks]:
    """The state and the source where the run begins or goes on, compared with the checkpoint that it goes on from."""
    parts, sampled = pieces.parts, pieces.parts.rollouts is not None
    origin = provenance.with_functions(pieces.origin, supply.functions, supply.reward_models) if sampled else pieces.origin
    meta, changed = provenance.check(origin, documents=supply.documents, stream=supply.digest)
    state, resumed = loop.restore(run.folder, state, supply.source)
    if run.folder.resume is not None:
        rules = table.rules(type(run.config))
        provenance.reached(run.folder.resume, int(state.step), supply.source.total_steps, changed, rules)
    for text in ["changed since the checkpoint:", *(f"  {text}" for text in changed)] if changed else ():
        run.say(text)
    after_step = step.in_sequence(parts.after_step, supply.after_step)
    meta = meta | products.record()
    return state, loop.Hooks(parts.objective, parts.prepare, after_step, meta=meta, resumed=resumed, sampled=sampled)


def extras(run: TrainRun, start: Policy) -> dict[str, Any]:
    """What a saved folder holds besides weights, as arguments of `policy.save`.

    Errors: ValueError for a generation_config.json of the base model that cannot be used.
    """
    model, words = run.config.model, run.config.vocabulary
    own_words = bool(words.special_tokens or words.tokens or words.tokenizer_config)
    return policy.companions(start, model.model, revision=model.revision, start=run.start, own_words=own_words)
