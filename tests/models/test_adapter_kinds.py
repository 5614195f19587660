"""Kinds of adapters: DoRA, starts from the strongest part of a weight, ranks and scales of their own. PEFT is the oracle, both ways."""

import copy
import json
import warnings
from functools import partial
from typing import Any

import pytest
import torch

from treetune.core import lora, quant, tree
from treetune.core.quant import Scheme
from treetune.models import adapter, adapter_starts, decode, dense, families, hf, merging, policy
from treetune.models.adapter import Base
from treetune.models.adapter_starts import Given
from treetune.models.policy import AdapterSpec

PATTERNS = {"ranks": (("q_proj", 8), (r"layers\.1\..*gate", 2)), "alphas": (("down_proj", 3.0), ("layers.0.q_proj", 40.0))}
KINDS = {
    "dora": dict(dora=True),
    "dora, rslora": dict(dora=True, rslora=True),
    "patterns": PATTERNS,
    "patterns, rslora": dict(**PATTERNS, rslora=True),
    "patterns, dora": dict(**PATTERNS, dora=True),
    "gaussian": dict(init="gaussian"),
    "orthogonal": dict(init="orthogonal"),
    "pissa": dict(init="pissa"),
    "pissa, fast": dict(init="pissa_niter_4"),
    "pissa, dora, patterns, rslora": dict(init="pissa", dora=True, rslora=True, **PATTERNS),
    "olora": dict(init="olora"),
    "olora, patterns": dict(init="olora", **PATTERNS),
}


def close(ours, theirs, bound=1e-5):
    """Models compute in float64 where they are compared: in float32 the order of sums, which is another on each CPU, takes up to 2e-5."""
    assert (ours - theirs).abs().max() <= bound


def adapted(model, **options):
    return policy.adapt(model, AdapterSpec(rank=4, alpha=12.0)._replace(**options), base=Base("x", ""), seed=3)


def moved(start, by=0.1):
    """The trained tree after some steps."""
    gen = torch.Generator().manual_seed(1)
    return tree.map(lambda leaf: leaf + by * torch.randn(leaf.shape, generator=gen) * leaf.abs().mean().clamp(min=0.1), start.params)


def logits(model, low, ids):
    return families.document_logits(model, ids, lora=low)


def in_peft(model, path, ids):
    import peft

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), path).double()
    assert not [entry.message for entry in caught if "keys" in str(entry.message)]
    with torch.no_grad():
        return wrapped(ids[None]).logits[0]


# qwen2 keeps a leaf for each projection and phi3 one for several.
CASES = [(kind, family, i % 2 == j) for i, kind in enumerate(KINDS) for j, family in enumerate(("qwen2", "phi3"))]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("kind", "family"), [(kind, family) if fast else pytest.param(kind, family, marks=pytest.mark.slow) for kind, family, fast in CASES]
)
def test_a_kind_in_peft_again_here_merged_and_sampled(oracle, documents, tmp_path, kind, family):
    options = dict(KINDS[kind])
    if family == "phi3":  # projections of one module go together
        options |= {name: (("qkv_proj" if name == "ranks" else "down_proj", 8),) for name in ("ranks", "alphas") if name in options}
    model, folder = oracle(family)
    ours, ids = hf.load(folder, dtype=torch.float64), torch.tensor(documents[1])
    start = adapted(ours, **options)
    base = logits(ours, None, ids)
    close(logits(*policy.current(start), ids), base, 2e-5)  # orthogonal: B A = 0 up to rounding
    if "orthogonal" not in kind:
        assert torch.equal(logits(*policy.current(start), ids), base)
    params = moved(start)
    policy.save(start, tmp_path / "adapter", params=params)
    current, applied = policy.current(start, params)
    expected = logits(current, applied, ids)
    assert (expected - base).abs().max() > 0.05
    close(in_peft(model, tmp_path / "adapter", ids), expected)
    again, _, info = adapter.load(tmp_path / "adapter", ours)
    close(logits(ours, again, ids), expected)
    assert start.adapter is not None and set(info.paths) == set(start.adapter.paths)
    merged = ours._replace(params=lora.merge(ours.params, again.tree, again.scale))
    close(logits(merged, None, ids), expected, 2e-5)
    drawn = [decode.sample(ours, [documents[1][:6]], n=2, lora=low, max_new_tokens=5, seed=1) for low in (applied, again)]
    assert torch.equal(drawn[0].tokens, drawn[1].tokens)
    reread = adapted(ours, start=str(tmp_path / "adapter"))
    policy.save(reread, tmp_path / "further")
    close(in_peft(model, tmp_path / "further", ids), expected)


