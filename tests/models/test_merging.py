"""Merging: the difference is that of the logits, and the probe covers the vocabulary."""

import math

import pytest
import torch

from treetune.core import lora, tree
from treetune.models import hf, merging


def test_difference_is_that_of_the_logits():
    logits = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    other = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    found = merging.compare(logits, other)
    kl = 0.5 * (math.log(0.5) - math.log(1 / (1 + math.e))) + 0.5 * (math.log(0.5) - math.log(math.e / (1 + math.e)))
    assert found.largest == 1 and found.mean == 0.25 and found.kl == pytest.approx(kl / 2, abs=1e-6)
    assert merging.compare(other, other) == (0, 0, 0)


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_model_computes_what_model_and_adapter_do(oracle, tied):
    model = hf.load(oracle("llama", tied)[1])
    sizes = hf.abstract_of(model)
    pairs = lora.init(sizes, lora.linears(sizes), rank=2, seed=0)
    generator = torch.Generator().manual_seed(1)
    pairs = tree.map(lambda leaf: leaf + 0.1 * torch.randn(leaf.shape, generator=generator), pairs)
    merged = merging.merge(model, lora.Lora(pairs, 2.0), lambda text, **_: {"input_ids": [5, 6, 7]}, dtype=torch.float32)
    assert merged.probe_tokens == 4, "the text, and every 997th id"
    assert 0 < merged.difference.largest < 1e-4
    low = merging.merge(model, lora.Lora(pairs, 2.0), lambda text, **_: {"input_ids": [5]}, dtype=torch.bfloat16)
    assert low.model.params["norm"].dtype == torch.bfloat16 and low.difference.largest > merged.difference.largest
