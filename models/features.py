"""Hidden states of a frozen network at chosen depths, for losses that compare texts by their features.

T tokens of a stream, N rows of it, H hidden size. Layer 0 is the embeddings, k the output of block k; the last is taken after the
last norm, as where a model reads its logits. Blocks above the deepest layer are not run.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from treetune.core.param import Params
from treetune.models import MODELS
from treetune.models.dense import Config
from treetune.ops import attention


@torch.no_grad()
def hidden(
    family: str, cfg: Config, weights: Params, batch: dict, plan: attention.Plan, at: Tensor, *, layers: Sequence[int]
) -> list[Tensor]:
    """One [N, H] for each of `layers`, in the dtype of the model: its hidden states at the rows `at` [N] of the stream, branches included.

    Raises ValueError for layers that the model has not.
    """
    if not layers or not all(0 <= layer <= cfg.num_layers for layer in layers):
        raise ValueError(f"layers {list(layers)}: expected at least one, from 0 to {cfg.num_layers}")
    short = weights | {"layers": weights["layers"][: max(layers)]}
    out = MODELS[family].forward(short, batch, plan, cfg, collect=[layer for layer in layers if layer < cfg.num_layers])
    states = out.features | {cfg.num_layers: out.hidden}
    return [states[layer][at] for layer in layers]
