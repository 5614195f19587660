"""What must hold of a config before anything is loaded. Imports torch only for a run that starts from an adapter."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

from treetune.cli.methods.method import Method
from treetune.cli.options import answers, data, hub, meshes, model, optim, run, tensor, trackers
from treetune.core import lock
from treetune.core.config import checks, marks, places, table
from treetune.core.config.ranges import TOKENS_MAX
from treetune.core.config.table import Config
from treetune.core.run import guard
from treetune.models import fetch

MODELS = {marks.MODEL.kind: fetch.check, marks.ADAPTER.kind: fetch.check_adapter, marks.MODEL_SHAPE.kind: fetch.check_shape}
OUTPUTS = {
    marks.NEW_FOLDER: guard.require_new_folder,
    marks.NEW_FILE: guard.require_new_file,
    marks.PAGE: guard.require_page,
    marks.LOG: guard.require_log,
}


def complete(config: Config, method: Method | None, options: frozenset[str] = frozenset(), config_file: str | None = None) -> Any:
    """The config with what depends on other options filled in, once it is checked.

    method: whose config it is; None for other commands. options: names of those that the user set, of which one that the command would
    ignore is refused. Errors: ValueError, one line, for options out of range, that contradict each other, or that name what is not there.
    """
    config = _spelled_out(config)
    places.check_names(config)
    check(config, method, options)
    _check_outputs(config, config_file)
    if (tracking := getattr(config, "tracking", None)) is not None:
        trackers.check_packages(tracking)
    places.check(config, MODELS)
    config = _without_samples(config)
    adapter = getattr(getattr(config, "adapter", None), "lora_model_dir", None)
    if adapter is not None:
        config = _on_base(config, adapter, named="model" in options)
    return config if method is None else method.complete(config)


def plan(config: Config, method: Method, options: frozenset[str], config_file: str | None) -> tuple[Any, list[str]]:
    """`complete` for a run that is not to start: what is not on this machine, or stands in the way of outputs, is told, not raised."""
    config = _spelled_out(config)
    places.check_names(config)
    check(config, method, options)
    missing = [str(error) for error in places.absent(config, MODELS)]
    try:
        _check_outputs(config, config_file)
    except ValueError as error:
        missing.append(str(error))
    return method.complete(_without_samples(config)), missing


def _without_samples(config: Config) -> Config:
    """The config without the sample rows of its default where `datasets` stands for them, so that no record names rows that nobody read."""
    data = getattr(config, "data", None)
    if not getattr(data, "datasets", ()) or not getattr(data, "data", ()):
        return config
    changed: dict[str, Any] = {"data": dataclasses.replace(cast(Any, data), data=())}
    return dataclasses.replace(config, **changed)


def _spelled_out(config: Config) -> Config:
    """The config with adapter qlora as what it means, and what is sharded. Errors: ValueError where the model is not to be quantised."""
    train = cast(Any, config)
    if hasattr(getattr(config, "run", None), "sharding"):
        train = config = dataclasses.replace(train, run=dataclasses.replace(train.run, sharding=meshes.sharding(train.run)))
    if getattr(getattr(config, "adapter", None), "lora_r", None) is None or train.adapter.adapter != "qlora":
        return config
    if train.model.quant == "none":
        raise ValueError("adapter qlora trains on a quantised model, and quant is none: give adapter lora, or leave quant out")
    kind = "nf4" if train.model.quant == "auto" else train.model.quant
    model, adapter = dataclasses.replace(train.model, quant=kind), dataclasses.replace(train.adapter, adapter="lora")
    changed: dict[str, Any] = {"model": model, "adapter": adapter}
    return dataclasses.replace(config, **changed)


def _on_base(config: Config, adapter: str, *, named: bool) -> Config:
    """The config of a run that starts from an adapter, on that adapter's own base model unless the user has named one. Imports torch."""
    from treetune.models import quantised, target

    options = cast(Any, config).model
    base = target.choose(adapter, model=options.model, named=named, revision=options.revision)
    quant = quantised.options(base.scheme) if options.quant == "auto" else {}
    changed: dict[str, Any] = {"model": dataclasses.replace(options, model=base.model, revision=base.revision, **quant)}
    return dataclasses.replace(config, **changed)


