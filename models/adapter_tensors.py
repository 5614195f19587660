"""The tensors of an adapter file, as PEFT understands them: low-rank pairs, whole leaves, and what a tie makes of them.

PEFT reads what adapter_config.json asks for and passes over the rest; here a tensor that would be passed over is an error. On a tied model
the embedding and the head share one tensor, also in PEFT, except where a module is replaced as a whole.
"""

import math
from collections import Counter
from functools import partial

import torch
from torch import Tensor

from treetune.core import lora, shard, tree
from treetune.core.param import Params
from treetune.models import Model, adapter_bias, adapter_blocks, adapter_config, adapter_parameters, hf, hf_keys
from treetune.models.adapter_config import AdapterConfig

PREFIX, BASE = "base_model.model.", ".base_layer.weight"
EMBEDDING, HEAD = "embed_tokens", "lm_head"
Leaves = dict[str, Tensor]


def module(family: str, path: str) -> str:
    """PEFT's name of the module that owns a leaf: `model.layers.0.self_attn.q_proj`."""
    return hf.hf_key(family, path).rpartition(".")[0]


def read(tensors: Leaves, config: AdapterConfig, model: Model, *, headless: bool = False) -> tuple[Params, Leaves]:
    """The adapter tree, its scale that of the whole config, and the leaves to lay over the model's by path.

    `headless`: the model scores, and has no language head. Raises ValueError unless every tensor is used, as the config says, in the
    shapes of the model.
    """
    shapes = dict(tree.items(hf.abstract_of(model, head=not headless)))
    if headless:
        shapes.pop(HEAD, None)
    adapter_parameters.check_config(config, model.family)
    parameters = {path: hf.hf_key(model.family, path) for path, leaf in shapes.items() if leaf.op in ("router", "experts")}
    owners = {path: parameters.get(path) or module(model.family, path) for path in shapes}
    modules = list(dict.fromkeys(owner for path, owner in owners.items() if path not in parameters))
    linears = [owners[path] for path, leaf in shapes.items() if leaf.op == "linear"]
    adapted = adapter_config.adapted(config, modules, linears) + adapter_config.adapted_parameters(config, list(parameters.values()))
    replaced = adapter_config.replaced(config, [*modules, *parameters.values()])
    _check_config(config, owners, shapes, adapted, replaced)
    _check_tie(config, model, headless, {owners[name] for name in (EMBEDDING, HEAD) if name in owners} & {*adapted, *replaced})
    ranks = partial(adapter_config.rank_of, config)
    rest = adapter_blocks.split(model.family, tensors, shapes, rank=config.rank, rank_of=ranks)
    key = partial(adapter_blocks.own_key, model.family)
    names = {path: PREFIX + key(path).rpartition(".")[0] + BASE for path in shapes if owners[path] in adapted}
    bases = {path: rest.pop(name) for path, name in names.items() if name in rest}
    biases = _biases(config, model.family, shapes, low=[path for path in shapes if owners[path] in adapted], replaced=replaced, rest=rest)
    whole = {path: hf_keys.turn(model.family, path, rest.pop(PREFIX + key(path))) for path in shapes if PREFIX + key(path) in rest}
    wrapped = [path for path, name in parameters.items() if name in adapted]
    low = lora.from_peft(rest, [path for path, leaf in shapes.items() if leaf.op], adapter_parameters.names(model.family, wrapped, key))
    _check_found(config, owners, adapted, replaced, [owners[path] for path in lora.pairs(low)], list(whole))
    _check_magnitudes(config, low)
    whole |= biases
    _check_shapes(config, owners, low, whole, shapes)
    low = adapter_parameters.stacked(low, shapes)
    if HEAD not in model.params and not headless:
        whole = _tied(whole, bases, {path for path in (EMBEDDING, HEAD) if owners[path] in replaced}, model)
    else:
        like = {path: leaf for path, leaf in tree.items(model.params) if path in bases} if bases else {}
        for path, leaf in bases.items():
            _check_base(path, leaf, [like[path]])
    return _scaled(config, owners, low), whole


