"""The matrix products of a run: those of the checkpoint to go on from, else those of the machine."""

from collections.abc import Callable
from pathlib import Path

import torch

from treetune.core import ckpt
from treetune.models import products
from treetune.models.products import record as record
from treetune.ops import product


def settle(
    resume: Path | None,
    dtype: torch.dtype,
    on: torch.device,
    *,
    share: products.Share | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """`models.products.settle` with what a checkpoint recorded; one without a record was computed with the default."""
    recorded = None if resume is None else ckpt.read_meta(resume).get(products.KEY, product.Choice()._asdict())
    products.settle(dtype, on, recorded=recorded, source="" if resume is None else resume.name, share=share, say=say)
