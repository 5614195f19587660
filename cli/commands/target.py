"""The model that a command runs, with or without an adapter on it."""

from typing import Any, NamedTuple

import torch

from treetune.cli import bases, products
from treetune.cli.options.model import ModelOptions
from treetune.core.lora import Lora
from treetune.models import Model, loading
from treetune.models import tokenizer as tokenizers
from treetune.models.fetch import Say


class Target(NamedTuple):
    """Options of the (base) model, and the path of the adapter or of a run folder with one."""

    options: ModelOptions
    adapter: str | None

    @property
    def name(self) -> str:
        """Model and adapter as a person would name them."""
        return self.options.model if self.adapter is None else f"{self.options.model} + {self.adapter}"


def choose(options: ModelOptions, adapter: str | None, given: frozenset[str]) -> Target:
    """The target that options name; an adapter brings its own base model unless the user named one. Errors: ValueError without a base."""
    return Target(bases.with_base(options, adapter, given), adapter)


def load_tokenizer(target: Target, *, say: Say) -> Any:
    """The tokenizer of the model, or the one that the adapter carries."""
    return tokenizers.load_tokenizer(target.options.model, adapter_path=target.adapter, revision=target.options.revision, say=say)


def load_model(target: Target, device: torch.device, *, say: Say) -> tuple[Model, Lora | None]:
    """The model with the adapter's whole weights laid over its own, and the adapter to run it with."""
    model, revision, dtype = target.options.model, target.options.revision, target.options.dtype
    products.settle(None, loading.compute_dtype(dtype, device), device)
    return loading.load_adapted(model, target.adapter, revision=revision, dtype=dtype, device=device, say=say)


def stop_ids(target: Target, tokenizer: Any) -> list[int]:
    """Ids that end an answer of the model."""
    return tokenizers.stop_ids(target.options.model, tokenizer, revision=target.options.revision)