THEIRS = {
    "dora": dict(use_dora=True),
    "patterns": dict(rank_pattern={"q_proj": 8}, alpha_pattern={"layers.1.self_attn.v_proj": 2.0}),
    "all": dict(use_dora=True, use_rslora=True, rank_pattern={"v_proj": 1}),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", THEIRS.values(), ids=THEIRS)
def test_what_peft_writes_is_read(oracle, documents, tmp_path, options, tied):
    import peft

    model, folder = oracle("llama", tied)
    ours, ids = hf.load(folder, dtype=torch.float64), torch.tensor(documents[1])
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False, **options)
    torch.manual_seed(0)  # what PEFT draws from
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).double()
    with torch.no_grad():
        for name, leaf in wrapped.named_parameters():
            if "magnitude" in name:
                leaf.mul_(torch.linspace(0.8, 1.3, leaf.numel()))
        expected = wrapped(ids[None]).logits[0]
    wrapped.save_pretrained(tmp_path)
    low, _, _ = adapter.load(tmp_path, ours, dtype=torch.float64)
    # Softmax and norms are in float32 there, and round in proportion to the logits.
    close(logits(ours, low, ids).double(), expected.double(), bound=1e-5 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pairs_start_as_those_of_peft(oracle, documents, init):
    """s B A is the same part of the weight; what PEFT takes off the base, ours takes off in the adapter."""
    import peft

    model, folder = oracle("llama")
    ours = adapted(hf.load(folder), init=init, targets=("q_proj", "up_proj"))
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "up_proj"], init_lora_weights=init)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    pairs = lora.pairs(ours.params["lora"])
    for path, (a, b) in pairs.items():
        module: Any = theirs.get_submodule(f"base_model.model.{adapter.module('llama', path)}")
        torch.testing.assert_close(b @ a, module.lora_B["default"].weight @ module.lora_A["default"].weight, atol=1e-5, rtol=1e-4)
    start = lora.pairs(ours.frozen["start"])
    assert set(start) == set(pairs) and all(torch.equal(start[path][0], a) for path, (a, _) in pairs.items())


def test_a_fast_start_is_near_the_exact_one(oracle):
    model = hf.load(oracle("llama")[1])
    exact, fast = (lora.pairs(adapted(model, init=init).params["lora"]) for init in ("pissa", "pissa_niter_16"))
    for path, (a, b) in exact.items():
        weight = dict(tree.items(model.params))[path]
        left = [(weight - 3.0 * pair[1] @ pair[0]).norm() for pair in ((a, b), fast[path])]
        assert left[0] <= 1.00001 * left[1] <= 1.01 * left[0]


