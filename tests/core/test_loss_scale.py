"""Loss scaling: the update is that without it where nothing overflows, an overflow changes no weight, and the scale follows its rule."""

import torch

from treetune.core import loss_scale, optim, optim_averages, step
from treetune.core.loss_scale import Pace
from treetune.core.state import Metric, Objective, TrainState


def objective(scale_of_loss=1.0, dtype=torch.float32):
    """(w x - 1)^2 over three numbers, computed in `dtype`."""

    def terms(params, frozen, batch, plan):
        y = (params["w"].to(dtype) * batch["x"].to(dtype)).float()
        value = scale_of_loss * ((y - 1) ** 2).sum()
        return {"square": value}, {"seen": Metric(value, torch.tensor(1.0), "mean")}

    return Objective(lambda batch: {"square": torch.tensor(3.0)}, terms)


def run(pace, steps, target, x=(1.0, 2.0, 0.5), lr=0.1):
    inner = optim.sgd()
    optimizer = inner if pace is None else loss_scale.scaled(inner, pace)
    params = {"w": torch.tensor([0.3, -0.2, 0.7])}
    state = TrainState(params, {}, optimizer.init(params), {}, torch.tensor(0))
    one, seen = step.make_step(target, optimizer, schedule=optim.constant(lr), clip=None), []
    for _ in range(steps):
        state, metrics = one(state, [{"x": torch.tensor(x)}])
        seen.append(metrics)
    return state, seen


def test_a_power_of_two_changes_no_bit_of_an_update():
    scaled, plain = run(Pace(2.0**10), 5, objective()), run(None, 5, objective())
    assert torch.equal(scaled[0].params["w"], plain[0].params["w"])
    for one, other in zip(scaled[1], plain[1], strict=True):
        assert torch.equal(one["loss"], other["loss"]) and torch.equal(one["grad_norm"], other["grad_norm"])
        assert one["loss_scale"] == 2.0**10 and "loss_scale" not in other


def test_an_overflow_changes_no_weight_and_halves_the_scale():
    state, seen = run(Pace(2.0**20), 1, objective(dtype=torch.float16), x=(60000.0, 1.0, 1.0))
    assert seen[0]["skipped"] == 1 and torch.equal(state.params["w"], torch.tensor([0.3, -0.2, 0.7]))
    assert state.opt["loss_scale"] == {"value": torch.tensor(2.0**19), "steps": torch.tensor(0.0)}


def test_the_scale_doubles_after_its_interval():
    state, seen = run(Pace(4.0, interval=3), 7, objective())
    assert [int(metrics["loss_scale"]) for metrics in seen] == [4, 4, 4, 8, 8, 8, 16]
    assert state.opt["loss_scale"]["value"] == 16 and state.opt["loss_scale"]["steps"] == 1


def test_gradients_below_float16_survive():
    """A gradient of about 1e-9 is 0 in float16 without scaling."""
    tiny = objective(1e-9, torch.float16)
    plain, scaled = run(None, 1, tiny, lr=1e8), run(Pace(2.0**16), 1, tiny, lr=1e8)
    assert plain[1][0]["grad_norm"] == 0 and scaled[1][0]["grad_norm"] > 0
    wide = run(None, 1, objective(1e-9), lr=1e8)
    assert torch.allclose(scaled[0].params["w"], wide[0].params["w"], rtol=5e-3)


def test_the_average_of_a_schedule_free_optimizer_is_still_shown():
    inner = optim_averages.schedule_free_adamw()
    assert loss_scale.scaled(inner).averaged is inner.averaged
