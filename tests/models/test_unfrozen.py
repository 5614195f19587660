"""Weights that train whole by regular expression, with an adapter or without: these move, all others keep every bit."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from treetune.core import tree
from treetune.core.quant import Scheme
from treetune.core.state import TrainState
from treetune.models import dense, hf, policy, reference
from treetune.models.adapter import Base
from treetune.models.policy import AdapterSpec

NAMES = {
    "path": (r"^layers\.1\.(q_proj|down_proj)$",),
    "key": (r"model.layers.1.self_attn.q_proj.weight$", r"layers\.1\.mlp\.down_proj\.weight"),
}


def stream(ids):
    return dense.single(ids) | {"at": torch.arange(len(ids) - 1), "targets": ids[1:], "seq": torch.zeros(len(ids) - 1, dtype=torch.int64)}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_only_the_named_weights_train(oracle, names):
    model = hf.load(oracle("llama")[1])
    one = policy.full(model, names)
    chosen = {"layers.1.q_proj", "layers.1.down_proj"}
    trained, frozen = ({path for path, _ in tree.items(part["model"])} for part in (one.params, one.frozen))
    assert trained == chosen and trained | frozen == {path for path, _ in tree.items(model.params)} and not trained & frozen


def test_gradients_are_those_of_training_everything(oracle, documents):
    model = hf.load(oracle("qwen2")[1])
    batch, grads = stream(torch.tensor(documents[1])), []
    for start in (policy.full(model), policy.full(model, (r"layers\.0\.(q_proj|q_bias)$", "^norm$"))):
        params = tree.map(lambda leaf: leaf.requires_grad_(), start.params)
        policy.logprob(start)(params, start.frozen, batch, None).logp.sum().backward()
        grads.append({path: leaf.grad for path, leaf in tree.items(params)})
    every, some = grads
    assert set(some) == {"model.layers.0.q_proj", "model.layers.0.q_bias", "model.norm"}
    for path, grad in some.items():
        torch.testing.assert_close(grad, every[path], atol=2e-5, rtol=1e-4)  # products of other leaves take part in other orders


def test_what_is_saved_has_the_frozen_weights_as_they_were(oracle, tmp_path):
    folder = oracle("llama")[1]
    one = policy.full(hf.load(folder), ("up_proj",))
    moved = tree.map(lambda leaf: leaf + 1.0, one.params)
    policy.save(one, tmp_path / "out", params=moved)
    before, after = (
        {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()} for path in (folder, tmp_path / "out")
    )
    assert set(before) == set(after)
    for key, leaf in after.items():
        torch.testing.assert_close(leaf, before[key] + ("up_proj" in key), atol=0, rtol=0)


def test_the_reference_is_what_the_run_started_from(oracle, documents):
    one = policy.full(hf.load(oracle("llama")[1]), ("up_proj",))
    built = reference.build(one)
    assert {path for path, _ in tree.items(built.policy.frozen["ref"])} == {path for path, _ in tree.items(one.params["model"])}
    batch = stream(torch.tensor(documents[1]))
    before = policy.logprob(one)(one.params, one.frozen, batch, None).logp
    moved = TrainState(tree.map(lambda leaf: leaf + 1.0, one.params), built.policy.frozen, {}, {}, torch.tensor(0))
    torch.testing.assert_close(built.logp(moved, batch, None), before, atol=0, rtol=0)


def test_beside_an_adapter_they_are_saved_as_peft_has_them(oracle, documents, tmp_path):
    import peft

    model, folder = oracle("llama")
    ours, ids = hf.load(folder), torch.tensor(documents[1])
    start = policy.adapt(ours, AdapterSpec(rank=2, targets=("q_proj",), unfrozen=(r"^layers\.0\.o_proj$",)), base=Base("x", ""), seed=0)
    generator = torch.Generator().manual_seed(0)
    moved = tree.map(lambda leaf: leaf + 0.1 * torch.randn(leaf.shape, generator=generator), start.params)
    policy.save(start, tmp_path / "a", params=moved)
    expected = policy.current(start, moved)
    logits = dense.probe(expected[0].params, ids, ours.cfg, lora=expected[1])
    with torch.no_grad():
        got = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a")(ids[None]).logits[0]
    torch.testing.assert_close(got, logits, atol=1e-5, rtol=1e-5)


def test_refused_by_name(oracle):
    model = hf.load(oracle("llama")[1])
    with pytest.raises(ValueError, match=r"unfrozen_parameters: 'layers.0.q_pruj' matches no parameter; the nearest are .*q_proj"):
        policy.full(model, ("norm", "layers.0.q_pruj"))
    with pytest.raises(ValueError, match=r"unfrozen_parameters: '\[' is not a regular expression"):
        policy.full(model, ("[",))
    with pytest.raises(ValueError, match="q_proj is trained whole and .* of the same module has an adapter"):
        policy.adapt(model, AdapterSpec(targets=("q_proj",), unfrozen=("q_proj",)), base=Base("x", ""), seed=0)
    low = hf.load(oracle("llama")[1], scheme=Scheme("nf4"))
    with pytest.raises(ValueError, match=r"unfrozen_parameters: layers.0.q_proj is quantised and cannot train"):
        policy.full(low, ("q_proj",))
    assert policy.full(low, ("norm",)).params["model"]["norm"].dtype == torch.float32
