"""Models with quantised leaves against the same models with these leaves made dense, and what a folder of them says."""

import pytest
import torch

from treetune.core import check, grad, lora, machine, quant, shard, tree
from treetune.core.quant import Scheme
from treetune.models import MODELS, Model, adapter, decode, dense, families, hf, identity, loading, policy, quantised
from treetune.ops import noise

FAMILIES = ("llama", "gemma2", "phi3", "gpt_oss", "qwen3_moe", "glm4", "deepseek_v3", "qwen3_5_text")
SCHEMES = (Scheme("nf4"), Scheme("fp4", double=False), Scheme("int4"), Scheme("int8"), Scheme("fp8"))


def stream():
    """Two documents, all tokens but the first of each read."""
    lens = torch.tensor([9, 6])
    cu = torch.nn.functional.pad(lens.cumsum(0), (1, 0)).int()
    tokens = torch.randint(0, 60, (15,), generator=torch.Generator().manual_seed(1))
    at = torch.tensor([*range(8), *range(9, 14)])
    return {
        "tokens": tokens, "positions": torch.cat([torch.arange(9), torch.arange(6)]), "cu_docs": cu, "at": at, "targets": tokens[at + 1],
        "seq": torch.tensor([0] * 8 + [1] * 5), "seq_lens": torch.tensor([8, 5]), "doc_of_seq": torch.tensor([0, 1]),
        "row": torch.tensor([0, 1]),
    }  # fmt: skip


def adapted(model: Model):
    """An adapter on all linear layers, away from its start."""
    sizes = hf.abstract_of(model)
    fresh = lora.init(sizes, lora.match(sizes, "all-linear"), rank=2, seed=3)
    return tree.map(
        lambda leaf: leaf + 0.05 * (noise.uniform(noise.keys(torch.tensor(5), torch.arange(leaf.shape[0])), leaf.shape[1]) - 0.5), fresh
    )


def loss_and_gradient(model: Model, remat=None):
    def loss(params):
        stats = families.logprobs(model.family, model.cfg, model.params, stream(), lora=lora.Lora(params, 1.5), remat=remat)
        return -stats.logp.sum(), None

    (value, _), gradient = grad.value_and_grad(loss)(adapted(model))
    return value, gradient


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(tree.leaves(one), tree.leaves(other), strict=True))


AGAIN = ("llama", "gpt_oss", "deepseek_v3")  # what computes its layers again in the working set


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("family", "remat"),
    [(family, None) for family in FAMILIES]
    + [(family, "full") if family in AGAIN else pytest.param(family, "full", marks=pytest.mark.slow) for family in FAMILIES],
)
def test_loss_and_gradient_are_those_of_the_dense_weights_to_the_bit(family, remat, folder):
    model = hf.load(folder(family), scheme=Scheme("nf4"))
    chosen = [path for path, leaf in tree.items(model.params) if quant.quantised(leaf)]
    assert len(chosen) >= 8 and not check.not_finite(model.params)
    value, gradient = loss_and_gradient(model, remat)
    expected, twin = loss_and_gradient(quantised.dense(model), remat)
    assert torch.equal(value, expected) and same(gradient, twin)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.kind)
def test_every_kind_computes(scheme, folder):
    model = hf.load(folder("llama"), scheme=scheme)
    whole = hf.load(folder("llama"))
    value, gradient = loss_and_gradient(model)
    expected, twin = loss_and_gradient(quantised.dense(model))
    assert torch.equal(value, expected) and same(gradient, twin)
    most = 0.35 if scheme.kind == "int4" else 0.25  # evenly spaced numbers fit weights worse than those of nf4
    assert 0 < abs(value - loss_and_gradient(whole)[0]) / stream()["at"].shape[0] < most


