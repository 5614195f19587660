"""Which weights of a model train with an adapter: its low-rank pairs, and weights that train whole beside it."""

from functools import partial
from typing import NamedTuple

from treetune.core import lora, module_names, tree
from treetune.core.lora import Lora
from treetune.core.param import Params
from treetune.models import Model, adapter, adapter_parameters, hf, quantised, resize
from treetune.models.adapter import Info
from treetune.models.fetch import Say


class AdapterSpec(NamedTuple):
    """A low-rank adapter to train.

    targets: "all-linear", names of modules as in PEFT, or regular expressions over paths or names of modules; layers: only these, empty for
    all. modules_to_save: names or regular expressions of the weights that train whole beside it. start: the folder of an adapter to train
    further, which then says rank, alpha and targets. unfrozen: regular expressions of further weights that train whole.
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


def fresh(model: Model, spec: AdapterSpec, *, seed: int) -> tuple[Lora, Params, Info]:
    """A fresh adapter on a model. Errors: ValueError for targets or layers that are not there."""
    sizes = hf.abstract_of(model, head=True)
    try:
        paths = lora.match(sizes, spec.targets, layers=spec.layers or None, module=partial(adapter_parameters.target, model.family))
    except ValueError as error:
        raise ValueError(f"{'lora_layers' if 'layers [' in str(error) else 'lora_target_modules'}: {error}") from error
    scale = lora.scale(rank=spec.rank, alpha=spec.alpha, rslora=spec.rslora)
    info = Info(spec.rank, spec.alpha, spec.rslora, spec.dropout, "", paths)
    return Lora(lora.init(sizes, paths, rank=spec.rank, seed=seed), scale), {}, info


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
