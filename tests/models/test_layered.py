"""Merging layer by layer holds a few layers, not the model."""

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from treetune.core import lora, tree
from treetune.models import adapter, hf, layered, loading, merging
from treetune.models.dense import Config
from treetune.models.target import Target

SIZES: dict[str, Any] = dict(
    vocab_size=64, hidden_size=64, mlp_size=256, num_layers=12, num_heads=4, num_kv_heads=4, head_dim=16, norm_eps=1e-6, rope_theta=1e4,
    max_positions=64, tied=True,
)  # fmt: skip


class Peak(TorchDispatchMode):
    """The most bytes that storages made inside hold at a time."""

    def __init__(self):
        super().__init__()
        self.live, self.most, self.seen = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in out if isinstance(out, tuple | list) else [out]:
            if isinstance(leaf, torch.Tensor):
                self.add(leaf.untyped_storage())
        return out

    def add(self, storage):
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self.seen or not size:
            return
        self.seen[place], self.live = weakref.finalize(storage, self.drop, place, size), self.live + size
        self.most = max(self.most, self.live)

    def drop(self, place, size):
        self.live -= size
        del self.seen[place]


def tokenizer(text, **_):
    return {"input_ids": [1, 2, 3]}


tokenizer.chat_template = tokenizer.bos_token_id = tokenizer.eos_token_id = tokenizer.pad_token_id = None
tokenizer.save_pretrained = lambda path: None


@pytest.fixture
def chosen(tmp_path):
    """A model of twelve layers and an adapter on it, in folders."""
    model = hf.random("llama", Config(**SIZES), seed=0)
    hf.save(tmp_path / "base", model)
    sizes = hf.abstract_of(model)
    low = tree.map(lambda leaf: leaf + 0.05, lora.init(sizes, lora.linears(sizes), rank=2, seed=3))
    base = loading.identify_base(str(tmp_path / "base"), model)
    info = adapter.Info(2, 4.0, False, 0.0, base.name, list(lora.pairs(low)), digest=base.digest)
    adapter.save(tmp_path / "adapter", low, family="llama", info=info, tied=True)
    return Target(str(tmp_path / "base"), dtype="float32", device="cpu", adapter=str(tmp_path / "adapter"))


def test_memory_is_that_of_a_few_layers(chosen, tmp_path):
    peaks = {}
    for name in ("whole", "layers"):
        with Peak() as peak:
            if name == "whole":
                model, low, _ = merging.load(chosen)
                merging.save(merging.merge(model, low, tokenizer, dtype=torch.float32), tmp_path / name, chosen, tokenizer)
                del model, low
            else:
                model, low = layered.load(chosen)
                layered.save(layered.merge(model, low, tokenizer, dtype=torch.float32), tmp_path / name, chosen, tokenizer)
        peaks[name] = peak.most
    layer = (4 * 64 * 64 + 3 * 64 * 256) * 4
    assert peaks["whole"] > 24 * layer and peaks["layers"] < 6 * layer, (peaks, layer)


def test_layers_are_made_when_they_are_asked_for():
    indices = []
    layers = layered.Layers(3, lambda index: indices.append(index) or {"a": torch.tensor(index)})
    assert len(layers) == 3 and not indices
    assert [path for path, _ in tree.items({"layers": layers})] == ["layers.0.a", "layers.1.a", "layers.2.a"] and indices == [0, 1, 2]
    assert layers[1]["a"] == 1 and indices == [0, 1, 2, 1]
