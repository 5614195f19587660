"""A run that is being put together: what every part of the assembly may ask for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from treetune.cli.methods.method import Method
from treetune.core.run import loop
from treetune.core.run.folder import RunDir
from treetune.core.run.observers import Observers
from treetune.core.run.ranks import Ranks
from treetune.core.run.source import Source
from treetune.core.state import TrainState


class Run(NamedTuple):
    """The config of a run and where it takes place. options: the names of those that the user set."""

    config: Any
    method: Method
    options: frozenset[str]
    device: torch.device
    ranks: Ranks
    observers: Observers
    folder: RunDir

    def say(self, text: str) -> None:
        """Tell the observers a line."""
        self.observers.message(text)


class Supply(NamedTuple):
    """Where a run gets its micro-batches and how it is evaluated.

    documents: fingerprints of what is read; digest: the one of earlier versions. after_step: what the sampler does after each step.
    start(state): what happens before the first step. described: rows for the table at the start of a run. functions, reward_models: names
    of files and fingerprints of weights that decide what is sampled and rewarded.
    """

    source: Source
    evaluate: loop.Evaluate | None
    documents: dict[str, str] = {}
    digest: str = ""
    after_step: Callable[[TrainState, dict, int], TrainState] | None = None
    start: Callable[[TrainState], None] = lambda state: None
    described: Mapping[str, str] = {}
    functions: Sequence[str | None] = ()
    reward_models: Mapping[str, str] = {}
