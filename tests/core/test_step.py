"""Clipping, weighting of terms and metrics, skipping, prepare: on objectives small enough to work out by hand."""

import math

import pytest
import torch

from treetune.core import optim, step, tree
from treetune.core.state import Metric, Objective, TrainState


def _linear(nan_row: int | None = None) -> Objective:
    """terms: fit = sum of w . x over rows, size = 0.5 |v|^2 per row; denominators: rows, and 10 per micro-batch."""

    def terms(params, frozen, batch, plan):
        fit = (batch["x"] @ params["w"]).sum()
        if nan_row is not None:
            fit = fit + torch.where(batch["row"] == nan_row, math.nan, 0.0).sum() * params["w"].sum()
        size = 0.5 * params["v"].square().sum() * batch["x"].shape[0]
        rows = torch.tensor(float(batch["x"].shape[0]))
        seen = {"mean_x": Metric(batch["x"].mean(), rows), "rows": Metric(rows, rows, "sum"), "low": Metric(batch["x"].min(), rows, "min")}
        return {"fit": fit, "size": size}, seen | {"high": Metric(batch["x"].max(), rows, "max")}

    def counts(batch):
        return {"fit": torch.tensor(batch["x"].shape[0]), "size": torch.tensor(10)}

    return Objective(counts, terms)


def _batches(*sizes):
    gen = torch.Generator().manual_seed(3)
    out, first = [], 0
    for size in sizes:
        out.append({"x": torch.randn(size, 3, generator=gen), "row": torch.arange(first, first + size)})
        first += size
    return out


def _state(optimizer):
    params = {"w": torch.tensor([1.0, -2.0, 0.5]), "v": torch.tensor([3.0, 4.0])}
    return TrainState(params, {}, optimizer.init(params), {}, torch.tensor(0))


def _step(batches, *, objective=None, optimizer=None, **options):
    optimizer = optimizer or optim.sgd()
    one = step.make_step(objective or _linear(), optimizer, schedule=optim.constant(1.0), **({"clip": None} | options))
    return one(_state(optimizer), batches)


def test_terms_are_divided_by_their_own_global_counts():
    """dL/dw = sum x / rows; dL/dv = v rows / (10 per micro-batch); the loss is the sum of both quotients."""
    batches = _batches(4, 1, 7)
    after, metrics = _step(batches)
    x, before = torch.cat([batch["x"] for batch in batches]), _state(optim.sgd()).params
    torch.testing.assert_close(after.params["w"], before["w"] - x.mean(0))
    torch.testing.assert_close(after.params["v"], before["v"] * (1 - 12 / 30))
    assert metrics["loss"].item() == pytest.approx((x @ before["w"]).mean().item() + 12.5 * 12 / 30, rel=1e-6)
    assert int(after.step) == 1


def test_metrics_are_weighted_means_sums_and_extremes():
    batches = _batches(4, 1, 7)
    _, metrics = _step(batches)
    x = torch.cat([batch["x"] for batch in batches])
    assert metrics["mean_x"].item() == pytest.approx(x.mean().item(), rel=1e-6)
    assert metrics["rows"] == 12 and metrics["low"] == x.min() and metrics["high"] == x.max()
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())


def test_a_mean_over_nothing_does_not_spoil_the_others():
    nothing = {"a": Metric(torch.tensor(math.nan), torch.tensor(0))}
    some = {"a": Metric(torch.tensor(2.0), torch.tensor(3))}
    assert step.reduce_metrics([nothing, some])["a"] == 2
    assert math.isnan(step.reduce_metrics([nothing])["a"]), "unknown"
    assert math.isnan(step.reduce_metrics([some, {"a": Metric(torch.tensor(math.nan), torch.tensor(1))}])["a"])


@pytest.mark.parametrize(("how", "value"), [("min", 2.0), ("max", 3.0)])
def test_an_extreme_of_nothing_is_unknown_and_no_neutral_value(how, value):
    counted = [{"a": Metric(torch.tensor(x), torch.tensor(w), how)} for x, w in ((2.0, 1), (3.0, 4), (-9.0, 0), (9.0, 0), (math.nan, 0))]
    assert step.reduce_metrics(counted)["a"] == value
    assert math.isnan(step.reduce_metrics(counted[2:])["a"])
    broken = [*counted, {"a": Metric(torch.tensor(math.nan), torch.tensor(1), how)}]
    assert math.isnan(step.reduce_metrics(broken)["a"]), "a nan that was counted shows"
    assert step.reduce_metrics([{"a": Metric(torch.tensor(5.0), torch.tensor(0), "sum")}])["a"] == 5


def test_a_metric_that_only_some_micro_batches_have():
    assert step.reduce_metrics([{}, {"a": Metric(torch.tensor(2.0), torch.tensor(3))}]) == {"a": 2}


