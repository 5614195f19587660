"""What the switches of the dense decoder do beyond parity in float32: roundings, adapters on fused modules, merging, features."""

import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from treetune import models
from treetune.core import grad, lora, tree
from treetune.models import adapter, decoder_attention, dense, features, hf, hf_keys, merging, policy, rope_scaling

NEW = ("phi3", "smollm3", "granite", "olmo2", "olmo3", "gemma", "gemma2", "gemma3")
RANK, ALPHA = 4, 12.0


def peft_of(model, **options):
    """A PEFT model around a copy of a model of transformers, every trained number away from its start."""
    import peft

    config = peft.LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, "task_type": "CAUSAL_LM"} | options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for leaf in [leaf for leaf in wrapped.parameters() if leaf.requires_grad]:
            leaf.add_(torch.randn(leaf.shape, generator=generator) * 0.1)
    return wrapped


def adapted(ours, targets="all-linear", **match):
    sizes = hf.abstract_of(ours, head=True)
    paths = lora.match(sizes, targets, module=lambda path: hf_keys.hf_key(ours.family, path).rpartition(".")[0], **match)
    generator = torch.Generator().manual_seed(1)
    return tree.map(lambda leaf: leaf + 0.1 * torch.randn(leaf.shape, generator=generator), lora.init(sizes, paths, rank=RANK, seed=0))


# Roundings


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["gemma", "gemma3", "olmo2", "granite"])
def test_bfloat16_rounds_where_transformers_does(oracle, documents, kind):
    """Embeddings and the first norm bit for bit: scale of the embeddings, 1 + w and the one rounding."""
    model, path = oracle(kind)
    low, ours, ids = copy.deepcopy(model).bfloat16(), hf.load(path, dtype=torch.bfloat16), torch.tensor(documents[1])
    seen = {}
    low.model.layers[0].register_forward_pre_hook(lambda module, args, kwargs: seen.update(x=args[0]), with_kwargs=True)
    with torch.no_grad():
        low(ids[None])
        x = dense._embed(ours.params, ids, ours.cfg, None, None) * ours.cfg.embed_scale
        assert torch.equal(x, seen["x"][0])
        w = ours.params["norm"]
        assert (dense._normed(x, w, ours.cfg) == low.model.norm(seen["x"])[0]).float().mean() > 0.999
        wide = dense.probe(tree.map(lambda leaf: leaf.float(), ours.params), ids, replace(ours.cfg, dtype=torch.float32))
        expected, got = low(ids[None]).logits[0].float(), dense.probe(ours.params, ids, ours.cfg)
    # Both are as far from float32 as bfloat16 is.
    assert (got - wide).norm() <= 1.2 * (expected - wide).norm()


def test_the_scale_of_gemmas_embeddings_is_rounded():
    sizes = dict(vocab_size=8, hidden_size=3072, mlp_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, embed_sqrt=True)
    assert dense.Config(**sizes, dtype=torch.bfloat16).embed_factor == 55.5
    assert dense.Config(**sizes).embed_factor == torch.tensor(3072**0.5).item()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", NEW)
def test_float64(oracle, documents, kind):
    """Norms of gemma and attention scores stay float32 in transformers: equal to 1e-5 of the largest logit."""
    model, path = oracle(kind)
    ours, ids = hf.load(path, dtype=torch.float64), torch.tensor(documents[1])
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(ids[None]).logits[0]
    got = dense.probe(ours.params, ids, ours.cfg)
    torch.testing.assert_close(got.double(), expected, atol=1e-5 * max(1.0, float(expected.abs().max())), rtol=0)


