"""An adapter folded into its model, and how far that moves what the model computes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treetune.core import lora, tree
from treetune.core.lora import Lora
from treetune.core.state import Params
from treetune.models import MODELS, Model, dense, heads
from treetune.models.dense import Config

PROBE = (
    "A farmer has 17 sheep and buys 25 more. How many sheep are there now? 17 + 25 = 42.\n"
    "def area(width, height):\n    return width * height\n"
    "The quick brown fox jumps over the lazy dog, and nobody asks why."
)


class Difference(NamedTuple):
    """How far two sets of logits are apart: largest and mean absolute difference, and mean KL (nats)."""

    largest: float
    mean: float
    kl: float


class Merged(NamedTuple):
    """A model with an adapter folded in, and how its outputs on the probe differ from those of the model with the adapter."""

    model: Model
    difference: Difference
    probe_tokens: int


def compare(logits: Tensor, other: Tensor) -> Difference:
    """Differences of logits [T, V] against logits [T, V]."""
    gap, logp, logq = (logits - other).abs(), logits.log_softmax(-1), other.log_softmax(-1)
    return Difference(gap.max().item(), gap.mean().item(), (logp.exp() * (logp - logq)).sum(-1).mean().item())


@torch.no_grad()
def merge(model: Model, adapter: Lora, tokenizer: Callable[..., Any], *, dtype: torch.dtype, head: Params | None = None) -> Merged:
    """The model with the adapter folded into leaves of `dtype`, compared on the probe text. head: of a reward model, whose scores count."""
    folded = lora.merge(model.params, adapter.tree, adapter.scale)
    merged = model._replace(params=tree.map(lambda leaf: leaf.to(dtype), folded))
    ids = _probe_ids(tokenizer, model.cfg)
    upcast = merged._replace(params=tree.map(lambda leaf: leaf.float(), merged.params))
    difference = compare(_outputs(model, ids, head, adapter), _outputs(upcast, ids, head))
    return Merged(merged, difference, len(ids))


def _probe_ids(tokenizer: Callable[..., Any], cfg: Config) -> Tensor:
    """Token ids of the probe text, and every 997th id of the vocabulary after it."""
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"] + list(range(0, cfg.vocab_size, 997))
    return torch.tensor(ids[: cfg.max_positions])


def _outputs(model: Model, ids: Tensor, head: Params | None, adapter: Lora | None = None) -> Tensor:
    """Logits [T, V] at each token of the probe, or with a head its scores [T, C]."""
    if head is None:
        return dense.map_logits(dense.probe(model.params, ids, model.cfg, lora=adapter), MODELS[model.family].logit_map(model.cfg))
    batch = dense.single(ids) | {"at": torch.arange(len(ids))}
    return heads.scores(model.family, model.cfg, model.params, head, batch, lora=adapter)