def test_no_dense_weight_is_kept_for_the_backward_pass(folder, monkeypatch):
    """Each is made in the forward pass and again in the backward pass; one that was kept would be made once."""
    model, dense_leaves = hf.load(folder("llama"), scheme=Scheme("nf4")), []
    dense_of = quant.dense
    monkeypatch.setattr(quant, "dense", lambda leaf, dtype=None: dense_leaves.append(leaf) or dense_of(leaf, dtype))
    count = sum(quant.quantised(leaf) for leaf in tree.leaves(model.params))
    params = tree.map(lambda leaf: leaf.requires_grad_(), adapted(model))
    value = families.logprobs(model.family, model.cfg, model.params, stream(), lora=lora.Lora(params, 1.0)).logp.sum()
    assert len(dense_leaves) == count
    value.backward()
    assert len(dense_leaves) == 2 * count and all(leaf.grad is not None for leaf in tree.leaves(params))


def test_numbers_do_not_depend_on_the_dtype_that_is_computed_in(folder):
    one, other = (hf.load(folder("llama"), dtype=dtype, scheme=Scheme("nf4")) for dtype in (torch.float32, torch.bfloat16))
    for a, b in zip(tree.leaves(one.params), tree.leaves(other.params), strict=True):
        if quant.quantised(a):
            assert torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale) and b.dtype == torch.bfloat16


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", ("llama", "qwen3_moe", "glm4"))
def test_samples_are_those_of_the_dense_weights(family, folder):
    model = hf.load(folder(family), scheme=Scheme("nf4"))
    one, other = (decode.sample(m, [[1, 2, 3], [4, 5]], n=2, max_new_tokens=6, seed=0) for m in (model, quantised.dense(model)))
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.logp, other.logp)


DRAWN = [(scheme, family) for scheme in SCHEMES for family in ("llama", "qwen3_moe", "glm4")]
DRAWN_FAST = [("nf4", "llama"), ("fp4", "glm4"), ("int4", "qwen3_moe"), ("int8", "llama"), ("fp8", "glm4")]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("scheme", "family"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * ((case[0].kind, case[1]) not in DRAWN_FAST), id=f"{case[0].kind}-{case[1]}")
        for case in DRAWN
    ],
)
def test_a_sampler_with_memory_makes_each_leaf_dense_once_and_draws_the_same(family, scheme, folder, monkeypatch):
    model = hf.load(folder(family), scheme=scheme)
    low, count = lora.Lora(adapted(model), 1.5), [0]
    sizes = [4 * leaf.numel() for leaf in tree.leaves(model.params) if quant.quantised(leaf)]
    plain = quant.dense

    def counted(*args):
        count[0] += 1
        return plain(*args)

    monkeypatch.setattr(quant, "dense", counted)
    draws, counts = [], []
    for free in (0, 2 * sum(sizes), 4 * sum(sizes)):
        monkeypatch.setattr(machine, "free_memory", lambda free=free: free)
        count[0] = 0
        draws.append(decode.sample(model, [[1, 2, 3], [4, 5]], n=2, lora=low, max_new_tokens=6, seed=3))
        counts.append(count[0])
    assert all(torch.equal(a, b) for other in draws[1:] for a, b in zip(draws[0], other, strict=True))
    assert counts[0] == 6 * len(sizes) > counts[1] > counts[2] == len(sizes)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", ("phi3", "qwen3_moe", "deepseek_v3"))
def test_embeddings_heads_and_routers_stay_dense(family, folder):
    model = hf.load(folder(family), scheme=Scheme("nf4", experts=False))
    dense_leaves = {path.rpartition(".")[2] for path, leaf in tree.items(model.params) if not quant.quantised(leaf)}
    assert "embed_tokens" in dense_leaves and not {"q_proj", "o_proj"} & dense_leaves
    every = hf.load(folder(family), scheme=Scheme("nf4"))
    stacks = [path for path, leaf in tree.items(every.params) if quant.quantised(leaf) and leaf.ndim == 3]
    assert bool(stacks) == (family != "phi3") and all(not quant.quantised(dict(tree.items(model.params))[path]) for path in stacks)


@pytest.mark.parametrize("family", ("llama", "glm4"))
def test_a_quantised_model_is_the_same_base(family, folder):
    model, other = hf.load(folder(family)), hf.load(folder(family), scheme=Scheme("nf4"))
    assert identity.digest(model) == identity.digest(other)
    assert tree.bytes(other.params) < tree.bytes(model.params)


