"""Optimiser states in the memory of the host: pinned, and on the device for one leaf at a time; of leaves in parts each rank's part.

On a CPU, whose memory is that of the host, nothing is copied: the numbers are those of the same optimiser without pages.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from treetune.core import shard, tree
from treetune.core.state import OptState, Params


def home(state: OptState) -> OptState:
    """The state in pinned memory of the host, of a leaf in parts this rank's; counts (0-d) stay."""
    return tree.map(lambda leaf: leaf if leaf.ndim == 0 or leaf.device.type == "cpu" else shard.like(_pinned, leaf), state)


def _pinned(state: Tensor) -> Tensor:
    return state.cpu().pin_memory()


@contextlib.contextmanager
def fetched(states: list[Tensor], device: torch.device) -> Iterator[list[Tensor]]:
    """The states of a leaf on its device, to be changed in place; what is not there is copied to it, and back at the end."""
    here = [_copy(state, device) for state in states]
    yield here
    for state, copy in zip(states, here, strict=True):
        if copy is not state:
            state.copy_(copy, non_blocking=True)


def _copy(state: Tensor, device: torch.device) -> Tensor:
    return state.to(device, non_blocking=True)


def settle(params: Params) -> None:
    """Wait for the copies to the host: a checkpoint reads its memory without asking the device."""
    for device in {leaf.device for leaf in tree.leaves(params) if leaf.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()
