"""Gradients under every policy of rematerialisation and offload: those of a pass that keeps all, to the bit."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from treetune.core import tree
from treetune.core.quant import Scheme
from treetune.models import hf
from treetune.ops import kept

POLICIES = ("full", "selective", "none+cpu", "none+disk", "full+cpu", "full+disk", "selective+cpu", "selective+disk")
NATIVE, BRIDGED = ("llama", "gemma2", "qwen3_moe", "gpt_oss"), ("glm4", "deepseek_v3", "qwen3_5_text")

FAST = (("llama", "lora"), ("qwen3_moe", "lora"), ("deepseek_v3", "lora"), ("qwen3_5_text", "lora"), ("gemma2", "full"), ("glm4", "full"),
        ("llama", "nf4"), ("gpt_oss", "nf4"), ("glm4", "nf4"), ("llama", "dora"))  # fmt: skip
CASES = [*itertools.product((*NATIVE, *BRIDGED), ("lora", "full", "nf4")), ("llama", "dora"), ("glm4", "dora")]


@pytest.mark.parametrize(("family", "kind"), [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in CASES])
def test_no_policy_changes_a_bit(family, kind, folder, passes):
    model, batch = hf.load(folder(family), scheme=Scheme("nf4") if kind == "nf4" else None), passes.stream()
    value, expected = passes.gradient(model, kind, None, batch)
    for policy in POLICIES:
        other, grads = passes.gradient(model, kind, policy, batch)
        assert torch.equal(value, other), policy
        for (path, a), (_, b) in zip(tree.items(expected), tree.items(grads), strict=True):
            assert torch.equal(a, b), (policy, path)
    assert any(leaf.any() for leaf in tree.leaves(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selective_makes_no_product_and_no_attention_again(dtype, folder, passes):
    """A backward pass runs the products of gradients only; a full one runs those of the layers once more."""
    model = hf.load(folder("llama"), dtype=dtype)
    counts = {policy: products(passes, model, policy) for policy in (None, "full", "selective")}
    assert counts["selective"] == counts[None] < counts["full"]


class Counted(TorchDispatchMode):
    """Counts the products and the attentions that run."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name in kept.NAMES
        return func(*args, **(kwargs or {}))


def products(passes, model, policy):
    """The number of products and of attentions of a forward and a backward pass."""
    with Counted() as mode:
        passes.gradient(model, "lora", policy, passes.stream())
    return mode.count
