"""A run that is being put together: what every part of the assembly may ask for."""

from typing import Any, NamedTuple

import torch

from treetune.cli.methods.method import Method
from treetune.core.run.folder import RunDir
from treetune.core.run.observers import Observers
from treetune.core.run.ranks import Ranks


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
