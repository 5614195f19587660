"""Streams that ranks share: each of n ranks computes about 1/n of what one process computes, the head and attention included."""

from dataclasses import replace

import pytest
import torch

from treetune.core import param, tree
from treetune.models import MODELS, decoder_attention, dense, families, llama
from treetune.models.census import Census
from treetune.ops import context_parallel
from treetune.ops.tensor_parallel import Split

TOKENS = 128


def flops(cfg: llama.Config) -> float:
    """Of a forward and a backward pass over one document with every token scored."""
    weights = tree.map(lambda leaf: leaf.requires_grad_(), param.init(MODELS["llama"].abstract(cfg), seed=1))
    batch = dense.single(torch.arange(TOKENS) % 50)
    batch |= {"at": torch.arange(TOKENS - 1), "targets": batch["tokens"][1:], "seq": torch.zeros(TOKENS - 1, dtype=torch.int64)}
    plan = decoder_attention.plan(batch, cfg)
    with Census() as seen:
        families.logprobs("llama", cfg, weights, batch, plan).logp.sum().backward()
    return seen.total.flops


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_computes_its_share(monkeypatch, ranks):
    monkeypatch.setattr(context_parallel, "_all_gather", lambda whole, own, group: whole.copy_(torch.cat([own] * ranks)))
    monkeypatch.setattr(context_parallel, "_reduce_scatter", lambda rows, whole, group: rows.copy_(whole[: len(rows)]))
    # The head is half of it.
    cfg = llama.Config(vocab_size=400, hidden_size=16, mlp_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, tied=False)
    alone = flops(cfg)
    every = [flops(replace(cfg, context=Split(None, rank, ranks))) for rank in range(ranks)]
    # On a CPU a chunk that is no start of a document computes hidden pairs, too.
    assert max(every) <= 1.1 * alone / ranks and min(every) > 0.9 * alone / ranks, (alone, every)
