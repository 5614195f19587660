"""DoRA: rows of an adapted weight are turned by the adapter and scaled by a trained magnitude, W' = m (W + s B A) / |W + s B A|.

T tokens, I inputs, O outputs, r rank, n [O] the norms of the rows of W + s B A, which take no gradient. Moved per call: one read of W, and
one read-modify-write of y [T, O].
Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, eq. 5 and section 4.3.
"""

import torch
from torch import Tensor

from treetune.ops import product
from treetune.ops.tensor_parallel import Split, leave

TRAINED, SETTLED = "M", "G"  # leaves of an adapter beside A and B: m, or m / n once it is known


@torch.no_grad()
def split_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float, split: Split | None) -> Tensor:
    """`norms` of rows whose columns are split among ranks, each with those of W [O, i] and A [r, i]."""
    return leave(split, norms(weight, a, b, scale).square()).sqrt() if split is not None else norms(weight, a, b, scale)


@torch.no_grad()
def norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """n [O] of W [O, I], A [r, I], B [O, r], in the dtype of A (float32, float64)."""
    return torch.addmm(weight.to(a.dtype), b, a, alpha=scale).norm(dim=1)


def excess(weight: Tensor, adapter: dict, scale: float) -> Tensor:
    """m / n - 1 [O], whose gradient is that of m: small numbers, of which no dtype loses anything."""
    if SETTLED in adapter:
        return adapter[SETTLED] - 1
    return adapter[TRAINED] / norms(weight, adapter["A"], adapter["B"], scale) - 1


def has(adapter: dict) -> bool:
    """Whether an adapter has magnitudes."""
    return TRAINED in adapter or SETTLED in adapter


def rescaled(y: Tensor, weight: Tensor, adapter: dict, *, scale: float, moved: Tensor | None = None) -> Tensor:
    """y + (m / n - 1) (y + d W^T) [T, O] for y = x W^T + s (u A^T) B^T, where d [T, I] = u - x is what dropout does to x.

    Without dropout it is (m / n) y. As in PEFT a dropped input counts for what the magnitude adds, and not for x W^T itself.
    """
    more = excess(weight, adapter, scale).to(y.dtype)
    return torch.addcmul(y, y if moved is None else y + product.linear(moved, weight), more)