def test_gradients_of_a_start_are_those_of_the_residual_weight(oracle, documents):
    """dL/dA and dL/dB of W - s B0 A0 + s B A, in float64, against the model with its weights replaced."""
    model = hf.load(oracle("llama")[1], dtype=torch.float64)
    start = adapted(model, init="pissa", targets=("q_proj", "down_proj"))
    ids = torch.tensor(documents[1])
    batch = dense.single(ids) | {"at": torch.arange(len(ids) - 1), "targets": ids[1:], "seq": torch.zeros(len(ids) - 1, dtype=torch.int64)}
    wide = tree.map(lambda leaf: leaf.double(), moved(start)), tree.map(lambda leaf: leaf.double(), start.frozen)
    grads = []
    for fold in (False, True):
        params = tree.map(lambda leaf: leaf.clone().requires_grad_(), wide[0])
        if fold:
            begun, weights = lora.pairs(wide[1]["start"]), dict(tree.items(wide[1]["model"]))
            for path, (a, b) in lora.pairs(params["lora"]).items():
                weights[path] = weights[path] + 3.0 * (b @ a - begun[path][1] @ begun[path][0])
            value = families.logprobs(model.family, model.cfg, tree.from_items(weights.items()), batch).logp.sum()
        else:
            value = policy.logprob(start)(params, wide[1], batch, None).logp.sum()
        value.backward()
        grads.append([value.detach(), *(leaf.grad for leaf in tree.leaves(params))])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_loftq_starts_nearer_to_the_dense_model_and_is_a_plain_adapter(oracle, documents, tmp_path, kind):
    folder, ids = oracle("llama")[1], torch.tensor(documents[1])
    exact = logits(hf.load(folder), None, ids)
    low = hf.load(folder, scheme=Scheme(kind))
    base, again = Base(str(folder), ""), partial(hf.load, folder, scheme=Scheme(kind))
    start = policy.adapt(low, AdapterSpec(rank=16, init="loftq"), base=base, seed=0, given=Given(lambda see: again(see=see)))
    model, applied = policy.current(start)
    far, near = ((got - exact).pow(2).mean() for got in (logits(low, None, ids), logits(model, applied, ids)))
    assert near < 0.6 * far
    for path, (a, b) in lora.pairs(start.params["lora"]).items():
        weight = dict(tree.items(hf.load(folder).params))[path]
        lost = weight - quant.dense(dict(tree.items(low.params))[path])
        best = (torch.linalg.svd(lost)[1][16:] ** 2).sum().sqrt()
        torch.testing.assert_close((lost - 2.0 * b @ a).norm(), best, atol=1e-6, rtol=1e-4)
    policy.save(start, tmp_path / "a")
    close(logits(low, adapter.load(tmp_path / "a", low)[0], ids), logits(model, applied, ids))
    with pytest.raises(ValueError, match="loftq starts from what quantising loses, and layers.0.q_proj was not quantised"):
        adapted(hf.load(folder), init="loftq")


def test_qera_makes_the_least_error_of_outputs(oracle, monkeypatch):
    """|(W - Q - s B A) R| with R R = C is the norm of the singular values of (W - Q) R beyond the rank: no pair of this rank is nearer."""
    folder, generator = oracle("llama")[1], torch.Generator().manual_seed(0)
    dense, low = hf.load(folder), hf.load(folder, scheme=Scheme("nf4"))
    paths = [path for path in lora.linears(hf.abstract_of(low))]
    x = {path: torch.randn(200, dict(tree.items(dense.params))[path].shape[1], generator=generator).exp() for path in paths}
    seen = {path: rows.T @ rows / 200 for path, rows in x.items()}
    again, base = partial(hf.load, folder, scheme=Scheme("nf4")), Base(str(folder), "")
    monkeypatch.setattr(adapter_starts, "AT_ONCE", 2**14)  # several lots
    spec = AdapterSpec(rank=4, init="qera")  # scale 32 / 4
    given = Given(lambda see: again(see=see), lambda names: ((path, seen[path]) for path in names))
    start = policy.adapt(low, spec, base=base, seed=0, given=given)
    assert not start.frozen.get("start")
    for path, (a, b) in lora.pairs(start.params["lora"]).items():
        lost = dict(tree.items(dense.params))[path] - quant.dense(dict(tree.items(low.params))[path])
        values, basis = torch.linalg.eigh(seen[path].double())
        root = (basis * values.clamp(min=0).sqrt()) @ basis.T
        best = (torch.linalg.svdvals(lost.double() @ root)[4:] ** 2).sum().sqrt()
        torch.testing.assert_close(((lost - 8.0 * b @ a).double() @ root).norm(), best, atol=1e-7, rtol=1e-3)
    with pytest.raises(ValueError, match="lora_init qera starts from rows of the training data, and there are none: choose loftq"):
        policy.adapt(low, spec, base=base, seed=0, given=Given(lambda see: again(see=see)))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("options", [dict(dora=True), dict(init="pissa"), dict(init="olora", dora=True)], ids=str)
