"""What an optimiser is: a pair of functions over trees of parameters."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from treetune.core.state import OptState, Params, TrainState


class Update(Protocol):
    """Update of params and state from gradients, in place: both inputs are consumed."""

    def __call__(
        self, grads: Params, state: OptState, params: Params, lr: Tensor, found_inf: Tensor | None = None
    ) -> tuple[Params, OptState]:
        """New params and state; as they were where found_inf (0-d) is 1."""
        ...


class Optimizer(NamedTuple):
    """init(params) -> state; update as in the module docstring.

    averaged(params, state) -> the weights that are evaluated, sampled from and saved, where these are not those that train.
    rounds: whether weights of 16 bits are updated in float32, and rounded as `rounding` says.
    """

    init: Callable[[Params], OptState]
    update: Update
    averaged: Callable[[Params, OptState], Params] | None = None
    rounds: bool = False

    def shown(self, state: TrainState) -> TrainState:
        """The state with the weights that are evaluated and saved; itself where they are those that train."""
        return state if self.averaged is None else state._replace(params=self.averaged(state.params, state.opt))
