"""What tells one way of training from another. Importing this imports no torch."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Method(NamedTuple):
    """A training command.

    help: its line in `treetune --help`. rates: peak learning rate with an adapter and without. data: kind of rows that it reads.
    parts(config, policy, setting) -> its objectives, state and streams for one model (`parts.Parts`).
    shown: metrics worth a place on the screen. unit: what the loss is a mean over. head: whether a head of scores trains with the model.
    perplexity: whether the loss is a mean of -log p. goal: metric of evaluations that the best checkpoint follows; one named loss falls.
    conflicts(config) raises BadInput for options that contradict each other. unused(config) -> {option: why the run would not look at
    it}, beyond what the fields say. variant(config) -> fields of this record that the options change. complete(config) -> the config with
    values for what depends on other options and was left open.
    """

    name: str
    help: str
    config: type
    rates: tuple[float, float]
    data: str
    parts: Callable[[Any, Any, Any], Any]
    shown: tuple[str, ...] = ()
    unit: str = "pairs"
    head: bool = False
    perplexity: bool = False
    goal: str = "loss"
    conflicts: Callable[[Any], None] = lambda config: None
    unused: Callable[[Any], dict[str, str]] = lambda config: {}
    variant: Callable[[Any], dict[str, Any]] = lambda config: {}
    complete: Callable[[Any], Any] = lambda config: config


def resolve(method: Method, config: Any) -> Method:
    """The method as these options make it."""
    return method._replace(**method.variant(config))