def _check_config(config: AdapterConfig, owners: dict, shapes: dict, adapted: list[str], replaced: list[str]) -> None:
    adaptable = {owners[path] for path, leaf in shapes.items() if leaf.op}
    if odd := [name for name in adapted if name not in adaptable]:
        raise ValueError(f"{config.source}: target_modules names {odd[0]}, which is no linear layer and no embedding; it takes no adapter")
    if both := sorted({*adapted} & {*replaced}):
        raise ValueError(f"{config.source}: target_modules and modules_to_save both name {both[0]}: choose one of the two")
    if not adapted:
        raise ValueError(
            f"{config.source}: target_modules names no module of this model, nor target_parameters a parameter: it is of another"
        )


def _biases(config: AdapterConfig, family: str, shapes: dict, *, low: list[str], replaced: list[str], rest: Leaves) -> Leaves:
    """The biases that train beside the adapter, taken out of `rest`."""
    adapter_bias.check(family, low, config.bias)
    chosen = [path for path in adapter_bias.paths(family, shapes, low, config.bias) if module(family, path) not in replaced]
    keys = {path: PREFIX + name for path, name in adapter_bias.names(family, chosen, low).items()}
    if missing := [path for path, key in keys.items() if key not in rest]:
        raise ValueError(f"{config.source} says bias {config.bias}, and the adapter file has none for {missing[0]}")
    return {path: rest.pop(key) for path, key in keys.items()}


def _check_tie(config: AdapterConfig, model: Model, headless: bool, ends: set[str]) -> None:
    if config.tying and ends and HEAD not in model.params and not headless:
        raise ValueError(
            f"{config.source}: ensure_weight_tying must be false where {min(ends)} of a tied model is trained: tying the adapters of both "
            "is not computed"
        )


def _check_found(config: AdapterConfig, owners: dict, adapted: list[str], replaced: list[str], low: list[str], whole: list[str]) -> None:
    """What the file holds is what the config asks for: PEFT would leave the one untrained, and pass over the other."""
    if missing := [name for name in adapted if name not in low]:
        raise ValueError(f"{config.source} names {missing[0]} as a target, and the adapter file has nothing for it")
    if extra := [name for name in low if name not in adapted]:
        raise ValueError(f"the adapter file has tensors for {extra[0]}, which {config.source} does not target: PEFT would pass over them")
    if missing := [path for path, owner in owners.items() if owner in replaced and path not in whole]:
        raise ValueError(f"{config.source} names {owners[missing[0]]} in modules_to_save, and the adapter file lacks {missing[0]}")
    if odd := [path for path in whole if owners[path] in adapted]:
        raise ValueError(f"the adapter file has both an adapter and a whole tensor for {odd[0]}: PEFT would pass over the latter")


def _check_magnitudes(config: AdapterConfig, low: Params) -> None:
    """What DoRA computes on ends and experts is not computed here; its magnitudes are all there, or none."""
    pairs, lengths = lora.pairs(low), lora.magnitudes(low)
    if config.dora and (odd := next((path for path in pairs if path not in lengths), None)):
        raise ValueError(f"{config.source} says use_dora, and the adapter file has no {lora.PEFT_MAGNITUDE} for {odd}")
    if not config.dora and lengths:
        raise ValueError(f"the adapter file has {lora.PEFT_MAGNITUDE} for {next(iter(lengths))}, and {config.source} does not say use_dora")
    lora.check_magnitudes(lengths)


