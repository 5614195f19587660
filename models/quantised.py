"""Which leaves of a model are quantised, and quantising each as it is read: the dense model is never whole in memory."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack, cast

import torch
from torch import Tensor

from treetune.core import fields, layer_offload, quant, shard, tree
from treetune.core.fields import Fields
from treetune.core.layer_offload import Put
from treetune.core.param import Param, Params
from treetune.core.partition import Partition
from treetune.core.quant import FOUR_BITS, KINDS, Kind, Quantised, Scheme
from treetune.models import MODELS, Model, quant_config

AUTO = ("auto", "none")  # values of --quant that name no kind


Home = Put | Partition  # of leaves: what moves tensors of layers, or how all leaves are split among ranks
See = Callable[[str, Tensor, Quantised], None]  # (path, a leaf, what it is quantised to)


class QuantOptions(TypedDict, total=False):
    """Options of commands."""

    quant: str
    quant_double: bool
    quantize_moe_experts: bool


def scheme(recorded: Scheme | None = None, **options: Unpack[QuantOptions]) -> Scheme | None:
    """The scheme of the options; "auto", which is the default, is the recorded one of an adapter, if any."""
    kind = options.get("quant", "auto")
    if kind in AUTO:
        return recorded if kind == "auto" else None
    return Scheme(cast(Kind, kind), options.get("quant_double", True), options.get("quantize_moe_experts", True))


def of(config: Any) -> Scheme | None:
    """The scheme of the options of a model, as attributes."""
    named = {name: getattr(config, name) for name in QuantOptions.__annotations__}
    return scheme(**cast(QuantOptions, named))


def options(scheme: Scheme | None) -> dict[str, Any]:
    """The options that say a scheme: the inverse of `scheme`."""
    if scheme is None:
        return {"quant": "none"}
    double = {"quant_double": scheme.double} if scheme.kind in FOUR_BITS else {}
    return {"quant": scheme.kind, "quantize_moe_experts": scheme.experts} | double


def read(recorded: Fields) -> Scheme:
    """The scheme in a file. Errors: ValueError for another kind, or values that are none."""
    kind = fields.text(recorded, "quant", choices=KINDS)
    names = ("quant_double", "quantize_moe_experts")
    return Scheme(cast(Kind, kind), *(fields.flag(recorded, name, default=True) for name in names))


class Keep(NamedTuple):
    """What becomes of each leaf that is read: those of the paths `chosen` are quantised, from float32 whatever the model computes in.

    stored: the files hold them quantised. Others that are quantised there, such as routers, become dense. see: is told of each leaf that
    is quantised here: path, leaf, what it is quantised to. home: where leaves are, if not whole on the device: layers away from it, or
    all of them in parts.
    """

    scheme: Scheme | None = None
    chosen: frozenset[str] = frozenset()
    dtype: torch.dtype = torch.float32
    stored: bool = False
    see: See | None = None
    home: Home | None = None

    def __call__(self, path: str, leaf: Any) -> Any:
        """The leaf as the model has it."""
        kept = self._kept(path, leaf)
        return self._put(path, self.home.split(path, kept) if isinstance(self.home, Partition) else kept)

    def _put(self, path: str, leaf: Any) -> Any:
        """A leaf where it is to be, if it is one of a layer."""
        put = self.home.put if isinstance(self.home, Partition) else self.home
        return leaf if put is None or not path.startswith("layers.") else layer_offload.moved(leaf, put)

    def part(self, path: str, leaf: Param) -> tuple[slice, ...] | None:
        """What of a leaf is read, along its first dimensions, where no more of it is needed; else None."""
        if not isinstance(self.home, Partition) or self.stored or path in self.chosen or not leaf.shape:
            return None
        return self.home.box(path, leaf.shape)

    def joined(self, path: str, part: Tensor, leaf: Param) -> Tensor:
        """The leaf of which `part` was read."""
        assert isinstance(self.home, Partition)
        return self._put(path, self.home.joined(path, part, leaf.shape))

    def _kept(self, path: str, leaf: Any) -> Any:
        if quant.quantised(leaf):
            return leaf if path in self.chosen else quant.dense(leaf)
        if self.scheme is None or self.stored or path not in self.chosen:
            return leaf
        with fields.reading(f"the leaf {path}"):
            kept = quant.quantise(leaf, self.scheme)._replace(dtype=self.dtype)
        if self.see is not None:
            self.see(path, leaf, kept)
        return kept

    def wide(self, leaves: Mapping[str, Param]) -> dict[str, Param]:
        """The leaves by path, in the dtypes in which they are read."""
        wide = frozenset() if self.stored else self.chosen
        return {path: leaf._replace(dtype=torch.float32) if path in wide else leaf for path, leaf in leaves.items()}


AS_READ = Keep()


def keeping(abstract: Params, scheme: Scheme | None, dtype: torch.dtype, *, stored: bool = False) -> Keep:
    """Quantises the leaves that a scheme takes; where the files hold them so, takes them as they are."""
    return AS_READ if scheme is None else Keep(scheme, frozenset(paths(abstract, scheme)), dtype, stored)


def folder_keeping(root: Path, abstract: Params, asked: Scheme | None, dtype: torch.dtype) -> Keep:
    """`keeping` of a model folder by the scheme that is asked for. Errors: ValueError where the folder is quantised otherwise."""
    stored = quant_config.of_folder(root)
    return keeping(abstract, quant_config.agreed(stored, asked, root), dtype, stored=stored is not None)


def dense(model: Model) -> Model:
    """The model with each quantised leaf as its dense numbers."""
    return model._replace(params=shard.gather_all(model.params))


def multiplied(model: Model, abstract: Params) -> Model:
    """The model whose linear layers multiply float8 codes themselves. Errors: ValueError where modules of transformers compute it."""
    if not dict.__contains__(MODELS, model.family):
        raise ValueError(
            f"fp8_products: a {model.family} model is computed by modules of transformers, which take dense weights: leave it out"
        )
    linear = {path for path, leaf in tree.items(abstract) if leaf.op == "linear"}

    def one(path: str, leaf: Any) -> Any:
        return leaf._replace(multiplied=True) if path in linear and quant.quantised(leaf) and leaf.kind == "fp8" else leaf

    return model._replace(params=tree.from_items((path, one(path, leaf)) for path, leaf in tree.items(model.params)))


def rounding(logprob: Callable[..., Any], chosen: Collection[str], scheme: Scheme) -> Callable[..., Any]:
    """A log-prob function that rounds the chosen leaves of what trains as a scheme quantises them, in every forward pass."""

    def one(path: str, leaf: Tensor) -> Tensor:
        return quant.rounded(leaf, scheme) if path in chosen else leaf

    def compute(params: Params, frozen: Params, *inputs: Any, **options: Any) -> Any:
        model = tree.from_items((path, one(path, leaf)) for path, leaf in tree.items(params["model"]))
        return logprob(params | {"model": model}, frozen, *inputs, **options)

    return compute


def check_dense(params: Params) -> None:
    """Errors: ValueError for a quantised leaf, which takes no gradient."""
    if path := next((path for path, leaf in tree.items(params) if quant.quantised(leaf)), None):
        raise ValueError(f"{path} is quantised and cannot train: train an adapter on the model, or leave quant out")


def paths(abstract: Params, scheme: Scheme) -> set[str]:
    """The leaves that a scheme quantises: matrices of linear layers, and stacks of experts. Embeddings, heads and routers stay dense."""
    return {path for path, leaf in tree.items(abstract) if leaf.op == "linear" or (scheme.experts and _experts(path, leaf))}


def _experts(path: str, leaf: Param) -> bool:
    return leaf.op == "experts" or (len(leaf.shape) == 3 and "experts" in path.split("."))  # those of bridged models take no adapter