def test_over_a_quantised_base(oracle, documents, tmp_path, options):
    folder, ids = oracle("llama")[1], torch.tensor(documents[1])
    low = hf.load(folder, scheme=Scheme("nf4"))
    dense_model = low._replace(params=tree.map(lambda leaf: quant.dense(leaf) if quant.quantised(leaf) else leaf, low.params))
    start = adapted(low, **options)
    assert torch.equal(logits(*policy.current(start), ids), logits(low, None, ids))
    params = moved(start)
    expected = logits(*policy.current(start, params), ids)
    policy.save(start, tmp_path / "a", params=params)
    applied = adapter.load(tmp_path / "a", low)[0]
    close(logits(dense_model, applied, ids), expected)
    merged = merging.merge(low, applied, lambda text, **_: {"input_ids": [5, 6, 7]}, dtype=torch.float32)
    assert merged.difference.largest < 1e-4


REFUSED = {
    "dora, head": (dict(dora=True, targets=("q_proj", "lm_head")), "lora_dora: lm_head has a magnitude"),
    "dora, embedding": (dict(dora=True, targets=("embed_tokens",)), "lora_dora: embed_tokens has a magnitude"),
    "pissa, embedding": (
        dict(init="pissa", targets=("embed_tokens",)),
        "lora_init pissa is computed on linear layers only, and embed_tokens",
    ),
    "pissa, dropout": (dict(init="pissa", dropout=0.1), "lora_init pissa needs lora_dropout 0, got 0.1"),
    "pissa, rank": (dict(init="pissa", rank=4096), "lora_init pissa: rank 4096 on layers.0.q_proj, which has rank"),
    "orthogonal, odd": (dict(init="orthogonal", rank=3), "lora_init orthogonal needs an even rank, and that of layers.0.q_proj is 3"),
    "pattern of nothing": (dict(ranks=(("q_pruj", 3),)), "lora_rank_pattern: 'q_pruj' matches no parameter"),
    "pattern of another": (dict(targets=("q_proj",), alphas=(("v_proj", 3),)), "lora_alpha_pattern: 'v_proj' matches"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(oracle, case):
    options, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        adapted(hf.load(oracle("llama")[1]), **options)


def test_dora_on_experts_is_refused(oracle):
    with pytest.raises(ValueError, match="lora_dora: .*experts.gate_up_proj has a magnitude"):
        adapted(hf.load(oracle("mixtral")[1]), dora=True, targets=("q_proj", "experts"))


def test_files_of_dora_are_read_whole_or_refused(oracle, tmp_path):
    from safetensors.torch import load_file, save_file

    ours = hf.load(oracle("llama")[1])
    policy.save(adapted(ours, dora=True, targets=("q_proj",)), tmp_path)
    (tmp_path / "treetune_manifest.json").unlink()
    config, file = json.loads((tmp_path / adapter.CONFIG).read_text()), load_file(tmp_path / adapter.WEIGHTS)
    assert config["use_dora"] is True
    (tmp_path / adapter.CONFIG).write_text(json.dumps(config | {"use_dora": False}))
    with pytest.raises(ValueError, match="has lora_magnitude_vector for layers.0.q_proj, and .* does not say use_dora"):
        adapter.load(tmp_path, ours)
    (tmp_path / adapter.CONFIG).write_text(json.dumps(config))
    key = next(key for key in file if "layers.1" in key and "magnitude" in key)
    save_file({name: leaf for name, leaf in file.items() if name != key}, tmp_path / adapter.WEIGHTS)
    with pytest.raises(ValueError, match="says use_dora, and the adapter file has no lora_magnitude_vector for layers.1.q_proj"):
        adapter.load(tmp_path, ours)
    save_file(file | {key: torch.ones(3)}, tmp_path / adapter.WEIGHTS)
    with pytest.raises(ValueError, match=r"the magnitude of layers.1.q_proj has shape \[3\]"):
        adapter.load(tmp_path, ours)
