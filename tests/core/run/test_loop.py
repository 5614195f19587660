"""The loop of a run on a model of one number: steps, evaluation, checkpoints, stopping. No model of language, no terminal."""

import re
import threading
from functools import partial

import pytest
import torch

from treetune.core import ckpt, import_path, optim
from treetune.core import step as steps
from treetune.core.run import folder, loop, observers, source
from treetune.core.run.errors import RunFailed
from treetune.core.state import Metric, Objective, TrainState


def objective(scale=1.0):
    """Half the squared distance of w from the numbers of a batch."""

    def terms(params, frozen, batch, plan):
        error = (params["w"] - batch["x"]) * scale
        count = torch.tensor(float(len(batch["x"])))
        return {"square": error.square().sum() / 2}, {"distance": Metric(error.abs().mean(), count)}

    return Objective(lambda batch: {"square": torch.tensor(float(len(batch["x"])))}, terms)


def batch(*values):
    zeros = torch.zeros(len(values), dtype=torch.int64)
    return {"x": torch.tensor(values), "row": zeros, "tokens": zeros, "at": zeros, "cu_docs": torch.tensor([0, len(values)])}, None


def start(optimizer, w=4.0):
    params = {"w": torch.tensor([w])}
    return TrainState(params, {}, optimizer.init(params), {}, torch.tensor(0))


def given(total=6, values=(1.0, 2.0, 3.0), **options):
    """(step, source, state) of a run."""
    optimizer = optim.sgd()
    step = steps.make_step(objective(**options), optimizer, schedule=optim.constant(0.5), clip=None)
    return step, source.Fixed([[batch(value)] for value in values], total_steps=total), start(optimizer)


def evaluate(state):
    return {"loss": (state.params["w"] - 2).abs().sum()}


def run_dir(tmp_path, name="run", **request):
    request = folder.Request("sft", str(tmp_path / name), **request)
    with folder.hold(request) as run:
        if request.resume is None:
            folder.create(run, "seed: 1\n", makes=("model",))
        yield run


class Log(observers.Observer):
    """All that an observer is told, by the names of the events."""

    def __init__(self):
        self.events = []

    def start(self, total_steps, step, about):
        self.events.append(("start", step))

    def step(self, record):
        self.events.append(("step", record["step"]))

    def evaluation(self, record):
        self.events.append(("evaluation", record["step"]))

    def end(self, stopped, history):
        self.events.append(("end", stopped))


def test_a_run_without_a_folder_steps_evaluates_and_tells():
    log = Log()
    step, numbers, state = given()
    outcome = loop.run(step, numbers, state, evaluate=evaluate, observers=observers.Observers([log]), settings=loop.Settings(eval_steps=3))
    told = [("start", 0), ("evaluation", 0), *[("step", n) for n in (1, 2, 3)], ("evaluation", 3), *[("step", n) for n in (4, 5, 6)]]
    assert log.events == [*told, ("evaluation", 6), ("end", None)]
    assert int(outcome.state.step) == 6 and outcome.stopped is None and outcome.progress.best is not None


def test_a_resumed_run_ends_on_the_same_bits(tmp_path):
    whole = loop.run(*given())
    (run,) = run_dir(tmp_path)
    step, numbers, state = given(total=4)
    loop.run(step, numbers, state, folder=run, settings=loop.Settings(save_steps=2))
    assert [path.name for path in ckpt.steps(run.checkpoints)] == ["step_000002", "step_000004"]
    (run,) = run_dir(tmp_path, resume=str(run.checkpoints / "step_000002"))
    step, numbers, state = given()
    state, meta = loop.restore(run, state, numbers)
    assert numbers.state() == {"cursor": [0, 2]}
    outcome = loop.run(step, numbers, state, folder=run, hooks=loop.Hooks(resumed=meta))
    assert torch.equal(outcome.state.params["w"], whole.state.params["w"]) and int(outcome.state.step) == 6