def test_the_merged_model_is_the_quantised_one_with_the_adapter(folder):
    model = hf.load(folder("llama"), scheme=Scheme("nf4"))
    low = lora.Lora(adapted(model), 1.5)
    merged = model._replace(params=lora.merge(model.params, low.tree, low.scale))
    ids = torch.arange(20)
    assert not any(quant.quantised(leaf) for path, leaf in tree.items(merged.params) if f"{path}.A" in dict(tree.items(low.tree)))
    one, other = families.document_logits(model, ids, lora=low), families.document_logits(merged, ids)
    assert torch.allclose(one, other, atol=1e-5)


def test_an_adapter_folder_says_how_its_base_was_quantised(folder, tmp_path):
    scheme = Scheme("fp4", double=False)
    loaded = hf.load(folder("llama"), scheme=scheme)
    base = loading.identify_base(str(folder("llama")), loaded, scheme)
    start = policy.adapt(loaded, policy.AdapterSpec(rank=2), base=base, seed=0)
    policy.save(start, tmp_path / "adapter")
    assert adapter.base(tmp_path / "adapter").scheme == scheme
    assert quantised.scheme(scheme) == scheme and quantised.scheme(scheme, quant="none") is None


def test_quantised_weights_cannot_train(folder):
    with pytest.raises(ValueError, match=r"q_proj is quantised and cannot train: train an adapter"):
        policy.full(hf.load(folder("llama"), scheme=Scheme("nf4")))


def test_a_leaf_that_trains_whole_starts_as_its_dense_numbers(folder):
    model = hf.load(folder("llama"), scheme=Scheme("nf4"))
    spec_ = policy.AdapterSpec(rank=2, targets=("k_proj",), modules_to_save=("layers.0.q_proj",))
    start = policy.adapt(model, spec_, base=adapter.Base("base", "0"), seed=0)
    leaf = start.params["model"]["layers"][0]["q_proj"]
    assert torch.equal(leaf, shard.gather(model.params["layers"][0]["q_proj"], torch.float32))
    assert MODELS[model.family]


def in_float8(model: Model) -> Model:
    return quantised.multiplied(model, hf.abstract_of(model))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_linear_layers_in_float8_move_the_loss_little_and_pass_gradients(family, folder):
    """Each activation is off by at most 1/16 of itself, at random; experts, routers, embeddings and heads stay as they are."""
    model = hf.load(folder(family), scheme=Scheme("fp8"))
    twin = in_float8(model)
    linear = {path for path, leaf in tree.items(hf.abstract_of(model)) if leaf.op == "linear"}
    assert {path for path, leaf in tree.items(twin.params) if quant.quantised(leaf) and leaf.multiplied} == linear
    (value, gradient), (small, other) = loss_and_gradient(model), loss_and_gradient(twin)
    assert small != value and abs(small - value) < value / 16
    cosines = [
        torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in zip(tree.leaves(gradient), tree.leaves(other), strict=True)
    ]
    assert min(cosines) > 0.9
    for remat in ("full", "selective"):
        again = loss_and_gradient(twin, remat)
        assert torch.equal(again[0], small) and same(again[1], other)


def test_samples_in_float8_have_the_log_probs_of_training_in_float8(folder, monkeypatch):
    """Whatever memory is free: a dense sampler would be another policy."""
    twin = in_float8(hf.load(folder("llama"), scheme=Scheme("fp8")))
    for free in (0, 2**40):
        monkeypatch.setattr(machine, "free_memory", lambda free=free: free)
        drawn = decode.sample(twin, [[3, 4, 5]], n=1, max_new_tokens=6, seed=1)
        tokens = torch.tensor([3, 4, 5, *drawn.tokens[0].tolist()])
        logq = dense.probe(twin.params, tokens, twin.cfg).log_softmax(-1)
        read = logq[2:-1].gather(1, tokens[3:, None])[:, 0]
        torch.testing.assert_close(torch.as_tensor(drawn.logp[0]), read, rtol=1e-4, atol=1e-4)


def test_modules_of_transformers_do_not_multiply_float8(folder):
    model = hf.load(folder("glm4"), scheme=Scheme("fp8"))
    with pytest.raises(ValueError, match="fp8_products: a glm4 model is computed by modules of transformers"):
        in_float8(model)