# Gradients


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", NEW)
def test_rematerialisation_changes_no_gradient(oracle, documents, stream, kind):
    ours, batch = hf.load(oracle(kind)[1]), stream(documents)
    low = lora.Lora(adapted(ours), 0.5, 0.2, torch.tensor(3))

    def gradients(remat):
        def loss(params):
            options = {"lora": low._replace(tree=params["lora"]), "remat": remat}
            return -models.logprobs(ours.family, ours.cfg, params["model"], batch, **options).logp.mean(), None

        return grad.value_and_grad(loss)({"model": ours.params, "lora": low.tree})[1]

    for plain, again in zip(tree.leaves(gradients(None)), tree.leaves(gradients("full")), strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("kind,targets", [("phi3", ["qkv_proj", "o_proj"]), ("gemma2", ["q_proj", "embed_tokens", "lm_head"])])
def test_gradients_of_an_adapter_are_those_of_peft(oracle, documents, stream, tmp_path, kind, targets):
    model, path = oracle(kind)
    wrapped = peft_of(model, target_modules=targets, init_lora_weights=False)
    wrapped.save_pretrained(tmp_path)
    ours, batch = hf.load(path), stream(documents)
    low = adapter.load(tmp_path, ours)[0]

    def loss(leaves):
        return -models.logprobs(ours.family, ours.cfg, ours.params, batch, lora=low._replace(tree=leaves)).logp.mean(), None

    (value, _), grads = grad.value_and_grad(loss)(low.tree)
    total = sum(
        torch.nn.functional.cross_entropy(wrapped(torch.tensor(ids)[None]).logits[0, :-1], torch.tensor(ids[1:]), reduction="sum")
        for ids in documents
    ) / len(batch["at"])
    total.backward()
    assert abs(value - total) < 1e-5 * total
    theirs = {name.replace(".default", ""): leaf.grad for name, leaf in wrapped.named_parameters() if leaf.grad is not None}
    mine = dict(tree.items(grads))
    if kind == "phi3":  # one A for the three leaves of a module: its gradient is the sum of theirs
        layer = "base_model.model.model.layers.1.self_attn.qkv_proj.lora_"
        parts = [[mine[f"layers.1.{x}_proj.{side}"] for x in "qkv"] for side in "AB"]
        pairs = [(sum(parts[0]), theirs[f"{layer}A.weight"]), (torch.cat(parts[1]), theirs[f"{layer}B.weight"])]
    else:
        names = {"embed_tokens": "model.embed_tokens.lora_embedding_{}", "lm_head": "lm_head.lora_{}.weight"}
        pairs = [(mine[f"{path}.{side}"], theirs["base_model.model." + name.format(side)]) for path, name in names.items() for side in "AB"]
    for leaf, reference in pairs:
        assert (leaf - reference).norm() <= 1e-5 * reference.norm() and reference.norm() > 1e-6


# Adapters on modules that hold several leaves


@pytest.mark.sampled(3)
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["qkv_proj"], ["gate_up_proj", "down_proj"]])
def test_an_adapter_of_phi3_comes_back_from_its_file(oracle, documents, tmp_path, targets, rslora):
    model, path = oracle("phi3")
    ours, ids = hf.load(path), torch.tensor(documents[1])
    tree_, scale = adapted(ours, targets), lora.scale(rank=RANK, alpha=ALPHA, rslora=rslora)
    adapter.save(tmp_path, tree_, family="phi3", info=adapter.Info(RANK, ALPHA, rslora))
    tensors = load_file(tmp_path / adapter.WEIGHTS)
    fused = "base_model.model.model.layers.0.mlp.gate_up_proj" if "gate_up_proj" in targets else None
    if fused:
        assert tensors[f"{fused}.lora_A.weight"].shape == (2 * RANK, 32) and tensors[f"{fused}.lora_B.weight"].shape == (128, 2 * RANK)
    low, _, info = adapter.load(tmp_path, ours)
    assert info.rank == RANK and set(info.paths) == set(lora.pairs(tree_))
    assert all(torch.equal(dict(tree.items(low.tree))[name], leaf) for name, leaf in tree.items(tree_))
    expected = dense.probe(ours.params, ids, ours.cfg, lora=lora.Lora(tree_, scale))
    import peft

    with torch.no_grad():
        got = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)(ids[None]).logits[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_fresh_adapter_of_phi3_is_saved_and_trained_further(oracle, tmp_path, words):
    """B is zero at the start: the ranks come back all the same."""
    ours = hf.load(oracle("phi3")[1])
    hf.save(tmp_path / "base", ours, tokenizer=words)
    spec = policy.AdapterSpec(rank=RANK, targets=("qkv_proj", "down_proj"))
    start = policy.load(str(tmp_path / "base"), adapter=spec, seed=0)
    policy.save(start, tmp_path / "adapter")
    again = policy.load(str(tmp_path / "base"), adapter=policy.AdapterSpec(start=str(tmp_path / "adapter")), seed=0)
    assert again.adapter.rank == RANK and set(again.adapter.paths) == set(start.adapter.paths) and len(start.adapter.paths) == 8
    for (name, leaf), (other, same) in zip(tree.items(start.params["lora"]), tree.items(again.params["lora"]), strict=True):
        assert name == other and torch.equal(leaf, same)


@pytest.mark.parametrize("target,missing", [("q_proj", "k_proj"), (r"layers\.1\.up_proj", "gate_proj")])
def test_a_part_of_a_module_takes_no_adapter(oracle, tmp_path, words, target, missing):
    hf.save(tmp_path / "base", hf.load(oracle("phi3")[1]), tokenizer=words)
    with pytest.raises(ValueError, match=rf"has an adapter and layers\.\d\.{missing} has none.*rows of \w+_proj: target \w+_proj$"):
        policy.load(str(tmp_path / "base"), adapter=policy.AdapterSpec(rank=RANK, targets=(target,)), seed=0)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("options", [
    {"target_modules": ["qkv_proj"]}, {"target_modules": "all-linear", "use_rslora": True}, {"target_modules": ["gate_up_proj", "o_proj"]},
    {"target_modules": ["o_proj"], "modules_to_save": ["qkv_proj"]}, {"target_modules": ["qkv_proj"], "rank_pattern": {"qkv_proj": 3}},
    {"target_modules": ["qkv_proj", "gate_up_proj"], "alpha_pattern": {r"layers\.1\..*": 5}, "rank_pattern": {"gate_up_proj": 2 * RANK}},
], ids=str)  # fmt: skip
def test_adapters_that_peft_makes_for_phi3(oracle, documents, tmp_path, options):
    model, path = oracle("phi3")
    ids = torch.tensor(documents[1])
    wrapped = peft_of(model, **options)
    wrapped.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = wrapped(ids[None]).logits[0]
        assert (expected - model(ids[None]).logits[0]).abs().max() > 0.01
    ours = hf.load(path)
    low, whole, _ = adapter.load(tmp_path, ours)
    torch.testing.assert_close(dense.probe(tree.merge(ours.params, whole), ids, ours.cfg, lora=low), expected, atol=2e-5, rtol=1e-5)


DAMAGED = {
    "too few rows": ("lora_B.weight", lambda leaf: leaf[:-1], "the model asks for 64 rows"),
    "another rank": ("lora_A.weight", lambda leaf: leaf[:-1], "the model asks for 4 rows"),
    "no twin": ("lora_B.weight", lambda leaf: None, "tensors that this model cannot use"),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_adapters_of_phi3(oracle, tmp_path, name):
    from safetensors.torch import save_file

    model, path = oracle("phi3")
    peft_of(model, target_modules=["qkv_proj", "o_proj"]).save_pretrained(tmp_path)
    part, change, message = DAMAGED[name]
    file = tmp_path / adapter.WEIGHTS
    key = f"base_model.model.model.layers.0.self_attn.qkv_proj.{part}"
    leaves = {name: leaf if name != key else change(leaf) for name, leaf in load_file(file).items()}
    save_file({name: leaf.contiguous() for name, leaf in leaves.items() if leaf is not None}, file)
    with pytest.raises(ValueError, match=message):
        adapter.load(tmp_path, hf.load(path))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ["gemma", "granite"])
@pytest.mark.parametrize("options", [
    {"target_modules": ["embed_tokens", "q_proj"]}, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]},
    {"target_modules": ["lm_head"]},
], ids=str)  # fmt: skip
def test_adapters_that_peft_makes_where_embeddings_and_logits_are_scaled(oracle, documents, tmp_path, kind, options):
    model, path = oracle(kind)
    ids = torch.tensor(documents[1])
    wrapped = peft_of(model, **options)
    wrapped.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = wrapped(ids[None]).logits[0]
    ours = hf.load(path)
    low, whole, _ = adapter.load(tmp_path, ours)
    torch.testing.assert_close(dense.probe(tree.merge(ours.params, whole), ids, ours.cfg, lora=low), expected, atol=5e-5, rtol=1e-5)