def test_the_best_checkpoint_is_kept_and_patience_ends_the_run(tmp_path):
    """w goes to 1 and away from 2, so only the second evaluation is a new best."""
    (run,) = run_dir(tmp_path)
    step, numbers, state = given(total=40, values=(1.0,))
    settings = loop.Settings(eval_steps=1, save_total_limit=1, early_stopping_patience=3)
    outcome = loop.run(step, numbers, state, evaluate=evaluate, folder=run, settings=settings)
    assert outcome.stopped == "eval/loss has not improved in 3 evaluations"
    names = [path.name for path in ckpt.steps(run.checkpoints)]
    assert f"step_{outcome.progress.best_step:06d}" in names and len(names) == 2


def test_a_run_works_in_a_thread_and_stops_when_it_is_asked():
    outcomes, asked = [], threading.Event()

    def stop():
        return 15 if asked.is_set() else None

    def ask(event, record):
        if event == "step" and record["step"] == 2:
            asked.set()

    group = observers.Observers([observers.of(ask, "ask", pytest.fail)])
    call = partial(loop.run, *given(), observers=group, hooks=loop.Hooks(stop=stop))
    thread = threading.Thread(target=lambda: outcomes.append(call()))
    thread.start()
    thread.join(60)
    (outcome,) = outcomes
    assert (outcome.stopped, outcome.signum, int(outcome.state.step)) == ("interrupted", 15, 3)


def test_a_step_that_is_not_finite_ends_the_run_with_its_row():
    step, numbers, state = given(values=(1.0, float("nan")))
    log = Log()
    with pytest.raises(
        RunFailed, match=r"step 2 is not finite, no weight was changed: the loss of rows \[0\] is nan; there is no checkpoint"
    ):
        loop.run(step, numbers, state, hooks=loop.Hooks(objective()), observers=observers.Observers([log]))
    assert log.events[-1][0] == "end" and log.events[-1][1].startswith("failed: step 2")


def test_the_watchdog_ends_a_run_above_its_threshold():
    step, numbers, state = given(values=(100.0,), total=20)
    settings = loop.Settings(loss_watchdog_threshold=1e-3, loss_watchdog_patience=2)
    with pytest.raises(RunFailed, match=r"train/loss was above 0.001 for 2 steps, up to step 2"):
        loop.run(step, numbers, state, settings=settings)


@pytest.mark.parametrize("every", [2, 5])
def test_a_source_that_ends_ends_the_run_with_its_numbers(every, tmp_path):
    class Short(source.Fixed):
        def next(self, state, step):
            if step == 3:
                raise StopIteration
            return super().next(state, step)

    step, _, state = given()
    (run,) = run_dir(tmp_path)
    settings = loop.Settings(eval_steps=every)
    outcome = loop.run(step, Short([[batch(1.0)]], total_steps=9), state, evaluate=evaluate, folder=run, settings=settings)
    assert int(outcome.state.step) == 2 and outcome.stopped == "the source ended after step 2"
    assert [(record["step"], "eval/loss" in record) for record in outcome.history] == [(0, True), (1, False), (2, False), (2, True)]
    assert ckpt.steps(run.checkpoints)[-1].name == "step_000002"


def test_a_batch_without_a_plan_trains_to_the_end():
    objective = Objective(lambda batch: {"x": batch["n"]}, lambda p, f, batch, plan: ({"x": (p["w"] * batch["x"]).sum().square()}, {}))
    sgd = optim.sgd()
    params = {"w": torch.ones(2)}
    state = TrainState(params, {}, sgd.init(params), {}, torch.tensor(0))
    stepper = steps.make_step(objective, sgd, schedule=lambda step: torch.tensor(0.1))
    bare = {"x": torch.ones(2), "n": torch.tensor(1), "row": torch.tensor([0])}
    outcome = loop.run(stepper, source.Fixed([[bare]], total_steps=3), state, hooks=loop.Hooks(objective))
    assert int(outcome.state.step) == 3


def test_what_a_function_of_the_user_does_wrong_ends_the_run_with_its_step():
    step, numbers, state = given()

    def failing(error):
        def fails(state, micro_batches):
            if int(state.step) == 1:
                raise error
            return step(state, micro_batches)

        return fails

    for error in (ValueError("the loss of pairs gave None"), import_path.Failed("mine.py:f failed in line 3: KeyError: 'x'")):
        _, numbers, state = given()
        with pytest.raises(RunFailed, match=f"step 2: {re.escape(str(error))}"):
            loop.run(failing(error), numbers, state)
