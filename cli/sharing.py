"""What one rank decides and all must know."""

from collections.abc import Callable
from typing import Any

import torch

from treetune.cli import setup
from treetune.cli.errors import BadInput


def share(ranks: setup.Ranks, take: Callable[[], Any]) -> Any:
    """What `take` returns on the first rank, on all ranks. Raises ValueError on all of them where it cannot."""
    if ranks.world == 1:
        return take()
    found: list = [None, None]
    if ranks.rank == 0:
        try:
            found = [take(), None]
        except (ValueError, OSError, BadInput) as error:
            found = [None, str(error)]
    torch.distributed.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise ValueError(found[1])
    return found[0]
