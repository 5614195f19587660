"""Forward and backward passes of a small model, with an adapter away from its start or without one."""

import torch

from treetune.core import grad, lora, shard, tree
from treetune.core.lora import Lora
from treetune.models import families, hf
from treetune.ops import noise


def stream():
    """Two documents, all tokens but the first of each read."""
    lens = torch.tensor([29, 16])
    tokens = torch.randint(0, 60, (45,), generator=torch.Generator().manual_seed(1))
    at = torch.tensor([*range(28), *range(29, 44)])
    return {
        "tokens": tokens, "positions": torch.cat([torch.arange(29), torch.arange(16)]), "at": at, "targets": tokens[at + 1],
        "cu_docs": torch.nn.functional.pad(lens.cumsum(0), (1, 0)).int(), "seq": torch.tensor([0] * 28 + [1] * 15),
        "seq_lens": torch.tensor([28, 15]), "doc_of_seq": torch.tensor([0, 1]), "row": torch.tensor([0, 1]),
    }  # fmt: skip


def adapted(model, dropout):
    """An adapter on all linear layers, away from its start."""
    sizes = hf.abstract_of(model)
    fresh = lora.init(sizes, lora.match(sizes, "all-linear"), rank=2, seed=3)
    keys = noise.keys(torch.tensor(5), torch.arange(4096))
    moved = tree.map(lambda leaf: leaf + 0.05 * (noise.uniform(keys[: leaf.shape[0]], leaf.shape[1]) - 0.5), fresh)
    return Lora(moved, 1.5, dropout, torch.tensor(7))


def lengthened(low, model):
    """The adapter as DoRA's: with magnitudes near the norms of the rows."""
    weights, items = dict(tree.items(model.params)), list(tree.items(low.tree))
    lengths = [(f"{path}.M", 1.1 * shard.gather(weights[path], torch.float32).norm(dim=1)) for path in lora.pairs(low.tree)]
    return low._replace(tree=tree.from_items(items + lengths))


def gradient(model, kind, remat, batch):
    """Loss and gradient in what trains: an adapter, or all weights."""
    low = adapted(model, 0.25) if kind != "full" else None
    low = lengthened(low, model) if kind == "dora" else low
    still = [path for path, leaf in tree.items(hf.abstract_of(model)) if not leaf.trains]
    frozen = tree.from_items([(path, leaf) for path, leaf in tree.items(model.params) if path in still])
    trained = tree.from_items([(path, leaf) for path, leaf in tree.items(model.params) if path not in still])

    def loss(params):
        adapter = None if low is None else low._replace(tree=params)
        weights = model.params if low is not None else tree.merge(frozen, params)
        stats = families.logprobs(model.family, model.cfg, weights, batch, lora=adapter, remat=remat)
        return -stats.logp.sum(), None

    (value, _), grads = grad.value_and_grad(loss)(trained if low is None else low.tree)
    return value, grads