def _check_shapes(config: AdapterConfig, owners: dict, low: Params, whole: Leaves, shapes: dict) -> None:
    leaves = Counter(owner for path, owner in owners.items() if shapes[path].op)
    for path, (a, b) in lora.pairs(low).items():
        rank = adapter_config.rank_of(config, owners[path])
        rank = a.shape[0] if rank == a.shape[0] * leaves[owners[path]] else rank
        *stack, out, inner = shapes[path].shape[::-1] if path == EMBEDDING else shapes[path].shape
        rows = rank * math.prod(stack)
        if tuple(a.shape) != (rows, inner) or tuple(b.shape) != (out, rows):
            raise ValueError(
                f"the adapter of {path} has A {list(a.shape)} and B {list(b.shape)}; "
                f"the model and rank {rank} ask for {[rows, inner]} and {[out, rows]}"
            )
    for path, length in lora.magnitudes(low).items():
        if tuple(length.shape) != shapes[path].shape[:1]:
            raise ValueError(f"the magnitude of {path} has shape {list(length.shape)}; the model asks for {list(shapes[path].shape[:1])}")
    for path, leaf in whole.items():
        if tuple(leaf.shape) != shapes[path].shape:
            raise ValueError(f"{path} in the adapter file has shape {list(leaf.shape)}; the model has {list(shapes[path].shape)}")
    for path, leaf in (*tree.items(low), *whole.items()):
        if not leaf.is_floating_point():
            raise ValueError(f"{path} in the adapter file has dtype {str(leaf.dtype)[6:]}; expected floating-point numbers")


def _scaled(config: AdapterConfig, owners: dict, low: Params) -> Params:
    """The tree under one scale: a module of another rank or alpha has the ratio of the scales in its B."""
    common, scaled = lora.scale(rank=config.rank, alpha=config.alpha, rslora=config.rslora), {}
    for path, (a, b) in lora.pairs(low).items():
        name = owners[path]
        scale = lora.scale(rank=adapter_config.rank_of(config, name), alpha=adapter_config.alpha_of(config, name), rslora=config.rslora)
        scaled[path] = (a, b if scale == common else b.float() * (scale / common))
    return lora.of(scaled, low)


def _tied(whole: Leaves, bases: Leaves, replaced: set[str], model: Model) -> Leaves:
    """The leaves over a tied model: a head leaf only where it is another matrix than the embedding.

    A plain tensor of an end that is not replaced goes into the tensor that both share; an end that is replaced has its own.
    """
    old, rest = shard.full(model.params[EMBEDDING]), {path: leaf for path, leaf in whole.items() if path not in (EMBEDDING, HEAD)}
    written = [whole[path] for path in (EMBEDDING, HEAD) if path in whole and path not in replaced]
    for path, leaf in bases.items():
        new = [whole[EMBEDDING]] if path == HEAD and EMBEDDING in replaced else []
        _check_base(path, leaf, [dict(tree.items(model.params)).get(path, old), *written, *new])
        written += [leaf] if new and not _same(leaf, old) else []
    if len(written) > 1 and not _same(*written[:2]):
        raise ValueError("the adapter file has another embed_tokens than lm_head for a tied model, which has one tensor for both")
    shared = written[0] if written else old
    ends = [whole[path] if path in replaced else shared for path in (EMBEDDING, HEAD)]
    rest |= {} if ends[0] is old else {EMBEDDING: ends[0]}
    return rest if _same(*ends) else rest | {HEAD: ends[1]}


def _check_base(path: str, leaf: Tensor, candidates: list[Tensor]) -> None:
    """PEFT may save the base weight below an adapter, and would lay it over the model's."""
    if not any(_same(leaf, candidate) for candidate in candidates):
        raise ValueError(f"the adapter file holds a base weight of {path} that is not the one of this model: load it over its own base")


def _same(left: Tensor, right: Tensor) -> bool:
    """Equal numbers, once both are in the dtype of either."""
    left, right = shard.full(left).cpu(), shard.full(right).cpu()
    return left.shape == right.shape and (torch.equal(left.to(right.dtype), right) or torch.equal(left, right.to(left.dtype)))
