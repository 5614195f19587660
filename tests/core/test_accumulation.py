"""The gradient of a step does not depend on how its documents are cut into micro-batches, packed or ordered."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from treetune.core import optim, step, tree
from treetune.core.grad import value_and_grad
from treetune.core.state import TrainState

# Relative, by norm of each leaf. In float32 the order of sums differs with the sizes of products and the vectors of a CPU: up to 1.4e-6 on
# those seen. An error of the split would show in float64.
TOLERANCE = {torch.float32: 4e-6, torch.float64: 1e-12}


def _gradients(objective, params, frozen, micro_batches):
    """{path: gradient} and loss of a step: what the optimiser is given."""
    seen = {}

    def update(grads, state, params, lr, found_inf):
        seen.update(tree.items(tree.map(torch.clone, grads)))
        return params, state

    one = step.make_step(objective, optim.Optimizer(lambda params: {}, update), schedule=optim.constant(1.0), clip=None)
    _, metrics = one(TrainState(params, frozen, {}, {}, torch.tensor(0)), micro_batches)
    return seen, metrics


def _assert_equal(got, want, tolerance):
    assert got.keys() == want.keys()
    for path, leaf in want.items():
        assert leaf.norm() > 0, path
        error = ((got[path] - leaf).norm() / leaf.norm()).item()
        assert error <= tolerance, f"{path}: {error}"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("trains", ["full", "lora"])
def test_every_split_gives_one_gradient(model, adapter, objective, documents, splits, dtype, trains, weighted):
    base = model(dtype)
    lora = adapter(base) if trains == "lora" else None
    trees = ({"model": base.params}, {}) if lora is None else ({"lora": lora.tree}, {"model": base.params})
    found = {name: _gradients(objective(base, lora), *trees, cut) for name, cut in splits(documents(weighted=weighted)).items()}
    assert found.keys() == {"8x1", "4x2", "2x4", "1x8"}
    grads, metrics = found.pop("1x8")
    for other, measured in found.values():
        _assert_equal(other, grads, max(TOLERANCE[dtype], 1e-6) if weighted else TOLERANCE[dtype])  # weights are float32 in the batch
        for key in ("loss", "nll", "mean_token_accuracy", "grad_norm", "num_tokens", "supervised_tokens"):
            torch.testing.assert_close(measured[key], metrics[key], rtol=1e-6, atol=0, check_dtype=False)


def test_the_gradient_is_that_of_the_weighted_mean(model, objective, documents, batch, splits):
    """The oracle: one document at a time, sum of w * nll over sum of w, in float64."""
    base, docs = model(torch.float64), documents(weighted=True)
    terms = objective(base).terms

    def mean(params):
        tops = [terms(params, {}, batch([doc]), None)[0]["nll"] for doc in docs]
        return sum(tops) / sum(sum(doc.weight) for doc in docs), None

    (value, _), want = value_and_grad(mean)({"model": base.params})
    got, metrics = _gradients(objective(base), {"model": base.params}, {}, splits(docs)["4x2"])
    _assert_equal(got, dict(tree.items(want)), 1e-7)  # weights are float32 in the batch
    assert metrics["loss"].item() == pytest.approx(value.item(), rel=1e-7)


def test_order_of_documents_does_not_matter(model, objective, documents, batch):
    base, docs = model(torch.float64), documents()
    forward = _gradients(objective(base), {"model": base.params}, {}, [batch(docs[:3]), batch(docs[3:])])
    backward = _gradients(objective(base), {"model": base.params}, {}, [batch(docs[::-1])])
    _assert_equal(backward[0], forward[0], 1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_only_the_ratio_of_weights_counts(model, objective, documents, batch, scale):
    """Weights that sum to less than 1 are no different."""
    base = model(torch.float64)
    docs = documents(weighted=True)
    scaled = [doc._replace(weight=[scale * w for w in doc.weight]) for doc in docs]
    want = _gradients(objective(base), {"model": base.params}, {}, [batch(docs)])
    got = _gradients(objective(base), {"model": base.params}, {}, [batch(scaled[:4]), batch(scaled[4:])])
    _assert_equal(got[0], want[0], 1e-6)
    assert got[1]["loss"].item() == pytest.approx(want[1]["loss"].item(), rel=1e-6)


@pytest.mark.parametrize("empty", ["no documents", "nothing scored"])
def test_an_empty_micro_batch_adds_exactly_nothing(model, objective, documents, batch, empty):
    base, docs = model(torch.float32), documents()
    hollow = batch([] if empty == "no documents" else [doc._replace(weight=[0.0] * len(doc.tokens)) for doc in docs[:2]])
    one = objective(base)
    (value, _), grads = value_and_grad(lambda params: (one.terms(params, {}, hollow, None)[0]["nll"], None))({"model": base.params})
    assert value == 0 and all((leaf == 0).all() for leaf in tree.leaves(grads))
    alone = _gradients(one, {"model": base.params}, {}, [batch(docs)])
    beside = _gradients(one, {"model": base.params}, {}, [hollow, batch(docs), hollow])
    _assert_equal(beside[0], alone[0], 0.0)
    for key in ("loss", "nll", "mean_token_accuracy"):
        assert beside[1][key] == alone[1][key]


def test_a_step_of_nothing_is_finite_and_changes_nothing(model, objective, batch, start):
    base, optimizer = model(), optim.adamw(weight_decay=0.0)
    state = start({"model": base.params}, {}, optimizer)
    after, metrics = step.make_step(objective(base), optimizer, schedule=optim.constant(0.1))(state, [batch([]), batch([])])
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0 and metrics["skipped"] == 0
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(after.params["model"]), tree.leaves(base.params), strict=True))


def test_rematerialisation_changes_no_gradient(model, adapter, objective, documents, batch):
    base = model(torch.float64)
    lora = adapter(base)
    args = ({"lora": lora.tree}, {"model": base.params}, [batch(documents())])
    plain, again = (_gradients(objective(base, lora, remat), *args)[0] for remat in (None, "full"))
    _assert_equal(again, plain, 1e-13)


def test_padding_at_the_tail_changes_nothing(model, objective, documents, batch):
    base, docs = model(torch.float64), documents()
    short = batch(docs)
    tail = 13
    long = short | {
        "tokens": torch.cat([short["tokens"], torch.full((tail,), 7)]),
        "positions": torch.cat([short["positions"], torch.arange(tail)]),
        "cu_docs": torch.cat([short["cu_docs"], short["cu_docs"][-1:] + tail]),
    }
    want, got = (_gradients(objective(base), {"model": base.params}, {}, [cut]) for cut in (short, long))
    _assert_equal(got[0], want[0], 1e-12)
    assert got[1]["num_tokens"] == want[1]["num_tokens"] == sum(len(doc.tokens) for doc in docs)


class _Scaled(torch.autograd.Function):
    """x * w, whose backward looks how many gradients of leaves that it made before are still there."""

    @staticmethod
    def forward(ctx, x, w, made, alive):
        ctx.save_for_backward(x, w)
        ctx.made, ctx.alive = made, alive
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        ctx.alive.append(sum(not ref.expired() for ref in ctx.made))
        grad = g * x
        ctx.made.append(StorageWeakRef(grad.untyped_storage()))
        return g * w, grad, None, None


def test_gradients_of_later_micro_batches_are_added_as_they_arrive():
    """Two whole trees of gradients never exist at once: of the new ones at most the one that was just made does."""
    params, made, alive = {"layers": [torch.full((4,), 1.0 + i) for i in range(8)]}, [], []

    def fn(params, x):
        for w in params["layers"]:
            x = _Scaled.apply(x, w, made, alive)
        return x.sum(), None

    gradient = value_and_grad(fn)
    _, first = gradient(params, torch.ones(4))
    assert max(alive) == 7  # those of the first micro-batch are the sum
    expected = [leaf * 3 for leaf in tree.leaves(first)]
    made.clear(), alive.clear()
    _, total = gradient(params, torch.full((4,), 2.0), into=first)
    assert max(alive) <= 1
    assert all(torch.equal(got, want) for got, want in zip(tree.leaves(total), expected, strict=True))
    assert all(got is old for got, old in zip(tree.leaves(total), tree.leaves(first), strict=True)), "in place"
