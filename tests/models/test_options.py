"""Dropout, NEFTune, adapters on the ends, and rematerialisation: what they compute, and that packing does not change it."""

import pytest
import torch
from torch.utils import _pytree as pytree

from treetune import models
from treetune.core import grad, lora, tree
from treetune.models import dense, hf
from treetune.ops import attention

SEED = torch.tensor(5)


@pytest.fixture(scope="module")
def ours(oracle):
    return hf.load(oracle("qwen2", True)[1])


def adapter(model, targets="all-linear", dropout=0.0, seed=0):
    abstract = hf.abstract_of(model, head=True)
    generator = torch.Generator().manual_seed(seed)
    fresh = lora.init(abstract, lora.match(abstract, targets), rank=4, seed=seed)
    moved = tree.map(lambda leaf: leaf + 0.1 * torch.randn(leaf.shape, generator=generator), fresh)
    return lora.Lora(moved, 0.5, dropout, SEED)


def logp(model, batch, **options):
    return models.logprobs(model.family, model.cfg, model.params, batch, **options).logp


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "options",
    [
        lambda model: {"noise": dense.Neftune(5.0, SEED)},
        lambda model: {"lora": adapter(model, dropout=0.3)},
        lambda model: {"lora": adapter(model, ["lm_head"], dropout=0.3)},
        lambda model: {"lora": adapter(model, [".*"], dropout=0.3), "noise": dense.Neftune(5.0, SEED)},
    ],
)
def test_noise_does_not_depend_on_packing_or_order(ours, documents, stream, options):
    rows, extra = [40, 7, 12, 3], options(ours)
    packed = logp(ours, stream(documents, rows), **extra)
    alone = [logp(ours, stream([ids], [row]), **extra) for ids, row in zip(documents, rows, strict=True)]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=0)
    backwards = logp(ours, stream(documents[::-1], rows[::-1]), **extra)
    torch.testing.assert_close(backwards, torch.cat(alone[::-1]), atol=1e-5, rtol=0)
    other = logp(ours, stream(documents, [row + 1 for row in rows]), **extra)
    assert (other - packed).abs().max() > 1e-2  # another data row, another draw


def test_dropout_and_its_seed_change_the_run(ours, documents, stream):
    batch = stream(documents)
    quiet, loud = adapter(ours), adapter(ours, dropout=0.3)
    assert not torch.allclose(logp(ours, batch, lora=quiet), logp(ours, batch, lora=loud))
    other = loud._replace(seed=SEED + 1)
    assert not torch.allclose(logp(ours, batch, lora=other), logp(ours, batch, lora=loud))
    # Each adapter's input is dropped; the base model's is not: without adapters nothing changes.
    empty = lora.Lora(tree.map(torch.zeros_like, loud.tree), 0.5, 0.3, SEED)
    torch.testing.assert_close(logp(ours, batch, lora=empty), logp(ours, batch), atol=1e-6, rtol=0)


def test_neftune_moves_embeddings_by_its_formula(ours, documents, stream):
    batch = stream(documents)
    plan = attention.plan(batch)

    def embeddings(noise):
        return dense.forward(ours.params, batch, plan, ours.cfg, noise=noise, collect=(0,)).features[0]

    moved = embeddings(dense.Neftune(5.0, SEED)) - embeddings(None)
    for lo, hi in zip(batch["cu_docs"], batch["cu_docs"][1:], strict=False):
        bound = 5.0 / float((hi - lo) * 32) ** 0.5
        part = moved[lo:hi].abs()
        assert part.max() <= bound * (1 + 1e-5) and part.max() > 0.9 * bound
        assert part.mean() == pytest.approx(bound / 2, rel=0.25)
    assert torch.equal(embeddings(dense.Neftune(0.0, SEED)), embeddings(None))


