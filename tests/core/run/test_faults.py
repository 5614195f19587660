"""The search for numbers that are not finite and for dead leaves, on the real objective."""

import math

import pytest
import torch

from treetune.core import optim, step, tree
from treetune.core.run import faults


@pytest.fixture
def run(model, objective, documents, batch, start):
    """(objective, optimizer, state, micro-batches of rows 0-3 and 4-7) of a healthy full fine-tune."""
    base, optimizer = model(), optim.adamw()
    docs = documents()
    return objective(base), optimizer, start({"model": base.params}, {}, optimizer), [(batch(docs[:4]), None), (batch(docs[4:]), None)]


def _poisoned(objective, row, where):
    """The objective, but that a row gives a loss, or one leaf a gradient, that is not finite."""

    def terms(params, frozen, batch, plan):
        found, metrics = objective.terms(params, frozen, batch, plan)
        if row not in batch["row"]:
            return found, metrics
        leaf = params["model"]["layers"][1]["up_proj"]
        if where == "loss":
            return {"nll": found["nll"] + math.inf}, metrics
        return {"nll": found["nll"] + (leaf * 0).abs().sum().sqrt()}, metrics

    return objective._replace(terms=terms)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_bad_row_is_named_and_no_weight_moves(run, where):
    objective, optimizer, state, micro_batches = run
    bad = _poisoned(objective, 5, where)
    before = tree.map(torch.clone, [state.params, state.opt])
    state, metrics = step.make_step(bad, optimizer, schedule=optim.constant(0.1))(state, micro_batches)
    assert metrics["skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves([state.params, state.opt]), tree.leaves(before), strict=True))
    text = faults.find_not_finite(bad, state, micro_batches)
    assert "rows [4, 5, 6, 7]" in text and "[0, 1, 2, 3]" not in text
    assert ("is inf" in text) if where == "loss" else ("gradient" in text and "model.layers.1.up_proj" in text and "q_proj" not in text)


def test_bad_weights_are_named_first(run):
    objective, _, state, micro_batches = run
    state.params["model"]["layers"][0]["k_proj"][3, 2] = math.nan
    assert faults.find_not_finite(objective, state, micro_batches) == "weights are not finite: model.layers.0.k_proj"
    state.params["model"]["layers"][0]["k_proj"][3, 2] = 0.0
    text = faults.find_not_finite(objective, state._replace(frozen={"ref": {"w": torch.tensor([math.inf])}}), micro_batches)
    assert text == "weights are not finite: ref.w"


def test_a_sum_that_overflows_is_said_to(run):
    objective, _, state, micro_batches = run
    assert "sum overflowed" in faults.find_not_finite(objective, state, micro_batches)


def test_dead_leaves_are_named(model, adapter, objective, documents, batch, start):
    """A fresh adapter's A has no gradient at the first step and has one at the second; an unused leaf never has."""
    from treetune.core import lora

    base = model()
    fresh = adapter(base)._replace(tree=lora.init(base.params, ["layers.0.q_proj", "layers.1.up_proj"], rank=2, seed=0))
    optimizer, one, pairs = optim.adamw(), objective(base, fresh), [(batch(documents()), None)]
    state = start({"lora": fresh.tree, "model": {"spare": torch.ones(3)}}, {"model": base.params}, optimizer)
    up = ["lora.layers.0.q_proj.A", "lora.layers.1.up_proj.A", "model.spare"]
    assert faults.dead_leaves(one, state, pairs) == up
    state, metrics = step.make_step(one, optimizer, schedule=optim.constant(0.01))(state, pairs)
    assert metrics["dead_leaves"] == 3
    assert faults.dead_leaves(one, state, pairs) == ["model.spare"]
    state, metrics = step.make_step(one, optimizer, schedule=optim.constant(0.01))(state, pairs)
    assert metrics["dead_leaves"] == 1
