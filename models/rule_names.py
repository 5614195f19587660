"""Rules of learning rates and decays over what trains, by our paths, or by what transformers and PEFT call the same weights."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from treetune.core import lora, tree
from treetune.models import adapter_parameters, hf, resize
from treetune.models.policy import Policy

PAIR = {"A": "lora_A.weight", "B": "lora_B.weight", "M": lora.PEFT_MAGNITUDE}
LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


class Names(NamedTuple):
    """What trains in one model, by path, and what transformers and PEFT call each."""

    known: dict[str, tuple[str, ...]]

    def over_paths(self, rules: Sequence[tuple[str, float]], option: str) -> list[tuple[str, float]]:
        """The rules with those that match no path, but names, as expressions over the paths of these.

        A name is that of a weight, `model.layers.0.self_attn.q_proj.weight`, or of the pair on it, `...q_proj.lora_A.weight`.
        Errors: ValueError for a rule that matches neither.
        """
        return [(_over_paths(regex, self.known, option), value) for regex, value in rules]

    def vocabulary(self) -> str:
        """A regular expression of what trains of the embedding and the head. Errors: ValueError where nothing of them does."""
        paths = [path for path in self.known if _weight(path).partition(".")[0] in resize.LEAVES]
        if not paths:
            raise ValueError(
                "embedding_lr is the learning rate of the embedding and the head, and neither trains: train all weights with adapter none, "
                f"or these with --lora-modules-to-save {' '.join(resize.LEAVES)}"
            )
        return exactly(paths)


def of(policy: Policy) -> Names:
    """The names of what trains in a policy."""
    return Names({path: _names(policy.family, path) for path, _ in tree.items(policy.params)})


def _over_paths(regex: str, names: dict[str, tuple[str, ...]], option: str) -> str:
    if any(re.search(regex, path) for path in names):
        return regex
    if paths := [path for path, known in names.items() if any(re.search(regex, name) for name in known)]:
        return exactly(paths)
    every = dict.fromkeys([*names, *(name for known in names.values() for name in known)])
    raise ValueError(f"{option}: {regex!r} matches no parameter that trains; the nearest are {', '.join(tree.nearest(regex, every))}")


def _weight(path: str) -> str:
    """The path in the model of a path of what trains: of a pair, that of the weight below it."""
    kind, _, rest = path.partition(".")
    return rest.rpartition(".")[0] if kind == "lora" else rest


def _names(family: str, path: str) -> tuple[str, ...]:
    """What transformers and PEFT call a leaf that trains; nothing for a head of scores."""
    kind, weight = path.partition(".")[0], _weight(path)
    if kind not in ("model", "lora"):
        return ()
    key = hf.hf_key(family, weight)
    part = PAIR.get(path.rpartition(".")[2])
    return (key,) if kind == "model" or part is None else (key, f"{adapter_parameters.target(family, weight)}.{part}")


def exactly(paths: Iterable[str]) -> str:
    """A regular expression of these paths and no other, with one alternative for all layers."""
    numbers: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        match = LAYER.search(path)
        before, number, after = (path, "", "") if match is None else (path[: match.start()], match[0], path[match.end() :])
        numbers.setdefault((before, after), []).append(number)
    forms = [f"{re.escape(before)}(?:{'|'.join(layers)}){re.escape(after)}" for (before, after), layers in numbers.items()]
    return f"^(?:{'|'.join(forms)})$"
