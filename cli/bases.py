"""The base model of an adapter: the one that is taken when none is named, and whether the one at hand is the one it was trained on."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from treetune.cli import products, setup
from treetune.cli.options.shared import ModelName, ModelOptions
from treetune.core import lora, tree
from treetune.models import Model, adapter, identity, resize


def with_base(options: ModelOptions, path: str | None, given: frozenset[str]) -> ModelOptions:
    """The model options, naming the adapter's own base model where the user named none. Raises ValueError where the adapter names none."""
    if path is None or "model" in given:
        return options
    base, revision = adapter.base_of(setup.adapter_folder(path)), adapter.revision_of(setup.adapter_folder(path))
    if not base:
        raise ValueError(f"{path} names no base model: name it with --model")
    return dataclasses.replace(options, model=base, revision=options.revision or revision)


def started(config: Any, given: frozenset[str]) -> Any:
    """The config of a training run that starts from an adapter, on the adapter's own base model where the user named none."""
    start = config.adapter.lora_model_dir
    return dataclasses.replace(config, model=with_base(config.model, start, given)) if config.adapter.adapter == "lora" else config


def base_of(options: ModelName, model: Model) -> adapter.Base:
    """What an adapter on this model says of it; `model` is as it was loaded, before its vocabulary grows."""
    return adapter.Base(setup.model_name(options), identity.digest(model))


def started_on(options: ModelName, model: Model, start: str | None, *, say: Callable[[str], None]) -> adapter.Base:
    """`base_of` for a training run, checked against the adapter that it starts from, if any."""
    base = base_of(options, model)
    if start is not None:
        check(start, base, say=say, train=True)
    return base


def check(path: str, base: adapter.Base, *, say: Callable[[str], None], train: bool = False) -> None:
    """Tell when an adapter is used on another base model than it was trained on.

    Raises ValueError when it is to train further there, or when the model under the name of its base has other weights than it had.
    """
    known = adapter.base(setup.adapter_folder(path))
    if not known.digest:
        tell(path, base.name, say=say)
    elif known.digest != base.digest:
        others = f"{path} was trained on {known.name}, and the weights of {base.name} are others"
        if _plain(known.name) == _plain(base.name):
            raise ValueError(f"{path} was trained on {known.name}, which has other weights now: name the model that it was trained on")
        if train:
            raise ValueError(f"{others}: leave --model out to train it further on its own base, or start a new adapter on this one")
        say(f"{others}: this is another model than the one that was trained")


def tell(path: str, name: str, *, say: Callable[[str], None]) -> None:
    """Tell when an adapter names another base model than this one."""
    named = adapter.base_of(setup.adapter_folder(path))
    if named and _plain(named) != _plain(name):
        say(f"{path} names the base model {named}; it is used on {name} as asked: check that it was trained on it")


def _plain(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name


def load_adapted(options: ModelOptions, path: str | None, *, on: torch.device, say=print) -> tuple[Model, lora.Lora | None]:
    """A model with the adapter folder's whole weights laid over its own, and the adapter to run it with."""
    products.settle(None, setup.compute_dtype(options.dtype, on), on)
    model, _ = setup.load_model(options, on=on, say=say)
    if path is None:
        return model, None
    check(path, base_of(options, model), say=say)
    model = _as_trained(model, options, path)
    found, whole, _ = setup.load_adapter(path, model)
    return model._replace(params=tree.merge(model.params, whole)), found


def _as_trained(model: Model, options: ModelOptions, path: str) -> Model:
    """The model with the vocabulary rows that an adapter was trained with, whether more or fewer than its own."""
    found = adapter.rows(setup.adapter_folder(path), model.family)
    if found is None:
        return resize.resize(model, len(setup.load_tokenizer(options, path)) if setup.has_tokenizer(path) else 0)
    if found < model.cfg.vocab_size:
        setup.check_rows(path, found, len(setup.load_tokenizer(options, path)))
    return resize.resize(resize.cut(model, found), found)