@pytest.mark.parametrize("limit", [None, 1e3, 0.5])
def test_clipping_scales_the_whole_gradient_to_the_limit(limit):
    free, metrics = _step(_batches(4, 2))
    clipped, reported = _step(_batches(4, 2), clip=limit)
    before, norm = _state(optim.sgd()).params, metrics["grad_norm"].item()
    moved = {key: before[key] - free.params[key] for key in before}
    assert norm == pytest.approx(math.sqrt(sum(leaf.square().sum().item() for leaf in moved.values())), rel=1e-6)
    factor = 1.0 if limit is None else min(1.0, limit / norm)
    for key, leaf in moved.items():
        torch.testing.assert_close(before[key] - clipped.params[key], factor * leaf, rtol=1e-5, atol=1e-6)
    assert reported["grad_norm"] == metrics["grad_norm"], "the norm is reported before clipping"


@pytest.mark.parametrize("kind", ["adamw", "sgd", "lion"])
@pytest.mark.parametrize("row", [0, 5, None])
def test_a_nan_in_any_micro_batch_skips_the_step(kind, row):
    optimizer = {"adamw": optim.adamw(), "sgd": optim.sgd(momentum=0.9), "lion": optim.lion()}[kind]
    after, metrics = _step(_batches(4, 2), objective=_linear(nan_row=row), optimizer=optimizer, clip=1.0)
    before = _state(optimizer)
    same = [
        torch.equal(a, b) for a, b in zip(tree.leaves([after.params, after.opt]), tree.leaves([before.params, before.opt]), strict=True)
    ]
    assert metrics["skipped"] == (row is not None) and all(same) == (row is not None)
    assert int(after.step) == 1


def test_an_infinite_gradient_of_a_finite_loss_skips_the_step():
    def terms(params, frozen, batch, plan):
        return {"root": (params["w"] * 0).abs().sum().sqrt() + params["v"].sum()}, {}

    one = Objective(lambda batch: {"root": torch.tensor(1)}, terms)
    after, metrics = _step(_batches(1), objective=one, clip=1.0)
    assert torch.isfinite(metrics["loss"]) and metrics["skipped"] == 1
    assert torch.equal(after.params["v"], torch.tensor([3.0, 4.0]))


def test_dead_leaves_are_counted():
    def terms(params, frozen, batch, plan):
        return {"only_w": (batch["x"] @ params["w"]).sum()}, {}

    _, metrics = _step(_batches(2), objective=Objective(lambda batch: {"only_w": torch.tensor(1)}, terms))
    assert metrics["dead_leaves"] == 1
    assert _step(_batches(2))[1]["dead_leaves"] == 0


def test_prepare_sees_the_whole_step_without_gradients_and_may_replace_it():
    seen = []

    def prepare(state, micro_batches):
        seen.append((len(micro_batches), torch.is_grad_enabled(), int(state.step)))
        return [{**batch, "x": batch["x"] * 2} for batch in micro_batches]

    doubled, _ = _step([{**batch, "x": batch["x"] * 2} for batch in _batches(4, 2)])
    after, _ = _step(_batches(4, 2), prepare=prepare)
    assert seen == [(2, False, 0)]
    assert torch.equal(after.params["w"], doubled.params["w"])


def test_the_rate_of_a_step_is_that_of_its_number():
    optimizer = optim.sgd()
    one = step.make_step(_linear(), optimizer, schedule=optim.linear(0.8, 4), clip=None)
    state, rates = _state(optimizer), []
    for _ in range(5):
        state, metrics = one(state, _batches(2))
        rates.append(round(metrics["learning_rate"].item(), 6))
    assert rates == [0.8, 0.6, 0.4, 0.2, 0.0]


def test_a_micro_batch_may_bring_its_plan():
    def terms(params, frozen, batch, plan):
        return {"a": params["w"].sum() * plan}, {}

    one = Objective(lambda batch: {"a": torch.tensor(2)}, terms)
    after, _ = _step([(batch, scale) for batch, scale in zip(_batches(1, 1), (3.0, 5.0), strict=True)], objective=one)
    torch.testing.assert_close(after.params["w"], torch.tensor([1.0, -2.0, 0.5]) - (3 + 5) / (2 + 2))


def test_low_precision_leaves_accumulate_in_float32():
    """257 equal gradients: a bfloat16 sum would stop growing on the way."""
    params = {"w": torch.zeros(1, dtype=torch.bfloat16)}
    one = Objective(lambda batch: {"a": torch.tensor(1)}, lambda p, f, b, plan: ({"a": p["w"].float().sum()}, {}))
    got = {}

    def update(grads, state, params, lr, found_inf):
        got.update(grads)
        return params, state

    stepper = step.make_step(one, optim.Optimizer(lambda p: {}, update), schedule=optim.constant(1.0), clip=None)
    stepper(TrainState(params, {}, {}, {}, torch.tensor(0)), [{}] * 257)
    each = torch.tensor(1 / 257, dtype=torch.bfloat16).item()
    assert got["w"].dtype == torch.float32 and got["w"].item() == pytest.approx(257 * each, rel=1e-6)


def test_evaluation_equals_the_loss_of_a_step_and_keeps_no_graph():
    batches = _batches(4, 1, 7)
    _, metrics = _step(batches)
    found = step.make_eval(_linear())(_state(optim.sgd()), batches)
    assert found["loss"].item() == pytest.approx(metrics["loss"].item(), rel=1e-6) and found["mean_x"] == metrics["mean_x"]
    assert not found["loss"].requires_grad
