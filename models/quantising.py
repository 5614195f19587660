"""A model written with its linear layers in 4 or 8 bits, as transformers and vLLM read it, and how far that moves what it computes."""

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treetune.core import quant, shard, tree
from treetune.core.lora import Lora
from treetune.core.quant import Scheme
from treetune.models import MODELS, Model, bnb_files, bridge, families, hf, hf_keys, merging, processor, quant_config, quantised
from treetune.models import tokenizer as tokenizers
from treetune.models.merging import Difference, Merged

HEAD = "lm_head"


class Error(NamedTuple):
    """Of the weights of one kind, what quantising changes, ||W' - W|| / ||W||: the mean, the largest, and where that is."""

    mean: float
    worst: float
    path: str


class Written(NamedTuple):
    """What was quantised: weights, of these numbers in all; the bytes of all tensors; differences of logits; errors by kind."""

    weights: int
    numbers: int
    bytes: int
    difference: Difference
    probe_tokens: int
    errors: dict[str, Error]


def check(model: Model, scheme: Scheme, name: str) -> None:
    """Errors: ValueError for a model that is quantised, or that this scheme has no files for."""
    if any(quant.quantised(leaf) for leaf in tree.leaves(model.params)):
        raise ValueError(f"{name} is quantised: name the unquantised model")
    check_scheme(model, scheme, name)


def check_scheme(model: Model, scheme: Scheme | None, name: str) -> None:
    """Errors: ValueError for a model that this scheme has no files for."""
    sizes = hf.abstract_of(model)
    experts = next((path for path, leaf in tree.items(sizes) if len(leaf.shape) == 3 and "experts" in path.split(".")), None)
    if scheme is None or scheme.kind not in quant_config.COMPRESSED_KINDS:
        return
    if experts is not None:
        raise ValueError(
            f"{name} has experts ({experts}), which {scheme.kind} files do not hold here: take nf4, fp4 or int8, which leave experts as "
            "they are"
        )
    linears = quantised.paths(sizes, scheme)
    if scheme.kind == "int4" and (odd := [path for path, leaf in tree.items(sizes) if path in linears and leaf.shape[-1] % quant.BLOCK]):
        raise ValueError(
            f"{name}: the rows of {odd[0]} are no whole groups of {quant.BLOCK} numbers, as int4 files have: take nf4, fp4, int8 or fp8"
        )


def quantise(model: Model, scheme: Scheme, dtype: torch.dtype) -> Model:
    """The model as its files will have it: leaves of linear layers quantised, all others rounded to `dtype`."""
    chosen = quantised.paths(hf.abstract_of(model), scheme._replace(experts=False))
    kept = ((path, kept_leaf(path, leaf, chosen, scheme, dtype)) for path, leaf in tree.items(model.params))
    return model._replace(params=tree.from_items(kept))


def kept_leaf(path: str, leaf: Tensor, chosen: Container[str], scheme: Scheme, dtype: torch.dtype) -> Any:
    """A leaf quantised where its path is chosen, else rounded."""
    return quant.quantise(leaf.float(), scheme)._replace(dtype=dtype) if path in chosen else leaf.to(dtype)


@torch.no_grad()
def write(path: Path, model: Model, scheme: Scheme, dtype: torch.dtype, tokenizer: Any, name: str, revision: str | None = None) -> Written:
    """Write the folder of a dense model in float32, quantised; `name` is where it came from. Errors: ValueError where there is a folder."""
    size = save(path, model, scheme, dtype, tokenizer, name, revision)
    ids = merging.probe_ids(tokenizer, model.cfg)
    # As the folder has it; transformers' modules may hold weights otherwise than their files, which cannot be read back quantised.
    small = quantise(model, scheme, dtype) if isinstance(model.cfg, bridge.Config) else hf.load(path, dtype=dtype)
    chosen = [leaf for leaf in tree.leaves(small.params) if quant.quantised(leaf)]
    wide = shard.gather_all(small.params, torch.float32)
    difference = merging.compare(families.document_logits(model, ids), families.document_logits(model._replace(params=wide), ids))
    return Written(len(chosen), sum(leaf.numel() for leaf in chosen), size, difference, len(ids), errors(model, small))


def errors(model: Model, small: Model) -> dict[str, Error]:
    """By the last name of their paths, how far quantised weights are from those of a model."""
    whole, changes = dict(tree.items(model.params)), {}
    for path, leaf in tree.items(small.params):
        if quant.quantised(leaf):
            change = (quant.dense(leaf, torch.float32) - whole[path]).norm() / whole[path].norm().clamp(min=quant.SMALLEST)
            changes.setdefault(path.rpartition(".")[2], []).append((change.item(), path))
    return {kind: Error(sum(change for change, _ in each) / len(each), *max(each)) for kind, each in changes.items()}


def save(path: Path, model: Model, scheme: Scheme, dtype: torch.dtype, tokenizer: Any, name: str, revision: str | None = None) -> int:
    """Write the folder of a dense model, quantised; the bytes of its tensors. `name` is where tokenizer and processor came from."""
    tensors, config = described(model, scheme, dtype, tokenizer)
    generation = tokenizers.generation_config(name, tokenizer, revision=revision)
    hf.write(path, tensors, config, tokenizer=tokenizer, generation=generation, beside=processor.read(name, revision=revision))
    return tree.bytes(tensors)


