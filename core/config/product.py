"""Lists given to flags as the product of runs: `--learning-rate 1e-4 2e-4 --lora-r 8 16 --sweep` is four. Imports no torch."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from treetune.core.config.table import Option

FLAG = "sweep"
PLACES = ("output_dir", "resume", "overwrite", "config")  # of the whole sweep, or of none
MOST = 1000  # runs of a sweep
SWITCHES = {"true": "--{}", "false": "--no-{}"}


class Axis(NamedTuple):
    """An option with several values: each as it is shown, and as the arguments that give it."""

    option: str
    values: dict[str, list[str]]


class Product(NamedTuple):
    """The arguments that all runs share, and the options that differ."""

    shared: list[str]
    axes: list[Axis]

    def points(self) -> Iterator[tuple[dict[str, str], list[str]]]:
        """(option -> value, arguments) of each run; the last option changes first."""
        for values in itertools.product(*(axis.values.items() for axis in self.axes)):
            chosen = {axis.option: text for axis, (text, _) in zip(self.axes, values, strict=True)}
            yield chosen, [*self.shared, *itertools.chain.from_iterable(args for _, args in values)]


def asked(argv: Sequence[str]) -> bool:
    """Whether the arguments ask for a sweep."""
    return f"--{FLAG}" in argv


def read(argv: Sequence[str], options: Mapping[str, Option]) -> Product:
    """The product that the arguments of a training command ask for.

    An option that takes a list by itself has its values in brackets: `--lora-target-modules [q_proj,v_proj] [all-linear]`.
    Errors: ValueError where no option has several values, one has the same twice, or it is not clear which values belong together.
    """
    shared, axes = [], []
    for flag, texts, words in _groups(argv):
        name = flag[2:].replace("-", "_")
        if name == FLAG:
            continue
        values = _values(flag, texts, options.get(name))
        if len(values) > 1:
            axes.append(_axis(name, flag, values))
        else:
            shared += values[0][1] if values and texts else words
    if not axes:
        raise ValueError("--sweep needs an option with several values, such as --learning-rate 1e-4 2e-4")
    product = Product(shared, axes)
    count = 1
    for axis in axes:
        count *= len(axis.values)
    if count > MOST:
        raise ValueError(f"--sweep would start {count} runs, and at most {MOST} are one sweep: give fewer values")
    return product


def _groups(argv: Sequence[str]) -> list[tuple[str, list[str], list[str]]]:
    """(flag, what stands behind it, all its words) of the arguments."""
    groups: list[tuple[str, list[str], list[str]]] = []
    for arg in argv:
        if arg.startswith("--"):
            flag, equals, text = arg.partition("=")
            groups.append((flag, [text] if equals else [], [arg]))
        elif groups:
            groups[-1][1].append(arg)
            groups[-1][2].append(arg)
        else:
            groups.append(("", [], [arg]))
    return groups


def _values(flag: str, texts: list[str], option: Option | None) -> list[tuple[str, list[str]]]:
    """(text, arguments) of each value behind a flag."""
    if option is not None and option.many:
        return _lists(flag, texts)
    if option is not None and option.kind is bool:
        if wrong := [text for text in texts if text.lower() not in SWITCHES]:
            raise ValueError(f"{flag} has the value {wrong[0]!r} in a sweep; expected true or false")
        return [(text.lower(), [SWITCHES[text.lower()].format(flag[2:])]) for text in texts]
    return [(text, [f"{flag}={text}"]) for text in texts]


def _lists(flag: str, texts: list[str]) -> list[tuple[str, list[str]]]:
    """The values of an option that takes lists, each in brackets; a single text needs none."""
    bracketed = [text.startswith("[") and text.endswith("]") for text in texts]
    if all(bracketed):
        lists = [[part.strip() for part in text[1:-1].split(",") if part.strip()] for text in texts]
        return [(" ".join(parts), [flag, *parts]) for parts in lists]
    if len(texts) > 1:
        whole, apart = ",".join(texts), " ".join(f"'[{text}]'" for text in texts)
        ways = f"write {flag} '[{whole}]' for one list, or {flag} {apart} for several"
        raise ValueError(f"{flag} takes a list itself: with --sweep {ways}")
    return [(texts[0], [flag, *texts])] if texts else []


def _axis(name: str, flag: str, values: list[tuple[str, list[str]]]) -> Axis:
    if name in PLACES:
        raise ValueError(f"{flag} is one for a whole sweep, got {len(values)}")
    texts = [text for text, _ in values]
    if twice := [text for text in texts if texts.count(text) > 1]:
        raise ValueError(f"{flag} has {twice[0]!r} twice: each value of a sweep is another run")
    return Axis(name, dict(values))
