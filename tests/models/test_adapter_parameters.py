"""Adapters on experts and routers: the same function in PEFT as in ours, both ways; what PEFT cannot hold is refused before training."""

import copy
import json
import warnings

import pytest
import torch

from treetune import models
from treetune.core import grad, lora, tree
from treetune.models import adapter, decode, dense, hf, policy
from treetune.models.adapter import Base

KINDS = ["mixtral", "qwen3_moe", "gpt_oss"]
GATE_UP, DOWN, ROUTER = "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"
TARGETS = {
    "attention": ("q_proj", "v_proj"),
    "experts": ("experts",),
    "gate and up": ("experts.gate_up_proj",),
    "down": ("mlp.experts.down_proj", "o_proj"),
    "router": ("router",),
    "all": (r"layers\.1\.", "lm_head"),
}


def adapted(model, **options):
    """A policy whose adapter is away from its start, and that adapter."""
    start = policy.adapt(model, policy.AdapterSpec(**dict(rank=4, alpha=12.0) | options), base=Base("x", ""), seed=3)
    generator = torch.Generator().manual_seed(5)
    moved = tree.map(lambda leaf: leaf + 0.1 * torch.randn(leaf.shape, generator=generator), start.params)
    start = start._replace(params=moved)
    return start, start.lora._replace(tree=moved["lora"])


def logits(model, low, ids, whole=None):
    return dense.probe(tree.merge(model.params, whole or {}), ids, model.cfg, lora=low)


def reloaded(model, path, ids):
    import peft

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), path).eval()
    assert not [entry.message for entry in caught if "keys" in str(entry.message)]
    with torch.no_grad():
        return wrapped(ids[None]).logits[0]


def each(names, kinds):
    """(name, kind): every name and every kind in the working set, one with another in turn; the others are slow."""
    cases = [(name, kind, i % len(kinds) == j) for i, name in enumerate(names) for j, kind in enumerate(kinds)]
    return [(name, kind) if fast else pytest.param(name, kind, marks=pytest.mark.slow) for name, kind, fast in cases]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "kind"), each(TARGETS, KINDS))
def test_peft_computes_the_same_logits(oracle, documents, tmp_path, name, kind):
    model, folder = oracle(kind)
    ours, ids = hf.load(folder), torch.tensor(documents[1])
    start, low = adapted(ours, targets=TARGETS[name])
    expected = logits(ours, low, ids)
    assert (expected - logits(ours, None, ids)).abs().max() > 0.02
    policy.save(start, tmp_path / "adapter")
    torch.testing.assert_close(reloaded(model, tmp_path / "adapter", ids), expected, atol=2e-5, rtol=1e-5)
    again, whole, info = adapter.load(tmp_path / "adapter", ours)
    assert torch.equal(logits(ours, again, ids), expected) and not whole
    assert set(info.paths) == set(start.adapter.paths) == set(lora.pairs(low.tree))


WHOLE = {
    "router": (r"layers\.1\.router",),
    "experts": (r"layers\.1\.experts",),
    "by the names of modules": ("mlp.gate", "mlp.router", "mlp.experts"),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WHOLE)
def test_router_and_experts_may_train_whole(oracle, documents, tmp_path, name, kind):
    model, folder = oracle(kind)
    ours, ids = hf.load(folder), torch.tensor(documents[1])
    names = [other for other in WHOLE[name] if other != ("mlp.gate" if kind == "gpt_oss" else "mlp.router")]
    start, low = adapted(ours, targets=("q_proj",), modules_to_save=tuple(names))
    expected = logits(ours, low, ids, start.params["model"])
    policy.save(start, tmp_path / "adapter")
    torch.testing.assert_close(reloaded(model, tmp_path / "adapter", ids), expected, atol=2e-5, rtol=1e-5)
    again, whole, _ = adapter.load(tmp_path / "adapter", ours)
    assert torch.equal(logits(ours, again, ids, whole), expected)


PEFTS = {
    "experts by suffix": dict(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "down_proj"]),
    "experts alone": dict(target_modules=[], target_parameters=[GATE_UP, DOWN]),
    "down alone": dict(target_modules=["k_proj"], target_parameters=[f"model.layers.1.{DOWN}"]),
    "router": dict(target_modules=["k_proj"], target_parameters=[ROUTER]),
    "ranks": dict(target_modules=["q_proj"], target_parameters=[GATE_UP, DOWN], rank_pattern={r".*\.gate_up_proj": 6}),
    "alphas": dict(target_modules=["q_proj"], target_parameters=[GATE_UP, DOWN], alpha_pattern={"down_proj": 3}, use_rslora=True),
}


def made_by_peft(model, path, options):
    import peft

    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM"} | options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for leaf in [leaf for leaf in wrapped.parameters() if leaf.requires_grad]:
            leaf.add_(torch.randn(leaf.shape, generator=generator) * 0.1)
    wrapped.save_pretrained(path)
    return wrapped.eval()


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "kind"), each(PEFTS, KINDS))
def test_adapters_that_peft_makes_are_read(oracle, documents, tmp_path, name, kind):
    model, folder = oracle(kind)
    ids = torch.tensor(documents[1])
    options = PEFTS[name] | ({"target_parameters": ["mlp.router.weight"]} if name == "router" and kind == "gpt_oss" else {})
    wrapped = made_by_peft(model, tmp_path, options)
    with torch.no_grad():
        expected = wrapped(ids[None]).logits[0]
    ours = hf.load(folder)
    low, whole, _ = adapter.load(tmp_path, ours)
    torch.testing.assert_close(logits(ours, low, ids), expected, atol=2e-5, rtol=1e-5)
    assert not whole and (expected - logits(ours, None, ids)).abs().max() > 0.01


