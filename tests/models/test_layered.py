"""Merging layer by layer holds a few layers, not the model."""

import weakref
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from treetune.core import lora, tree
from treetune.core.quant import Scheme
from treetune.models import adapter, hf, layered, loading, merging, quantising
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


def adapted(base, path):
    """An adapter on all linear layers of the model in a folder, in a folder beside it."""
    model = hf.load(base)
    sizes = hf.abstract_of(model)
    low = tree.map(lambda leaf: leaf + 0.05, lora.init(sizes, lora.linears(sizes), rank=2, seed=3))
    known = loading.identify_base(str(base), model)
    info = adapter.Info(2, 4.0, False, 0.0, known.name, list(lora.pairs(low)), digest=known.digest)
    adapter.save(path / "adapter", low, family=model.family, info=info, tied=model.cfg.tied)
    return Target(str(base), dtype="float32", device="cpu", adapter=str(path / "adapter"))


@pytest.fixture
def chosen(tmp_path):
    """A model of twelve layers and an adapter on it, in folders."""
    hf.save(tmp_path / "base", hf.random("llama", Config(**SIZES), seed=0))
    return adapted(tmp_path / "base", tmp_path)


def written(chosen, path, scheme, *, by_layers):
    """The difference that merging into a folder shows."""
    dtype = torch.float32 if scheme is None else torch.bfloat16
    if by_layers:
        merged = layered.merge(*layered.load(chosen), tokenizer, dtype=dtype, scheme=scheme)
        layered.save(merged, path, chosen, tokenizer, dtype=dtype, scheme=scheme)
        return merged.difference
    model, low, _ = merging.load(chosen)
    if scheme is None:
        merged = merging.merge(model, low, tokenizer, dtype=dtype)
        merging.save(merged, path, chosen, tokenizer)
        return merged.difference
    dense, merged = quantising.merge(model, low, tokenizer, scheme, dtype)
    quantising.save(path, dense, scheme, dtype, tokenizer, chosen.model)
    return merged.difference


@pytest.mark.more
@pytest.mark.parametrize("scheme", [None, pytest.param(Scheme("nf4"), marks=pytest.mark.slow)], ids=["float32", "nf4"])
def test_memory_is_that_of_a_few_layers(scheme, chosen, tmp_path):
    peaks = {}
    for name in ("whole", "layers"):
        with Peak() as peak:
            written(chosen, tmp_path / name, scheme, by_layers=name == "layers")
        peaks[name] = peak.most
    layer = (4 * 64 * 64 + 3 * 64 * 256) * 4
    assert peaks["whole"] > 24 * layer and peaks["layers"] < 6 * layer, (peaks, layer)


KINDS = {"float32": None, "nf4": Scheme("nf4"), "int4": Scheme("int4")}
FAST = [("cohere2", "nf4"), ("cohere2", "int4"), ("zamba2", "float32")]
MORE = [pytest.param(*case, marks=pytest.mark.slow) for case in (("cohere2", "float32"), ("zamba2", "nf4"), ("zamba2", "int4"))]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("kind", "scheme"), FAST + MORE)
def test_models_of_transformers_are_merged_by_layers(kind, scheme, folder, tmp_path):
    """The layers of zamba2 share weights, which no layer of its own holds."""
    chosen = adapted(folder(kind), tmp_path)
    one, other = (written(chosen, tmp_path / str(by_layers), KINDS[scheme], by_layers=by_layers) for by_layers in (False, True))
    assert one == other and one.largest > 0
    first, second = (
        {key: leaf for file in sorted((tmp_path / str(name)).glob("*.safetensors")) for key, leaf in load_file(file).items()}
        for name in (False, True)
    )
    assert first.keys() == second.keys() and all(torch.equal(leaf, second[key]) for key, leaf in first.items())
    assert len({(tmp_path / str(name) / "config.json").read_text() for name in (False, True)}) == 1


def test_files_otherwise_than_modules_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"hold those of deepseek_v3 otherwise than its modules do: take merge_method legacy"):
        layered.load(adapted(folder("deepseek_v3"), tmp_path))


def test_layers_are_made_when_they_are_asked_for():
    indices = []
    layers = layered.Layers(3, lambda index: indices.append(index) or {"a": torch.tensor(index)})
    assert len(layers) == 3 and not indices
    assert [path for path, _ in tree.items({"layers": layers})] == ["layers.0.a", "layers.1.a", "layers.2.a"] and indices == [0, 1, 2]
    assert layers[1]["a"] == 1 and indices == [0, 1, 2, 1]