# Merging, features, files


@pytest.mark.parametrize("kind", NEW)
def test_merged_logits_are_those_with_the_adapter(oracle, documents, tmp_path, kind):
    """In transformers, from the saved folder: soft-caps and scales included."""
    from transformers import AutoModelForCausalLM

    ours, ids = hf.load(oracle(kind)[1]), torch.tensor(documents[0])
    low = lora.Lora(adapted(ours), 0.5)
    merged = merging.merge(ours, low, lambda text, **_: {"input_ids": ids.tolist()}, dtype=torch.float32)
    assert 0 < merged.difference.largest < 1e-4
    hf.save(tmp_path / "merged", merged.model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
    torch.testing.assert_close(dense.probe(ours.params, ids, ours.cfg, lora=low), expected, atol=1e-4, rtol=0)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["gemma", "granite", "olmo3"])
def test_features_are_the_hidden_states_of_transformers(oracle, documents, kind):
    model, path = oracle(kind)
    ours, ids = hf.load(path), torch.tensor(documents[1])
    batch, layers = dense.single(ids), [0, 1, ours.cfg.num_layers]
    plan = decoder_attention.plan(batch, ours.cfg)
    found = features.hidden(ours.family, ours.cfg, ours.params, batch, plan, torch.arange(len(ids)), layers=layers)
    with torch.no_grad():
        states = model(ids[None], output_hidden_states=True).hidden_states
    for layer, feature in zip(layers, found, strict=True):
        torch.testing.assert_close(feature, states[layer][0], atol=5e-5, rtol=0)