def merge(model: Model, adapter: Lora, tokenizer: Any, scheme: Scheme, dtype: torch.dtype) -> tuple[Model, Merged]:
    """The adapter folded into the model in float32, and that quantised, all else of `dtype`, with its difference.

    Leaves of one tensor in the files are quantised apart here: the maxima of maxima of blocks are then others than in the files.
    """
    merged = merging.merge(model, adapter, tokenizer, dtype=torch.float32)
    small = merged._replace(model=quantise(merged.model, scheme, dtype))
    return merged.model, merging.compared(small, model, adapter, tokenizer)


def described(model: Model, scheme: Scheme, dtype: torch.dtype, tokenizer: Any = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by key and the config.json of a dense model, its linear layers quantised, each as one tensor of the files."""
    chosen = keys(model, scheme)
    pointers = {leaf.data_ptr(): path for path, leaf in tree.items(model.params)}
    leaves, config = hf.described(model, tokenizer)
    if hasattr(MODELS[model.family], "to_files"):
        chosen = _renamed(model, chosen, leaves, pointers)
    dimensions = {key: leaf.ndim for key, leaf in leaves.items()}
    tensors: dict[str, Tensor] = {}
    for key in list(leaves):
        tensors |= stored(key, leaves.pop(key), chosen, scheme, dtype)
    return tensors, config | settings(model, scheme, chosen, dimensions, dtype)


def _renamed(model: Model, chosen: set[str], leaves: Mapping[str, Tensor], paths: Mapping[int, str]) -> set[str]:
    """The keys in the files of the tensors of modules that are chosen: transformers may save one under another name.

    Errors: ValueError for one that it saves in other parts.
    """
    own = {key: hf_keys.hf_key(model.family, paths[pointer]) for key, leaf in leaves.items() if (pointer := leaf.data_ptr()) in paths}
    file_keys = {key for key, module_key in own.items() if module_key in chosen}
    if missing := sorted(chosen - {own[key] for key in file_keys}):
        raise ValueError(f"{model.family} has {missing[0]} in other parts in its files, and so cannot be written quantised")
    return file_keys


def stored(key: str, leaf: Tensor, chosen: Container[str], scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """{key: tensor} of a tensor of the files, quantised where its key is chosen."""
    if key not in chosen:
        return {key: leaf.to(dtype)}
    return bnb_files.parts(key, quant.quantise(leaf.float(), scheme)._replace(dtype=dtype))


def keys(model: Model, scheme: Scheme) -> set[str]:
    """The keys of the files that hold linear layers."""
    paths = quantised.paths(hf.abstract_of(model), scheme._replace(experts=False))
    return {hf_keys.hf_key(model.family, path) for path in paths}


def settings(model: Model, scheme: Scheme, chosen: Container[str], dimensions: Mapping[str, int], dtype: torch.dtype) -> dict[str, Any]:
    """What config.json says of a model so written. dimensions: of each tensor of the dense model, by key."""
    name = str(dtype).removeprefix("torch.")
    return {"dtype": name, quant_config.NAME: quant_config.to_hf(scheme, _dense_modules(model, scheme, chosen, dimensions), name)}


def _dense_modules(model: Model, scheme: Scheme, chosen: Container[str], dimensions: Mapping[str, int]) -> list[str]:
    """Modules that may be linear layers of transformers or of a server, and stay as they are."""
    head = hf_keys.hf_key(model.family, HEAD).removesuffix(".weight")
    embedding = hf_keys.hf_key(model.family, "embed_tokens")
    matrices = [key for key, count in dimensions.items() if count > 1 and key not in chosen and key != embedding]
    if hasattr(MODELS[model.family], "to_files"):  # transformers goes by the names of its modules, whatever those in files are
        leaves = hf_keys.sizes(model.family, dict(tree.items(hf.abstract_of(model))))
        linears = keys(model, scheme)
        matrices += [key for key, leaf in leaves.items() if len(leaf.shape) > 1 and key not in linears and key != embedding]
    names = (key.removesuffix(".weight") for key in matrices if key.endswith(".weight"))
    return list(dict.fromkeys([head, *(f"{name.partition('.experts.')[0]}.experts" if ".experts." in name else name for name in names)]))


def describe(written: Written) -> str:
    """What was written: a line for each kind of weight, and one for the model."""
    largest, mean, kl = written.difference
    lines = [
        f"{kind}: weights change by {error.mean:.2%} in the mean, at most by {error.worst:.2%} ({error.path})"
        for kind, error in written.errors.items()
    ]
    return "\n".join([*lines, _described(written, largest, mean, kl)])


def _described(written: Written, largest: float, mean: float, kl: float) -> str:
    return (
        f"{written.weights} weights of {written.numbers / 1e6:.1f} M numbers quantised, {written.bytes / 2**20:.1f} MiB in all; probe of "
        f"{written.probe_tokens} tokens: largest logit difference {largest:.2e}, mean {mean:.2e}, KL {kl:.2e} nats"
    )
