"""Biases that train beside an adapter (`bias` of PEFT's config). PEFT is the oracle, both ways."""

import copy
import json
import warnings
from typing import Any

import pytest
import torch

from treetune.core import lora, tree
from treetune.models import adapter, families, hf, plain_model, policy
from treetune.models.adapter import Base
from treetune.models.policy import AdapterSpec

IDS = torch.tensor([11, 3, 88, 42, 17, 17, 90, 31, 5, 77, 40, 2, 66])
# Biases of projections alone; also of norms, and of the head.
FAMILIES = ("qwen2", "phi", "gpt_neox")
KINDS: dict[str, dict[str, Any]] = {"all": dict(bias="all"), "lora_only": dict(bias="lora_only"), "all, dora": dict(bias="all", dora=True)}


def close(ours, theirs, bound=1e-5):
    """Models compute in float64."""
    assert (ours - theirs).abs().max() <= bound


@pytest.fixture
def of_family(oracle, folder):
    """of_family(name) -> (a model of transformers, ours in float64)."""

    def get(name):
        theirs, path = oracle(name) if name == "qwen2" else (plain_model.load(folder(name)), folder(name))
        return copy.deepcopy(theirs).double(), hf.load(path, dtype=torch.float64)

    return get


def moved(start):
    gen = torch.Generator().manual_seed(1)
    return tree.map(lambda leaf: leaf + 0.05 * torch.randn(leaf.shape, generator=gen), start.params)


def logits(model, low):
    return families.document_logits(model, IDS, lora=low)


def targets(family):
    return (
        ("v_proj", "down_proj")
        if family == "qwen2"
        else ("query_key_value", "dense_4h_to_h")
        if family == "gpt_neox"
        else ("v_proj", "fc2")
    )


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ours_in_peft_again_here_and_further(of_family, tmp_path, family, kind):
    import peft

    theirs, ours = of_family(family)
    spec = AdapterSpec(rank=4, alpha=12.0, targets=targets(family), **KINDS[kind])
    start = policy.adapt(ours, spec, base=Base("x", ""), seed=3)
    keys = {hf.hf_key(ours.family, path) for path, _ in tree.items(start.params["model"])}
    modules = {name for name, one in theirs.named_modules() if getattr(one, "bias", None) is not None}
    own = {adapter.module(ours.family, path) for path, _ in lora.pairs(start.params["lora"]).items()}
    assert keys == {f"{name}.bias" for name in modules if "all" in kind or name in own}
    params = moved(start)
    current, low = policy.current(start, params)
    expected = logits(current, low)
    policy.save(start, tmp_path / "a", params=params)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "a", is_trainable=True).double()
        close(wrapped(IDS[None]).logits[0], expected)
    assert not [entry.message for entry in caught if "keys" in str(entry.message)]
    trains = {name for name, leaf in wrapped.named_parameters() if leaf.requires_grad and name.endswith(".bias")}
    assert len(trains) == len(keys), "PEFT trains the same biases"
    low, whole, info = adapter.load(tmp_path / "a", ours)
    laid = ours._replace(params=tree.merge(ours.params, whole))
    close(logits(laid, low), expected)
    assert info.bias == KINDS[kind]["bias"]
    merged = laid._replace(params=lora.merge(laid.params, low.tree, low.scale))
    close(logits(merged, None), expected, 2e-5)
    further = policy.adapt(ours, AdapterSpec(start=str(tmp_path / "a")), base=Base("x", ""), seed=0)
    assert {path for path, _ in tree.items(further.params["model"])} == {path for path, _ in tree.items(params["model"])}
    policy.save(further, tmp_path / "b")
    one, other = (json.loads((tmp_path / name / adapter.CONFIG).read_text()) for name in "ab")
    assert one == other


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_peft_writes_is_read(of_family, tmp_path, family, bias):
    import peft

    theirs, ours = of_family(family)
    names: list[str] = list(targets(family))
    torch.manual_seed(0)  # PEFT draws from the global generator
    wrapped = peft.get_peft_model(copy.deepcopy(theirs), peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False, bias=bias))
    wrapped = wrapped.double()
    with torch.no_grad():
        for leaf in (leaf for leaf in wrapped.parameters() if leaf.requires_grad):
            leaf.add_(torch.linspace(-0.05, 0.05, leaf.numel()).view_as(leaf))
        expected = wrapped(IDS[None]).logits[0]
    wrapped.save_pretrained(tmp_path)
    low, whole, info = adapter.load(tmp_path, ours, dtype=torch.float64)
    assert whole and info.bias == bias
    close(logits(ours._replace(params=tree.merge(ours.params, whole)), low), expected)


def test_gradients_reach_biases_and_adapters_alone(oracle):
    from treetune.models import dense

    start = policy.adapt(hf.load(oracle("qwen2")[1]), AdapterSpec(rank=2, bias="lora_only"), base=Base("x", ""), seed=0)
    batch = dense.single(IDS) | {"at": torch.arange(12), "targets": IDS[1:], "seq": torch.zeros(12, dtype=torch.int64)}
    params = tree.map(lambda leaf: leaf.requires_grad_(), moved(start))
    policy.logprob(start)(params, start.frozen, batch, None).logp.sum().backward()
    assert all(leaf.grad.abs().max() > 0 for leaf in tree.leaves(params))
    assert {path for path, _ in tree.items(start.params["model"])} == {f"layers.{i}.{x}_bias" for i in range(2) for x in "qkv"}


def test_refused_by_name(oracle, tmp_path):
    from safetensors.torch import load_file, save_file

    plain, biased = hf.load(oracle("llama")[1]), hf.load(oracle("qwen2")[1])

    def adapt(model, **options):
        return policy.adapt(model, AdapterSpec(rank=2, **options), base=Base("x", ""), seed=0)

    with pytest.raises(ValueError, match="lora_bias all: the model has no bias"):
        adapt(plain, bias="all")
    with pytest.raises(ValueError, match="lora_bias lora_only: none of the targets has a bias"):
        adapt(biased, bias="lora_only", targets=("down_proj",))
    with pytest.raises(ValueError, match=r"lora_bias all and an adapter on layers.0.router: biases beside adapters on experts"):
        adapt(hf.load(oracle("gpt_oss")[1]), bias="all", targets=("q_proj", "router"))
    policy.save(adapt(biased, bias="all", targets=("q_proj",)), tmp_path)
    (tmp_path / "treetune_manifest.json").unlink()
    file = load_file(tmp_path / adapter.WEIGHTS)
    key = "base_model.model.model.layers.1.self_attn.q_proj.base_layer.bias"
    save_file({name: leaf for name, leaf in file.items() if name != key}, tmp_path / adapter.WEIGHTS)
    with pytest.raises(ValueError, match="says bias all, and the adapter file has none for layers.1.q_bias"):
        adapter.load(tmp_path, biased)
    save_file(file | {key: torch.zeros(3)}, tmp_path / adapter.WEIGHTS)
    with pytest.raises(ValueError, match=r"layers.1.q_bias in the adapter file has shape \[3\]"):
        adapter.load(tmp_path, biased)
    config = json.loads((tmp_path / adapter.CONFIG).read_text())
    (tmp_path / adapter.CONFIG).write_text(json.dumps(config | {"bias": "none"}))
    with pytest.raises(ValueError, match="tensors that this model cannot use"):
        adapter.load(tmp_path, biased)
