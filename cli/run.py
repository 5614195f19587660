"""A run that is being put together: what every part of the assembly may ask for."""

from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch

from treetune.cli.methods.method import Method
from treetune.cli.options.model import AdapterOptions, ModelOptions, VocabularyOptions
from treetune.cli.options.optim import OptimOptions
from treetune.cli.options.run import RunOptions
from treetune.core.config.table import Config
from treetune.core.run.folder import RunDir
from treetune.core.run.observers import Observers
from treetune.core.run.ranks import Ranks


class TrainConfig(Config, Protocol):
    """The groups that every training command has."""

    @property
    def model(self) -> ModelOptions:
        """The model to start from."""
        ...

    @property
    def data(self) -> Any:
        """The rows, in the form of the method."""
        ...

    @property
    def vocabulary(self) -> VocabularyOptions:
        """Tokens to add."""
        ...

    @property
    def optim(self) -> OptimOptions:
        """The optimiser and the length of the run."""
        ...

    @property
    def run(self) -> RunOptions:
        """The run folder, evaluations and checkpoints."""
        ...


C = TypeVar("C", bound=TrainConfig, covariant=True)


class Run(NamedTuple, Generic[C]):
    """The config of a run and where it takes place. options: the names of those that the user set."""

    config: C
    method: Method
    options: frozenset[str]
    device: torch.device
    ranks: Ranks
    observers: Observers
    folder: RunDir

    @property
    def adapter(self) -> AdapterOptions | None:
        """The adapter that trains; None where the model itself does."""
        options = getattr(self.config, "adapter", None)
        return options if options is not None and options.adapter == "lora" else None

    @property
    def start(self) -> str | None:
        """The adapter that the run starts from."""
        return None if self.adapter is None else self.adapter.lora_model_dir

    @property
    def peak(self) -> float:
        """The peak learning rate."""
        return self.config.optim.learning_rate or self.rate

    @property
    def rate(self) -> float:
        """The peak learning rate of the method, where none is given."""
        return self.method.rates[self.adapter is None]

    def say(self, text: str) -> None:
        """Tell the observers a line."""
        self.observers.message(text)


TrainRun = Run[TrainConfig]