def test_fused_tensors_are_split_by_rows(oracle):
    path = oracle("phi3")[1]
    ours, file = hf.load(path), load_file(path / hf.SINGLE)
    layer, fused = ours.params["layers"][1], file["model.layers.1.self_attn.qkv_proj.weight"]
    assert torch.equal(torch.cat([layer[f"{x}_proj"] for x in "qkv"]), fused)
    assert torch.equal(layer["up_proj"], file["model.layers.1.mlp.gate_up_proj.weight"][64:])
    assert layer["k_proj"].untyped_storage().nbytes() == layer["k_proj"].nbytes


def test_long_documents_of_phi3_turn_by_the_long_factors(oracle, documents, stream):
    """The longest document (48) is beyond the original length (40), its neighbours are not; each is as transformers has it alone."""
    model, path = oracle("phi3")
    ours = hf.load(path)
    assert ours.cfg.rope_scaling == rope_scaling.LongRope((1.0, 1.5, 2.0), (2.0, 4.0, 9.0), 40, ours.cfg.rope_scaling.attention_factor)
    logp = models.logprobs(ours.family, ours.cfg, ours.params, stream(documents)).logp.split([len(ids) - 1 for ids in documents])
    for ids, got in zip(documents, logp, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", NEW)
def test_a_saved_config_is_read_as_the_same_sizes(oracle, kind):
    ours = hf.load(oracle(kind, True)[1])
    config = json.loads(json.dumps(hf.described(ours)[1]))
    from treetune.core import fields

    assert models.MODELS[ours.family].config(fields.mapping(config, "config.json")) == ours.cfg
    assert config["model_type"] == oracle(kind, True)[0].config.model_type
