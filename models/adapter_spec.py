"""Which weights of a model train with an adapter: its low-rank pairs, and weights that train whole beside it."""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from treetune.core import lora, lora_use, module_names, shard, tree
from treetune.core.lora import Lora
from treetune.core.param import Params
from treetune.models import Model, adapter, adapter_bias, adapter_parameters, adapter_starts, hf, quantised, resize
from treetune.models.adapter import Info
from treetune.models.adapter_starts import WEIGHTS_ALONE, Given, Init
from treetune.models.fetch import Say
from treetune.ops import magnitude


class AdapterSpec(NamedTuple):
    """A low-rank adapter to train.

    targets: "all-linear", names of modules as in PEFT, or regular expressions over paths or names of modules; layers: only these, empty for
    all. modules_to_save: names or regular expressions of the weights that train whole beside it. start: the folder of an adapter to train
    further, which then says rank, alpha and targets. unfrozen: regular expressions of further weights that train whole. ranks, alphas:
    (target, value) for some of the targets, the first that matches. dora: with magnitudes. init: how the pairs start. bias: which biases
    train beside it, as of `adapter_bias`.
    """

    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)
    layers: tuple[int, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    start: str | None = None
    unfrozen: tuple[str, ...] = ()
    ranks: tuple[tuple[str, float], ...] = ()
    alphas: tuple[tuple[str, float], ...] = ()
    dora: bool = False
    init: Init = "default"
    bias: str = adapter_bias.NONE


class Fresh(NamedTuple):
    """A fresh adapter, or one to train further: its tree, the weights trained whole, what its folder says, and the start of its pairs.

    start: {path: {"A", "B"}} of those whose start is taken off the weight again.
    """

    low: Lora
    whole: Params
    info: Info
    start: Params


def fresh(model: Model, spec: AdapterSpec, *, seed: int, given: Given = WEIGHTS_ALONE) -> Fresh:
    """A fresh adapter on a model; given: what starts are computed from besides its weights.

    Errors: ValueError for targets or layers that are not there, and for options that these leaves cannot have.
    """
    sizes = hf.abstract_of(model, head=True)
    try:
        paths = lora.match(sizes, spec.targets, layers=spec.layers or None, module=partial(adapter_parameters.target, model.family))
    except ValueError as error:
        raise ValueError(f"{'lora_layers' if 'layers [' in str(error) else 'lora_target_modules'}: {error}") from error
    ranks = {path: int(rank) for path, rank in _by_rule(model, paths, spec.ranks, spec.rank, "lora_rank_pattern").items()}
    alphas = _by_rule(model, paths, spec.alphas, spec.alpha, "lora_alpha_pattern")
    adapter_starts.check(spec.init, paths, ranks=ranks, dropout=spec.dropout, start=spec.start)
    low = Lora(lora.init(sizes, paths, rank=ranks, seed=seed), lora.scale(rank=spec.rank, alpha=spec.alpha, rslora=spec.rslora))
    low = low._replace(ratios=adapter_starts.ratios(low, ranks, alphas, rslora=spec.rslora))
    start: Params = {}
    if spec.init != "default":
        pairs, start = adapter_starts.start(model.params, low, init=spec.init, seed=seed, given=given)
        low = low._replace(tree=pairs)
    if spec.dora:
        low = low._replace(tree=_with_magnitudes(model, low, start))
    info = Info(spec.rank, spec.alpha, spec.rslora, spec.dropout, "", paths, ratios=low.ratios, bias=spec.bias)
    return Fresh(low, _biases(model, paths, spec.bias), info, start)


def _biases(model: Model, adapted: Sequence[str], kind: str) -> Params:
    """The biases that train beside an adapter. Errors: ValueError where the model has none of them."""
    leaves, sizes = dict(tree.items(model.params)), dict(tree.items(hf.abstract_of(model)))
    chosen = adapter_bias.paths(model.family, sizes, adapted, kind)
    if kind != adapter_bias.NONE and not chosen:
        raise ValueError(
            f"lora_bias {kind}: {'the model has no bias' if kind == adapter_bias.ALL else 'none of the targets has a bias'}: leave it out"
        )
    return tree.from_items((path, leaves[path]) for path in chosen)


def _by_rule(model: Model, paths: Sequence[str], rules: Sequence[tuple[str, float]], default: float, option: str) -> dict[str, float]:
    """The value of each adapted leaf: that of the first rule whose target it is. Errors: ValueError for a rule that is none's."""
    modules, value_of = {path: adapter_parameters.target(model.family, path) for path in paths}, dict[str, float]()
    for name, value in rules:
        try:
            matched = module_names.match_target(name, modules, modules)
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from error
        value_of |= {path: value for path in matched if path not in value_of}
    return {path: value_of.get(path, default) for path in paths}


def _with_magnitudes(model: Model, low: Lora, start: Params) -> Params:
    """The tree with the lengths of the rows that it starts from. Errors: ValueError for a leaf on which DoRA is not computed."""
    pairs, leaves = lora.pairs(low.tree), dict(tree.items(model.params))
    try:
        lora.check_magnitudes(pairs)
    except ValueError as error:
        raise ValueError(f"lora_dora: {error}") from error
    in_use = lora.pairs(lora_use.in_use(low, low.tree, start).tree)
    lengths = [
        (f"{path}.{lora.MAGNITUDE}", magnitude.norms(shard.whole(leaves[path]), *_on(leaves[path].device, in_use[path]), low.scale))
        for path in pairs
    ]
    return tree.merge(low.tree, tree.from_items(lengths))


def _on(device: torch.device, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[0].to(device), pair[1].to(device)


def vocabulary_leaves(model: Model, spec: AdapterSpec, whole: Params, info: Info, *, say: Say) -> tuple[str, ...]:
    """Regular expressions of the leaves with a row per token that are not trained whole yet."""
    saved = [path for path, _ in tree.items(whole_leaves(model, spec))]
    missing = [name for name in resize.LEAVES if name in model.params and name not in (*saved, *whole)]
    if low := [name for name in missing if name in info.paths]:
        raise ValueError(f"the vocabulary has new rows, so {low[0]} trains whole: leave it out of --lora-target-modules")
    if missing:
        say(f"the vocabulary has new rows: {' and '.join(missing)} train whole beside the adapter and are saved with it")
    return tuple(f"^{name}$" for name in missing)


def whole_leaves(model: Model, spec: AdapterSpec, more: tuple[str, ...] = ()) -> Params:
    """The weights that train whole beside an adapter, and `more` by name; the head of a tied model starts as its embedding."""
    leaves, matched = {"lm_head": model.params["embed_tokens"]} | dict(tree.items(model.params)), set[str]()
    modules = {path: adapter.module(model.family, path) for path in leaves}
    for name in spec.modules_to_save + more:
        try:
            matched.update(module_names.match_whole(name, modules))
        except ValueError as error:
            raise ValueError(f"lora_modules_to_save: {error}") from error
    matched |= unfrozen(model, spec.unfrozen)
    return tree.from_items([(path, leaf) for path, leaf in leaves.items() if path in matched])


def unfrozen(model: Model, names: tuple[str, ...]) -> set[str]:
    """Paths of the leaves that regular expressions name, over our paths or the keys of transformers' files.

    Errors: ValueError for one that matches nothing, and for a leaf that is quantised or that no gradient reaches.
    """
    still = {path for path, leaf in tree.items(hf.abstract_of(model)) if not leaf.trains}
    keys, matched = {path: hf.hf_key(model.family, path) for path, _ in tree.items(model.params)}, set[str]()
    try:
        for name in names:
            matched.update(module_names.match_parameters(name, keys))
        if odd := sorted(matched & still):
            raise ValueError(f"no gradient reaches {odd[0]}: leave it out")
        quantised.check_dense(tree.from_items((path, leaf) for path, leaf in tree.items(model.params) if path in matched))
    except ValueError as error:
        raise ValueError(f"unfrozen_parameters: {error}") from error
    return matched


def file_info(info: Info, scale: float, *, twice: bool) -> Info:
    """What the folder of an adapter says; `twice`: of plain pairs of twice the rank, which have the same scale."""
    if not twice:
        return info
    rank = 2 * info.rank
    return info._replace(rank=rank, alpha=float(f"{scale * (math.sqrt(rank) if info.rslora else rank):.12g}"))
