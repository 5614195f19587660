"""The path that trains (packed stream, fused projections, chunked head) against a dense float64 model written apart from it."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from treetune.core import optim, step, tree
from treetune.core.grad import value_and_grad
from treetune.core.state import TrainState
from treetune.models import logprobs


@pytest.fixture(scope="module")
def oracle():
    spec = importlib.util.spec_from_file_location("oracle_llama", Path(__file__).parents[1] / "oracle" / "llama.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _fused(objective, params, frozen, cuts):
    """Loss and gradients of a step as the optimiser gets them."""
    seen = {}

    def update(grads, state, params, lr, found_inf):
        seen.update(tree.items(tree.map(torch.clone, grads)))
        return params, state

    one = step.make_step(objective, optim.Optimizer(lambda p: {}, update), schedule=optim.constant(1.0), clip=None)
    _, metrics = one(TrainState(params, frozen, {}, {}, torch.tensor(0)), cuts)
    return metrics["loss"].item(), seen


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("trains", ["full", "lora", "both"])
def test_loss_and_every_gradient_leaf_equal_the_dense_model(oracle, model, adapter, objective, documents, batch, trains, tied):
    base, docs = model(torch.float32, tied=tied), documents(weighted=True)
    used = None if trains == "full" else adapter(base)
    params = {} if trains == "lora" else {"model": base.params}
    params |= {} if used is None else {"lora": used.tree}
    frozen = {"model": base.params} if trains == "lora" else {}
    loss, grads = _fused(objective(base, used), params, frozen, [batch(docs[:5]), batch(docs[5:])])

    def dense(p):
        weights = p.get("model", tree.map(torch.Tensor.double, base.params))
        return oracle.mean_nll(weights, base.cfg, docs, p.get("lora"), 0.7), None

    (want, _), exact = value_and_grad(dense)(tree.map(torch.Tensor.double, params))
    assert loss == pytest.approx(want.item(), rel=1e-5)
    for path, leaf in tree.items(exact):
        assert leaf.norm() > 1e-6, path
        assert F.cosine_similarity(grads[path].double().flatten(), leaf.flatten(), dim=0) > 0.99999, path
        assert grads[path].double().norm().item() == pytest.approx(leaf.norm().item(), rel=1e-4), path


@pytest.mark.parametrize("trains", ["full", "lora"])
def test_weights_after_three_steps_equal_torch_on_the_dense_model(oracle, model, adapter, objective, documents, batch, start, trains):
    """What the optimiser makes of the gradients, too: its kernel walks flat memory, and some gradients come transposed."""
    base, docs = model(), documents(weighted=True)
    used = adapter(base) if trains == "lora" else None
    params, frozen = ({"model": base.params}, {}) if used is None else ({"lora": used.tree}, {"model": base.params})
    optimizer = optim.adamw(eps=1e-3)  # an eps that keeps the noise of tiny gradients from deciding a sign
    state = start(params, frozen, optimizer)
    one = step.make_step(objective(base, used), optimizer, schedule=optim.constant(0.03), clip=None)
    exact = tree.map(lambda leaf: leaf.double().requires_grad_(), params)
    reference = torch.optim.AdamW(tree.leaves(exact), lr=0.03, eps=1e-3, weight_decay=0.0)
    weights = exact.get("model") or tree.map(torch.Tensor.double, base.params)
    for _ in range(3):
        state, _ = one(state, [batch(docs[:5]), batch(docs[5:])])
        reference.zero_grad()
        oracle.mean_nll(weights, base.cfg, docs, exact.get("lora"), 0.7).backward()
        reference.step()
    for (path, leaf), want, old in zip(tree.items(state.params), tree.leaves(exact), tree.leaves(params), strict=True):
        moved = (want.detach() - old).norm()
        assert (leaf - want.detach()).norm() <= 1e-4 * moved and moved > 0.01, path


@pytest.mark.parametrize("want", [(), ("top1",), ("entropy", "mean_logit")])
def test_masked_data_has_one_loss_with_every_head(model, documents, batch, monkeypatch, want):
    """The chunked head and its dense twin read the same rows: a mask cannot be lost on the way."""
    from treetune.models import families
    from treetune.ops import linear_logprob

    base, stream = model(torch.float64), batch(documents(weighted=True))
    docs = documents(weighted=True)
    assert 0 < stream["at"].numel() < stream["tokens"].numel() - len(docs), "some tokens are masked"

    def loss(params):
        stats = logprobs("llama", base.cfg, params, stream, want=want)
        return -(stream["weight"] * stats.logp).sum() / stream["weight"].sum(), None

    (value, _), grads = value_and_grad(loss)(base.params)
    monkeypatch.setattr(families, "linear_logprob", linear_logprob.linear_logprob_ref)
    (dense, _), expected = value_and_grad(loss)(base.params)
    assert value.item() == pytest.approx(dense.item(), rel=1e-12)
    for (path, got), leaf in zip(tree.items(grads), tree.leaves(expected), strict=True):
        torch.testing.assert_close(got, leaf, rtol=1e-9, atol=1e-12, msg=lambda text, path=path: f"{path}: {text}")


def test_tokens_after_the_last_scored_one_and_unscored_documents_have_no_effect(model, documents, batch):
    """A masked position cannot leak: it is not there. Its embedding gets a gradient only through attention."""
    base, docs = model(torch.float64), documents()
    hollow = docs[3]
    assert not any(hollow.weight)
    for change in (hollow._replace(tokens=[(t + 1) % 53 for t in hollow.tokens]), hollow._replace(tokens=[0], weight=[0.0])):
        streams = [batch(docs), batch([*docs[:3], change, *docs[4:]])]
        one, other = (logprobs("llama", base.cfg, base.params, stream).logp for stream in streams)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
