"""Leaves by name: by path (`layers.0.q_proj`), or by the module of transformers that owns them (`model.layers.0.self_attn.q_proj`).

A name is whole components at the end of a module's name, as in PEFT, or a regular expression.
"""

import re
from collections.abc import Iterable, Mapping

from treetune.core import tree

Modules = Mapping[str, str]  # path of a leaf -> name of the module that owns it
NUMBER, INNER_NUMBER = re.compile(r"(?:^|\.)(\d+)\."), re.compile(r"(?<![^.])\d+(?=\.)")


def match_target(name: str, modules: Modules, every: Modules) -> list[str]:
    """Paths of the leaves that a LoRA target names: by PEFT's rule for plain names, else as a regular expression.

    modules: the leaves that an adapter may sit on, of `every` leaf. Errors: ValueError for a name that matches none of them.
    """
    # A plain name that stands for a leaf means that one, even where others contain its text: `mlp.gate` beside `mlp.gate_up_proj`.
    named = [path for path, module in every.items() if name == path or _ends_with(module, name)]
    paths = named or _search(name, modules) or _search(name, every)
    if not paths:
        raise ValueError(_no_match(name, modules))
    if taken := [path for path in paths if path in modules]:
        return taken
    raise ValueError(f"{name!r} matches {paths[0]}, which is no linear layer and takes no adapter; it may be trained whole")


def match_whole(name: str, modules: Modules) -> list[str]:
    """Paths of the leaves that train whole by a regular expression, or by a module's name, which stands for all its leaves.

    Errors: ValueError for a name that matches nothing.
    """
    searched = set(_search(name, modules))
    if paths := [path for path, module in modules.items() if path in searched or _ends_with(module, name)]:
        return paths
    raise ValueError(_no_match(name, modules))


def match_parameters(name: str, keys: Modules) -> list[str]:
    """Paths of the leaves in which a regular expression is found, else those in whose keys of transformers' files it is found.

    keys: {path: key}. Errors: ValueError for one that is found nowhere.
    """
    if paths := _search(name, keys):
        return paths
    near = tree.nearest(name, dict.fromkeys([*keys, *keys.values()]))
    raise ValueError(f"{name!r} matches no parameter; the nearest are {', '.join(near)}")


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _search(name: str, modules: Modules) -> list[str]:
    """Paths in which a regular expression is found; where there is none, those of the modules in whose names it is found."""
    try:
        regex = re.compile(name)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{name!r} is not a regular expression: {error}") from error
    # Paths come first, so that an expression over them means the same whatever the modules are called.
    paths = [path for path in modules if regex.search(path)]
    return paths or [path for path, module in modules.items() if regex.search(module)]


def _no_match(name: str, modules: Modules) -> str:
    """What the name is near to, and all that there is."""
    short, exact = shorten(modules.values()), [_without_inner_numbers(word) for pair in modules.items() for word in pair]
    near = tree.nearest(name, dict.fromkeys([*(word.rpartition(".")[2] for word in short), *short, *exact]))
    return f"{name!r} matches no parameter; the nearest are {', '.join(near)}; the model has {', '.join(short)}"


def shorten(modules: Iterable[str]) -> list[str]:
    """Names of modules without the number of their layer, each once: `self_attn.q_proj`, `mlp.experts.N.up_proj`, `lm_head`."""
    return list(dict.fromkeys(_shortened(module) for module in modules))


def _shortened(module: str) -> str:
    match = NUMBER.search(module)
    return module.rpartition(".")[2] if match is None else _without_inner_numbers(module)[match.end() :]


def _without_inner_numbers(name: str) -> str:
    """The name with N for each number behind that of the layer."""
    match = NUMBER.search(name)
    return name if match is None else name[: match.end()] + INNER_NUMBER.sub("N", name[match.end() :])


def layer_of(name: str) -> int | None:
    """Number of the layer in a path or in the name of a module; None outside layers."""
    match = NUMBER.search(name)
    return None if match is None else int(match[1])
