"""Stochastic rounding of weights that are kept in bfloat16: up or down at random, so that the mean of what is kept is the number itself.

Rounding to the nearest would lose an update that is smaller than half the distance of two bfloat16 numbers, 1/512 of a weight, whole and at
every step. The random numbers are a function of seed, update, leaf and place in the whole leaf, so that they are the same on every mesh,
and after a checkpoint, which holds seed and update as a part of the optimiser's state.
Source: Gupta et al., arXiv 1502.02551, section 3; of bfloat16 weights Zamirai et al., arXiv 2010.06192, section 3.1.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from treetune.core import param, shard, tree
from treetune.core.optimizer import Optimizer
from treetune.core.state import OptState, Params

KEY = "rounding"
CHUNK = 2**22  # numbers of a leaf whose random numbers are there at once


class Draw(NamedTuple):
    """What the random numbers of an update are made of: the seed and the number of the update, 0-d int64."""

    seed: Tensor
    update: Tensor


def stochastic(optimizer: Optimizer, seed: int) -> Optimizer:
    """The optimiser with seed and count of updates in its state, by which `into` rounds.

    Errors: ValueError for an optimiser of the user's that writes weights by itself.
    """
    if not optimizer.rounds:
        raise ValueError(
            "this optimizer writes weights by itself, and would round to the nearest: make it with optim.stepwise or optim.leafwise"
        )

    def init(params: Params) -> OptState:
        device = tree.leaves(params)[0].device
        own = Draw(*(torch.tensor(value, dtype=torch.int64, device=device) for value in (seed, 0)))
        return optimizer.init(params) | {KEY: own._asdict()}

    @torch.no_grad()
    def update(grads: Params, state: OptState, params: Params, lr: Tensor, found_inf: Tensor | None = None) -> tuple[Params, OptState]:
        params, moved = optimizer.update(grads, state, params, lr, found_inf)
        state[KEY]["update"].add_(1)
        return params, moved | {KEY: state[KEY]}

    return optimizer._replace(init=init, update=update)


def of(state: OptState) -> Draw | None:
    """What an update draws from; None where weights are rounded to the nearest."""
    return Draw(**state[KEY]) if KEY in state else None


def wide(leaf: Tensor) -> Tensor:
    """The numbers of a leaf that an update computes with: float32 for one in 16 bits."""
    return leaf.float() if leaf.itemsize < 4 else leaf


def into(path: str, leaf: Tensor, numbers: Tensor, draw: Draw | None) -> Tensor:
    """Numbers in the dtype of the leaf that they are for, of which they are this rank's part: bfloat16 stochastically with a draw."""
    if draw is None or leaf.dtype != torch.bfloat16:
        return numbers.to(leaf.dtype)
    from treetune.ops import noise

    key = noise.keys(draw.seed, param.seed_of(path), draw.update)
    table = numbers.reshape(-1, numbers.shape[-1]) if numbers.ndim else numbers.reshape(1, 1)
    rows, first = _rows(leaf, numbers), shard.first_places(leaf)[-1] if numbers.ndim else 0
    step, rounded = max(1, CHUNK // max(1, table.shape[1])), torch.empty_like(table, dtype=leaf.dtype)
    for at in range(0, table.shape[0], step):
        piece = slice(at, at + step)
        words = noise.words(noise.keys(key, rows[piece]), table.shape[1], first=first)
        rounded[piece] = rounded_by(table[piece].float(), words)
    return rounded.view(numbers.shape)


def rounded_by(numbers: Tensor, words: Tensor) -> Tensor:
    """bfloat16: float32 numbers whose lower 16 bits, with a word in [0, 65536) added to them, carry into the upper 16."""
    carried = ((numbers.view(torch.int32) + words) & -65536).view(torch.float32)
    return torch.where(torch.isfinite(numbers), carried, numbers).to(torch.bfloat16)


def _rows(leaf: Tensor, own: Tensor) -> Tensor:
    """Of each row of this rank's part, its number in the whole leaf."""
    rows = torch.zeros(1, dtype=torch.int64, device=own.device)
    for size, here, first in zip(leaf.shape[:-1], own.shape[:-1], shard.first_places(leaf), strict=False):
        rows = (rows[:, None] * size + torch.arange(first, first + here, device=own.device)).view(-1)
    return rows
