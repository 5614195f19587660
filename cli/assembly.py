"""The assembly of a run from its config: tokenizer, data, model, method, source and step. Reads everything, writes nothing."""

import contextlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from treetune.cli import artifacts, bases, cadence, document_source, products, resume_options, rollout_source, setup, summary
from treetune.cli.methods.method import Parts, Setting
from treetune.cli.run import Run
from treetune.core import ckpt, fields, step, tree
from treetune.core.config import table
from treetune.core.data import fingerprint
from treetune.core.run import loop, provenance
from treetune.core.run.ranks import share
from treetune.core.run.source import Source, Supply
from treetune.core.state import Params, TrainState
from treetune.models import Model, fetch, hf, identity, loading, policy
from treetune.models.dense import Config
from treetune.models.policy import Policy
from treetune.models.tokenizer import TokenizerSetup


class Assembly(NamedTuple):
    """All parts of a run, before anything is written.

    policy: with the weights of the state. chat: whether the rows are chats. save(policy, state, folder) writes what trained.
    """

    policy: Policy
    state: TrainState
    supply: Supply
    step: loop.Step
    hooks: loop.Hooks
    data: Any
    peak: float
    stop_ids: list[int]


def assemble(run: Run, source: Source | None, stack: contextlib.ExitStack) -> Assembly:
    """All parts of a run; what is started on the way (workers, a server, threads) stops with the stack.

    source: in place of the config's data. Errors: ValueError, one line, for input that cannot be used.
    """
    config = run.config
    dtype = loading.compute_dtype(config.model.dtype, run.device)
    rate = run.method.rates[not _has_adapter(config)]
    options = resume_options.describe(config, rate=rate, dtype=str(dtype)[6:])
    origin = provenance.begin(run.folder, options, processes=run.ranks.world, say=run.say)
    products.settle(run.folder.resume, dtype, run.device, share=partial(share, run.ranks), say=run.say)
    words = setup.load_words(config.model, config.vocabulary, _start_folder(config), say=run.say)
    data = _read(run, words.tokenizer, source)
    model, start = _load(run, words)
    if source is None and run.method.data not in rollout_source.READERS:
        document_source.check_fits(run, data, model.cfg)
    stop_ids = setup.stop_ids(config.model, words.tokenizer)
    parts = run.method.parts(config, start, Setting(run.device, run.ranks, data, stop_ids, run.say, run.observers.warn))
    frozen = parts.policy.frozen
    origin = provenance.with_weights(origin, _weights(config, model, start, frozen), lambda: ckpt.digest(frozen) if frozen else "")
    origin = provenance.with_words(origin, words.tokenizer, stop_ids if parts.rollouts else ())
    del model, start  # the weights that train are copies, beside which the loaded ones must not live
    parts = parts._replace(policy=policy.place(parts.policy, run.ranks.mesh, config.run.sharding))
    return _connect(run, Pieces(parts, data, origin, stop_ids), source, stack)


def _has_adapter(config: Any) -> bool:
    return getattr(config, "adapter", None) is not None and config.adapter.adapter == "lora"


def _weights(config: Any, model: Model, start: Policy, frozen: Params) -> dict[str, str]:
    """Fingerprints of the model (of random weights their sizes), of the adapter that was there, and of another model as the reference."""
    if getattr(config.model, "from_config", None) is not None:
        prints = {"model": fingerprint.values(repr((model.family, model.cfg)))}
    else:
        prints = {"model": _digest(model.params, model.family, model.cfg)}
    if start.lora is not None and start.adapter is not None and config.adapter.lora_model_dir is not None:
        prints["adapter"] = fingerprint.values(ckpt.leaf_digest(start.params), start.lora.scale, sorted(start.adapter.paths))
    if "ref" in frozen and getattr(config.reference, "ref_model", None) is not None:
        file = Path(fetch.resolve(config.reference.ref_model)) / "config.json"
        prints["reference"] = _digest(frozen["ref"], *(hf.read_config(file) if file.is_file() else (model.family, model.cfg)))
    return prints


def _digest(params: Params, family: str, cfg: Config) -> str:
    """Of weights and of what is computed with them."""
    return fingerprint.values(ckpt.leaf_digest(params), identity.settings(family, cfg))


def _start_folder(config: Any) -> str | None:
    """The adapter that a run starts from."""
    return config.adapter.lora_model_dir if _has_adapter(config) else None


def _read(run: Run, tokenizer: Any, source: Source | None) -> Any:
    """The data of the run, with a line about each data set."""
    if source is not None:
        return document_source.NOTHING
    reader = rollout_source if run.method.data in rollout_source.READERS else document_source
    data = reader.read(run, tokenizer)
    for text in data.lines:
        run.say(text)
    return data


