"""What code may ask of the config of a training command, whatever the method. Importing this imports no torch."""

from typing import Any, Protocol

from treetune.cli.options.model import AdapterOptions, ModelOptions, VocabularyOptions
from treetune.cli.options.optim import OptimOptions
from treetune.cli.options.pipeline import CorrectionOptions, EngineOptions, PipelineOptions
from treetune.cli.options.policy_loss import PolicyLoss
from treetune.cli.options.reference import RlReference
from treetune.cli.options.rollout import RolloutOptions
from treetune.cli.options.run import RunOptions


class TrainConfig(Protocol):
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


class OnlineConfig(TrainConfig, Protocol):
    """The groups of a command that learns from completions it samples."""

    @property
    def adapter(self) -> AdapterOptions:
        """The adapter that trains, or none."""
        ...

    @property
    def rollout(self) -> RolloutOptions:
        """How completions are sampled."""
        ...

    @property
    def loss(self) -> PolicyLoss:
        """The policy loss."""
        ...

    @property
    def correction(self) -> CorrectionOptions:
        """Weights of samples from another policy."""
        ...

    @property
    def pipeline(self) -> PipelineOptions:
        """How generations are made."""
        ...

    @property
    def engine(self) -> EngineOptions:
        """Who samples."""
        ...

    @property
    def reference(self) -> RlReference:
        """The reference of the divergence."""
        ...