def check(config: Config, method: Method | None, options: frozenset[str]) -> None:
    """Raise ValueError, one line, for options out of range, that contradict each other, or that this command would ignore."""
    checks.check_ranges(config)
    _check_pass(table.flatten(config))
    checks.check_texts(config)
    _check_dense(config)
    if hasattr(config, "answers"):
        answers.conflicts(cast(Any, config).answers)
    if method is not None:
        train = cast(Any, config)
        optim.conflicts(train.optim)
        data.conflicts(train.data, train.optim.max_steps)
        run.conflicts(train.run, streaming=getattr(train.data, "streaming", False))
        if hasattr(train, "tracking"):
            trackers.conflicts(train.tracking)
        if hasattr(train, "hub"):
            hub.conflicts(train.hub)
        if hasattr(train, "adapter"):
            model.conflicts(train.adapter, train.model)
            _check_restarts(train, method.name)
        method.conflicts(config)
        _check_perplexity(train, method)
        tensor.conflicts(train)
    checks.refuse_unused(options, ignored(config, method))


def _check_restarts(train: Any, name: str) -> None:
    """A base that moves is no reference, no feature network, and not what a server has."""
    if train.adapter.relora_steps is not None and any(hasattr(train, part) for part in ("reference", "rollout", "ebft")):
        raise ValueError(
            f"relora_steps merges the adapter into the model that {name} compares the policy with: leave it out, or merge the adapter "
            "yourself between runs (treetune merge)"
        )


def _check_perplexity(train: Any, method: Method) -> None:
    if "perplexity" in train.run.eval_causal_lm_metrics and not method.perplexity:
        raise ValueError(f"eval_causal_lm_metrics has perplexity, and the loss of {method.name} is no mean of -log p: leave perplexity out")


def ignored(config: Config, method: Method | None) -> dict[str, str]:
    """{option: why this command would not look at it}, as far as options tell."""
    return table.unused(config) | (method.unused(config) if method else {})


def _check_pass(values: dict[str, Any]) -> None:
    """A forward pass holds micro_batch_size * sequence_len tokens, one of an evaluation eval_batch_size * sequence_len."""
    for size in ("micro_batch_size", "eval_batch_size"):
        tokens = (values.get(size) or 1) * (values.get("sequence_len") or 1)
        if tokens > TOKENS_MAX:
            raise ValueError(f"{size} * sequence_len must be at most {TOKENS_MAX} tokens, got {tokens}: lower one of them")


def _check_dense(config: Config) -> None:
    """quant none makes nothing dense: a model that is quantised in its files stays so."""
    options = getattr(config, "model", None)
    if getattr(options, "quant", None) == "none" and fetch.quantised(cast(Any, options).model):
        raise ValueError(
            f"quant is none, and {cast(Any, options).model} holds quantised weights: leave quant out to take them as they are, or name the "
            "unquantised model"
        )


def _check_outputs(config: Config, config_file: str | None) -> None:
    """Raise ValueError, before anything is read or written, for an output that would replace what treetune did not make."""
    for one in places.named(config):
        if one.place in OUTPUTS:
            OUTPUTS[one.place](one.value, one.flag)
    run_options = getattr(config, "run", None)
    if run_options is not None and run_options.output_dir is not None:
        root, read = Path(run_options.output_dir), partial(inputs, config, config_file)
        lock.check(root)
        guard.check_run(root, read, overwrite=run_options.overwrite, resumes=run_options.resume is not None)


def inputs(config: Config, config_file: str | None = None) -> Iterator[tuple[str, Path]]:
    """(flag, path) of everything on this machine that a run reads."""
    yield from guard.inputs(places.read(config))
    yield from guard.inputs([] if config_file is None else [("--config", config_file)])