def _load(run: Run, words: TokenizerSetup) -> tuple[Model, Policy]:
    """The model that the run starts from, with a row for each token, and the policy over it."""
    config, start = run.config, _start_folder(run.config)
    base = _base_model(run)
    identity = bases.started_on(config.model, base, start, say=run.say)
    model = setup.with_rows(base, words, config.vocabulary, start)
    changed = setup.describe_rows(words, base, model)
    if changed:
        run.say(changed)
    if getattr(config, "adapter", None) is None or config.adapter.adapter == "none":
        return model, policy.full(model)._replace(tokenizer=words.tokenizer)
    spec = setup.adapter_spec(config.adapter)
    options = {"seed": config.optim.seed, "new_rows": changed != "", "head": run.method.head}
    return model, policy.adapt(model, spec, base=identity, **options, say=run.say)._replace(tokenizer=words.tokenizer)


def _base_model(run: Run) -> Model:
    """The model that the options name, or one of random weights of the shape in a config.json."""
    options = run.config.model
    if getattr(options, "from_config", None) is None:
        return setup.load_model(options, on=run.device, say=run.say)[0]
    path = Path(options.from_config)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"config file {file} does not exist")
    with fields.reading(file):
        family, _ = hf.read_config(file)
        dtype = loading.compute_dtype(options.dtype, run.device)
        model = hf.random(family, file, seed=run.config.optim.seed, dtype=dtype)
    return model._replace(params=tree.map(lambda leaf: leaf.to(run.device), model.params))


class Pieces(NamedTuple):
    """The method for a loaded model, the data, and what the run starts from as far as that is known."""

    parts: Parts
    data: Any
    origin: provenance.Origin
    stop_ids: list[int]


def _connect(run: Run, pieces: Pieces, source: Source | None, stack: contextlib.ExitStack) -> Assembly:
    """The optimiser, the source and the step, where the run begins or goes on."""
    parts, data, origin, stop_ids = pieces
    config, start = run.config, parts.policy
    peak = config.optim.learning_rate or run.method.rates[start.lora is None]
    optimizer = setup.optimizer(config.optim, loraplus=config.adapter.loraplus_lr_ratio if start.lora else None)
    step_zero = torch.tensor(0, device=run.device)
    state = TrainState(start.params, start.frozen, optimizer.init(start.params), parts.extra, step_zero)
    supply, data = _supply(run, parts, data, state, source, stack)
    stack.callback(supply.source.close)
    stepper = step.make_step(
        parts.objective,
        optimizer,
        schedule=cadence.schedule(config.optim, peak, supply.source.total_steps),
        clip=config.optim.max_grad_norm or None,
        prepare=parts.prepare,
        mesh=run.ranks.mesh,
    )
    origin = provenance.with_functions(origin, supply.functions, supply.reward_models) if parts.rollouts else origin
    sampled = parts.rollouts is not None
    meta, changed = provenance.check(origin, documents=supply.documents, stream=supply.digest, sampled=sampled)
    state, resumed = loop.restore(run.folder, state, supply.source)
    _tell_changes(run, changed, int(state.step), supply.source.total_steps)
    start = start._replace(params=state.params, frozen=state.frozen)
    after_step = step.in_sequence(parts.after_step, supply.after_step)
    about = summary.describe(run, start, supply.described, peak, supply.source.total_steps)
    hooks = loop.Hooks(
        parts.objective, parts.prepare, after_step, meta=meta | products.record(), resumed=resumed, sampled=sampled, about=about
    )
    return Assembly(start, state, supply, stepper, hooks, data, peak, stop_ids)


def _supply(run: Run, parts: Parts, data: Any, state: TrainState, source: Source | None, stack: contextlib.ExitStack) -> tuple[Supply, Any]:
    """Where the micro-batches come from, and the data with what the method computes of it once."""
    if source is not None:
        text = f"{type(source).__name__}, a source of {source.total_steps} steps"
        return Supply(source, None, described={"data": text, "step": "micro-batches of the source"}), data
    if parts.rollouts is not None:
        return rollout_source.supply(run, parts, data, stack, partial(artifacts.extras, run.config, parts.policy))
    return document_source.supply(run, parts, data, state)


def _tell_changes(run: Run, changed: list[str], step: int, total_steps: int) -> None:
    """List what is otherwise than when the checkpoint was written. Errors: ValueError where no step is left that would see it."""
    if run.folder.resume is not None:
        provenance.reached(run.folder.resume, step, total_steps, changed, table.rules(type(run.config)))
    if changed:
        run.say("changed since the checkpoint:")
    for text in changed:
        run.say(f"  {text}")
