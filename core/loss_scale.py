"""Loss scaling for float16: gradients that would round to 0 are computed of a loss times s, and divided by s before they are used.

s falls by half where a gradient overflows, whose update is skipped, and doubles after `interval` steps without one. It is a part of the
optimiser's state, so that checkpoints hold it. Source: Micikevicius et al., arXiv 1710.03740, section 3.2.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from treetune.core import tree
from treetune.core.optim import Optimizer
from treetune.core.state import OptState, Params

KEY = "loss_scale"


class Pace(NamedTuple):
    """Where s begins, and how many steps without an overflow double it."""

    start: float = 2.0**16
    interval: int = 2000


PACE = Pace()


def scaled(optimizer: Optimizer, pace: Pace = PACE) -> Optimizer:
    """The optimiser with s and the steps since it last changed in its state."""

    def init(params: Params) -> OptState:
        device = tree.leaves(params)[0].device
        own = {"value": torch.tensor(pace.start, device=device), "steps": torch.zeros((), device=device)}
        return optimizer.init(params) | {KEY: own}

    @torch.no_grad()
    def update(grads: Params, state: OptState, params: Params, lr: Tensor, found_inf: Tensor | None = None) -> tuple[Params, OptState]:
        own, inner = state[KEY], {name: part for name, part in state.items() if name != KEY}
        params, inner = optimizer.update(grads, inner, params, lr, found_inf)
        bad = torch.zeros_like(own["steps"]) if found_inf is None else found_inf
        steps = (own["steps"] + 1) * (1 - bad)
        factor = torch.where(bad > 0, 0.5, torch.where(steps >= pace.interval, 2.0, 1.0))
        own["value"].mul_(factor)
        own["steps"].copy_(torch.where(factor == 2.0, 0.0, steps))
        return params, inner | {KEY: own}

    return optimizer._replace(init=init, update=update)


def of(state: OptState) -> Tensor | None:
    """s, 0-d; None without scaling."""
    return state[KEY]["value"] if KEY in state else None
