"""The base model of an adapter: the one that is taken when none is named, and whether the one at hand is the one it was trained on."""

import dataclasses
from collections.abc import Callable
from typing import Any

from treetune.cli.options.model import ModelName, ModelOptions
from treetune.models import Model, adapter, loading
from treetune.models.loading import check_base as check
from treetune.models.tokenizer import adapter_folder


def with_base(options: ModelOptions, path: str | None, given: frozenset[str]) -> ModelOptions:
    """The model options, naming the adapter's own base model where the user named none. Raises ValueError where the adapter names none."""
    if path is None or "model" in given:
        return options
    base, revision = adapter.base_of(adapter_folder(path)), adapter.revision_of(adapter_folder(path))
    if not base:
        raise ValueError(f"{path} names no base model: name it with --model")
    return dataclasses.replace(options, model=base, revision=options.revision or revision)


def started(config: Any, given: frozenset[str]) -> Any:
    """The config of a training run that starts from an adapter, on the adapter's own base model where the user named none."""
    start = config.adapter.lora_model_dir
    return dataclasses.replace(config, model=with_base(config.model, start, given)) if config.adapter.adapter == "lora" else config


def base_of(options: ModelName, model: Model) -> adapter.Base:
    """What an adapter on this model says of it; `model` is as it was loaded, before its vocabulary grows."""
    return loading.identify_base(options.model, model)


def started_on(options: ModelName, model: Model, start: str | None, *, say: Callable[[str], None]) -> adapter.Base:
    """`base_of` for a training run, checked against the adapter that it starts from, if any."""
    base = base_of(options, model)
    if start is not None:
        check(start, base, say=say, train=True)
    return base