@pytest.mark.sampled(2)
@pytest.mark.parametrize("targets", [["q_proj", "w1", "w2", "w3"], ["q_proj", "gate"], "all-linear"], ids=str)
def test_names_of_older_models_are_read_as_peft_rewrites_them(oracle, documents, tmp_path, targets):
    """PEFT turns them into target_parameters while it makes the adapter, with twice the rank for gate and up."""
    model, folder = oracle("mixtral")
    ids = torch.tensor(documents[1])
    wrapped = made_by_peft(model, tmp_path, dict(target_modules=targets))
    with torch.no_grad():
        expected = wrapped(ids[None]).logits[0]
    ours = hf.load(folder)
    low, _, _ = adapter.load(tmp_path, ours)
    torch.testing.assert_close(logits(ours, low, ids), expected, atol=2e-5, rtol=1e-5)


def test_what_peft_would_read_otherwise_is_refused(oracle, tmp_path):
    model, folder = oracle("qwen3_moe")
    made_by_peft(model, tmp_path, dict(target_modules=["q_proj"], target_parameters=[GATE_UP]))
    config = json.loads((tmp_path / adapter.CONFIG).read_text())
    ours = hf.load(folder)
    for changes, message in (
        ({"target_modules": "all-linear"}, "target_modules must be a list of names for a qwen3_moe model"),
        ({"target_modules": ["q_proj", "down_proj"]}, "target_modules names down_proj, which PEFT takes for experts"),
        ({"target_parameters": [GATE_UP, DOWN]}, "names model.layers.1.mlp.experts.gate_up_proj as a target, .* has nothing for it"),
        ({"target_parameters": [GATE_UP, "norm.weight"]}, "target_parameters names norm.weight, which is none of the experts"),
        ({"rank_pattern": {"gate_up_proj": 3}}, r"A \[20, 32\] and B \[48, 20\].* rank 3 ask for \[15, 32\] and \[48, 15\]"),
        ({"modules_to_save": ["experts"]}, "both name model.layers.1.mlp.experts.gate_up_proj"),
    ):
        (tmp_path / adapter.CONFIG).write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=message):
            adapter.load(tmp_path, ours)


REFUSED = {
    "dropout": (
        dict(targets=("experts",), dropout=0.1),
        "dropout of adapters must be 0 where layers.1.experts.gate_up_proj has one, got 0.1",
    ),
    "a dense layer among sparse ones": (dict(targets=("all-linear",)), "layers.0.gate_proj takes no adapter"),
    "half of the experts": (dict(targets=("q_proj",), modules_to_save=("experts.down_proj",)), "without layers.1.experts.gate_up_proj"),
    "whole and adapted": (dict(targets=("experts.down_proj",), modules_to_save=("experts.gate_up",)), "choose one of the two"),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_cannot_hold_is_refused_before_training(oracle, name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        adapted(hf.load(oracle("qwen3_moe")[1]), **options)


def test_dropout_of_other_leaves_stays(oracle):
    assert adapted(hf.load(oracle("mixtral")[1]), targets=("all-linear",), dropout=0.1)[1].dropout == 0.1


def folded(params, low):
    """W + s B A in the dtype of the leaves, differentiable."""
    base = dict(tree.items(params))
    return tree.from_items((base | {path: base[path] + low.scale * b @ a for path, (a, b) in lora.pairs(low.tree).items()}).items())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_folded_weights(oracle, documents, stream, kind):
    ours = hf.load(oracle(kind)[1], dtype=torch.float64)
    _, low = adapted(ours, targets=("experts", "router", "q_proj"))
    low = low._replace(tree=tree.map(lambda leaf: leaf.double(), low.tree))
    batch = stream(documents)

    def loss(pairs, fold):
        adapter_ = low._replace(tree=pairs)
        params = folded(ours.params, adapter_) if fold else ours.params
        return -models.logprobs(ours.family, ours.cfg, params, batch, lora=None if fold else adapter_).logp.sum(), None

    ((one, _), mine), ((other, _), plain) = (grad.value_and_grad(loss)(low.tree, fold) for fold in (False, True))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    for (path, leaf), want in zip(tree.items(mine), tree.leaves(plain), strict=True):
        assert want.any() and (leaf - want).norm() <= 1e-6 * want.norm(), path  # the head gives float32


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_computes_what_the_adapted_one_does(oracle, documents, kind):
    ours, ids = hf.load(oracle(kind)[1]), torch.tensor(documents[1])
    _, low = adapted(ours, targets=("experts", "router", "q_proj"))
    merged = ours._replace(params=lora.merge(ours.params, low.tree, low.scale))
    torch.testing.assert_close(logits(merged, None, ids), logits(ours, low, ids), atol=2e-5, rtol=1e-5)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", KINDS)
def test_the_sampler_uses_adapters_on_experts(oracle, stream, kind):
    """|log ratio| <= 5e-5 on any token."""
    ours = hf.load(oracle(kind)[1])
    _, low = adapted(ours, targets=("experts", "router", "o_proj"))
    prompts = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]
    samples = decode.sample(ours, prompts, n=3, lora=low, max_new_tokens=20, seed=4)
    rows = [prompts[row // 3] + samples.tokens[row].tolist() for row in range(9)]
    batch = stream(rows)
    expected = models.logprobs(ours.family, ours.cfg, ours.params, batch, lora=low).logp.split(batch["seq_lens"].tolist())
    for row, logp in enumerate(expected):
        assert (samples.logp[row] - logp[-20:]).abs().max() <= 5e-5