def test_adapters_compute_the_merged_weights(ours, documents, stream):
    """Every leaf adapted at once, with dropout off: the same log-probs as W + s B A, and gradients by float64 differences."""
    batch, low = stream(documents), adapter(ours, [".*"])
    merged = ours._replace(params=lora.merge(ours.params, low.tree, low.scale))
    torch.testing.assert_close(logp(ours, batch, lora=low), logp(merged, batch), atol=2e-5, rtol=0)
    double = ours._replace(params=tree.map(lambda leaf: leaf.double(), ours.params), cfg=_double(ours.cfg))
    tree_ = tree.map(lambda leaf: leaf.double(), low.tree)

    def loss(leaves, _=None):
        return -logp(double, batch, lora=low._replace(tree=leaves)).mean(), None

    (_, _), grads = grad.value_and_grad(loss)(tree_)
    generator = torch.Generator().manual_seed(0)
    way = tree.map(lambda leaf: torch.randn(leaf.shape, generator=generator, dtype=torch.float64), tree_)
    for path in ("lm_head", "embed_tokens", r"layers\.1\.v_proj"):
        step = tree.map(lambda leaf: torch.zeros_like(leaf), way)
        step = tree.merge(step, tree.select(way, path))
        sides = [loss(tree.map(lambda leaf, d, s=sign: leaf + s * 1e-5 * d, tree_, step))[0] for sign in (1, -1)]
        slope = sum((g * d).sum() for g, d in zip(tree.leaves(grads), tree.leaves(step), strict=True))
        assert abs(slope) > 1e-3
        assert float((sides[0] - sides[1]) / 2e-5) == pytest.approx(float(slope), rel=1e-5)


def _double(cfg):
    from dataclasses import replace

    return replace(cfg, dtype=torch.float64)


def test_a_small_head_adapter_is_not_rounded_away_in_bfloat16(oracle, documents):
    """A change of 1e-4 of the weights is below bfloat16's resolution of them; the logits must still show it."""
    wide, low = (hf.load(oracle("llama")[1], dtype=dtype) for dtype in (torch.float64, torch.bfloat16))
    ids = torch.tensor(documents[1])
    tree_ = {"lm_head": {"A": torch.randn(4, 32) * 0.1, "B": torch.randn(96, 4) * 1e-3}}
    plan = attention.plan(dense.single(ids))

    def change(model):
        hidden = dense.forward(model.params, dense.single(ids), plan, model.cfg).hidden
        used = lora.Lora(tree.map(lambda leaf: leaf.to(model.cfg.dtype), tree_), 1.0)
        product = dense.widen(hidden, model.cfg, used).float() @ dense.head(model.params, model.cfg, used).float().T
        return (product - hidden.float() @ dense.head(model.params, model.cfg).float().T).flatten()

    expected, got = change(wide), change(low)
    assert torch.nn.functional.cosine_similarity(expected, got, dim=0) > 0.995
    assert expected.abs().max() < 0.02


def test_rematerialisation_changes_no_gradient(ours, documents, stream):
    batch, used = stream(documents), adapter(ours, dropout=0.2)

    def gradients(remat):
        def loss(leaves):
            return -logp(ours, batch, lora=used._replace(tree=leaves), remat=remat).mean(), None

        return grad.value_and_grad(loss)(used.tree)

    (one, _), plain = gradients(None)
    (two, _), again = gradients("full")
    assert torch.equal(one, two)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(plain), tree.leaves(again), strict=True))
    assert all(leaf.abs().max() > 0 for leaf in tree.leaves(plain))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_rematerialised_layer_is_given_its_own_leaves_only(ours, documents, stream, monkeypatch, dropout):
    """`checkpoint` walks its arguments at every layer: the adapters of all of them would cost more than the layer's own work."""
    given, plain = [], grad.checkpoint
    monkeypatch.setattr(grad, "checkpoint", lambda fn, *args, **options: given.append(args) or plain(fn, *args, **options))
    used = adapter(ours, [".*"], dropout=dropout)
    logp(ours, stream(documents), lora=used, remat="full")
    name = {id(leaf): path for path, leaf in tree.items({"base": ours.params, "adapter": used.tree})}
    assert len(given) == ours.cfg.num_layers > 1
    for i, args in enumerate(given):
        seen = {name[id(leaf)] for leaf in pytree.tree_leaves(args) if id(leaf) in name}
        own = [path for path in name.values() if path.startswith((f"base.layers.{i}.", f"adapter.layers.{i}."))]
        assert seen == set(own) and len([path for path in own if path.startswith("adapter.")]) == 14


def test_whole_leaves_laid_over_the_model(ours, documents, stream):
    """A tied model whose head is trained whole reads its embedding from one leaf and its logits from the other."""
    batch = stream(documents)
    over = {"lm_head": ours.params["embed_tokens"].flip(0)}
    both = logp(ours._replace(params=tree.merge(ours.params, over)), batch)
    assert not torch.allclose(both, logp(ours, batch))
    hidden = dense.forward(ours.params, batch, attention.plan(batch), ours.cfg).hidden[batch["at"]]
    expected = (hidden @ over["lm_head"].T).log_softmax(-1).gather(1, batch["targets"][:, None])[:, 0]
    torch.testing.assert_close(both, expected, atol=1e-5, rtol=0)
