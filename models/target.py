"""The model that a command runs, with or without an adapter on it: by name, chosen before anything is read."""

from typing import Any, NamedTuple, Unpack

from treetune.core.lora import Lora
from treetune.core.quant import Scheme
from treetune.models import Model, adapter, loading, products, quantised
from treetune.models import tokenizer as tokenizers
from treetune.models.fetch import Say, silent
from treetune.models.quantised import QuantOptions
from treetune.models.tokenizer import adapter_folder


class Target(NamedTuple):
    """A (base) model by name, how it is computed and quantised, and the path of the adapter or of a run folder with one."""

    model: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    adapter: str | None = None
    scheme: Scheme | None = None

    @property
    def name(self) -> str:
        """Model and adapter as a person would name them."""
        return self.model if self.adapter is None else f"{self.model} + {self.adapter}"


def choose(
    path: str | None,
    *,
    model: str,
    named: bool,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    **quant: Unpack[QuantOptions],
) -> Target:
    """The model, with the adapter at `path`, which brings its own base model unless the user has `named` one.

    quant: the options of the command of those names; the base is quantised as the adapter was trained unless they say otherwise.
    Errors: ValueError for an adapter without a base.
    """
    if path is not None and not named:
        model, recorded = adapter.base_of(adapter_folder(path)), adapter.revision_of(adapter_folder(path))
        if not model:
            raise ValueError(f"{path} names no base model: name it with --model")
        revision = revision or recorded
    recorded = None if path is None else adapter.base(adapter_folder(path)).scheme
    return Target(model, revision, dtype, device, path, quantised.scheme(recorded, **quant))


def load_tokenizer(target: Target, *, say: Say = silent) -> Any:
    """The tokenizer of the model, or the one that the adapter carries."""
    return tokenizers.load_tokenizer(target.model, adapter_path=target.adapter, revision=target.revision, say=say)


def load_model(target: Target, *, say: Say = silent) -> tuple[Model, Lora | None]:
    """The model with the adapter's whole weights laid over its own, and the adapter to run it with."""
    device = loading.select_device(target.device)
    products.settle(loading.compute_dtype(target.dtype, device), device)
    options = {"revision": target.revision, "dtype": target.dtype, "device": device, "scheme": target.scheme}
    return loading.load_adapted(target.model, target.adapter, **options, say=say)


def stop_ids(target: Target, tokenizer: Any) -> list[int]:
    """Ids that end an answer of the model."""
    return tokenizers.stop_ids(target.model, tokenizer, revision=target.revision)
