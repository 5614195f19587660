"""The loop of a run: steps, evaluations, checkpoints, health, and leaving in good order. It knows no model and no terminal."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from treetune.core import check, ckpt, exchange, heartbeat, import_path, shard
from treetune.core.run import best, faults, health, memory, pauses, progress, recorder, saves
from treetune.core.run import folder as run_folder
from treetune.core.run.errors import RunFailed
from treetune.core.run.observers import Observers
from treetune.core.run.progress import Progress
from treetune.core.run.source import Source
from treetune.core.state import Objective, TrainState
from treetune.core.step import AfterStep, Prepare

RATES = {"tokens_per_second": "num_tokens", "supervised_tokens_per_second": "supervised_tokens"}
Evaluate = Callable[[TrainState], dict[str, torch.Tensor]]
Step = Callable[[TrainState, list[Any]], tuple[TrainState, dict[str, torch.Tensor]]]


class Settings(NamedTuple):
    """How often things happen (by default at up to 10 ends of epochs), how many checkpoints stay (by default all), what ends a run.

    evals_per_epoch, saves_per_epoch: in place of steps. With 0 nothing is evaluated, and saved only where a signal ends the run.
    async_save: checkpoints are written while training goes on.
    """

    eval_steps: int | None = None
    save_steps: int | None = None
    evals_per_epoch: int | None = None
    saves_per_epoch: int | None = None
    save_total_limit: int | None = None
    async_save: bool = False
    early_stopping_patience: int | None = None
    loss_watchdog_threshold: float | None = None
    loss_watchdog_patience: int = 1
    goal: str = "loss"  # the metric of evaluations that finds the best checkpoint: a name that ends in loss falls, any other rises
    perplexity: bool = False  # whether exp(eval/loss) means something


def never() -> None:
    """The stop of a run that nothing asks to end."""


class Hooks(NamedTuple):
    """What a method adds to the loop.

    objective and prepare: of the step, which is replayed to name what is not finite. after_step(state, metrics, step) -> state.
    before(state) runs once, before the first evaluation; export(state) after each checkpoint, on every rank. stop() -> number of the
    signal that asks the run to end after this step, or None. meta: goes into every checkpoint. resumed: meta of the checkpoint that the
    state came from, None for a new run. sampled: whether the step learns from completions. about: what the run is, in words.
    """

    objective: Objective | None = None
    prepare: Prepare | None = None
    after_step: AfterStep | None = None
    stop: Callable[[], int | None] = never
    before: Callable[[TrainState], None] = lambda state: None
    export: Callable[[TrainState], None] = lambda state: None
    meta: dict[str, Any] = {}
    resumed: dict[str, Any] | None = None
    sampled: bool = False
    about: Mapping[str, str] = {}


SETTINGS, HOOKS = Settings(), Hooks()


class Outcome(NamedTuple):
    """How the loop ended: `stopped` says why when it was before the last step; `signum` when a signal asked for it."""

    state: TrainState
    progress: Progress
    stopped: str | None
    signum: int | None
    history: list[recorder.Record]


class _Loop:
    """One pass of the loop; a class because it has a lifetime: a clock, records that are not read yet, what was last saved."""

    def __init__(self, step: Step, source: Source, evaluate: Evaluate | None, tell: Observers, run: run_folder.RunDir | None):
        self.step, self.source, self._evaluate, self.observers, self.run = step, source, evaluate, tell, run
        self.settings, self.hooks, self.progress = Settings(), Hooks(), Progress()
        self.recorder = recorder.Recorder(self._derive)
        self.fired: set[str] = set()
        self.saved: int | None = None
        self.saves: saves.Saves | None = None
        self.over, self.first, self.device = 0, 0, torch.device("cpu")
        self.previous: list[Any] = []

    def _derive(self, record: recorder.Record) -> recorder.Record:
        """Documented names, rates and memory, once the numbers of a step are on the host."""
        seconds, totals = max(record["step_seconds"], 1e-9), {}
        reported = {
            ("train/loss" if key == "loss" else key): value for key, value in recorder.reported(record).items() if key != "num_tokens"
        }
        rates = {rate: record[key] / seconds for rate, key in RATES.items() if key in record}
        if "num_tokens" in record:
            self.progress = self.progress._replace(tokens_seen=self.progress.tokens_seen + int(record["num_tokens"]))
            totals = {"num_tokens": self.progress.tokens_seen}
        return reported | rates | totals | {"memory_gib": memory.peak_gib(self.device)}

    def begin(self, state: TrainState, settings: Settings, hooks: Hooks) -> None:
        """Take over the settings, and what a checkpoint says of the run so far."""
        self.settings, self.hooks, self.device = settings, hooks, state.step.device
        self.evaluations = pauses.Every(settings.eval_steps, settings.evals_per_epoch)
        self.checkpoints = pauses.Every(settings.save_steps, settings.saves_per_epoch)
        if self.run is not None:
            how = {"keep": settings.save_total_limit, "goal": settings.goal, "asynchronous": settings.async_save}
            self.saves = saves.Saves(self.run, self.observers, **how)
        if hooks.resumed is not None and self.run is not None:
            assert self.run.resume is not None
            self.progress = progress.read(hooks.resumed, self.run.resume)
            self.saved = int(state.step)
            if exchange.rank() == 0:
                self._rewind(state)

    def _rewind(self, state: TrainState) -> None:
        """Drop what the run did after the checkpoint, and read the history up to it."""
        assert self.run is not None
        step = int(state.step)
        if any(path.name > f"step_{step:06d}" for path in ckpt.numbered(self.run.checkpoints)):
            self.observers.warn(f"back to step {step}: the later checkpoints and records of {self.run.root} are dropped")
        history, broken = run_folder.rewind(self.run, step)
        self.recorder.history += history
        warning = best.restore(self.run, self.progress, self.settings.goal)
        for text in ([] if warning is None else [warning]) + broken:
            self.observers.warn(text)

    def record(self, record: recorder.Record | None, state: TrainState) -> None:
        """Report a finished step and act on it: stop on numbers that are not finite, dead leaves, or the watchdog."""
        if record is None:
            return
        # On the disk first: a run that stops here has the record of the step that it stopped for.
        self.observers.step(record)
        if record["skipped"] and record.get("loss_scale", 1) <= 1:  # above 1 it is an overflow of float16, which lowers the scale
            text = f"step {record['step']} is not finite, no weight was changed: {self._explain(state)}"
            raise RunFailed(f"{text}; {self._last_checkpoint()}")
        # A hinge at 0, or rewards that are all the same, teach nothing: their leaves have no gradient and are alive.
        if record["step"] == 2 and record["dead_leaves"] and record["train/loss"] != 0 and not self.hooks.sampled:
            self._require_alive(state)
        if record["step"] > self.first + 1:  # its loss is that of weights which a step of this run has changed
            self._settle()
        self.report_health()
        self._watchdog(record)

    def _settle(self) -> None:
        if self.run is not None and exchange.rank() == 0:
            run_folder.settle(self.run)

    def require_finite(self, state: TrainState) -> None:
        """Fail on weights or moments that are not finite, before anything is made of them."""
        updated = {"params": state.params, "opt": state.opt}
        bad = not bool(check.finite(updated))
        # All ranks fail together: one that went on alone would wait for ever in the next collective.
        if shard.any_flag(bad, self.device) if torch.distributed.is_initialized() else bad:
            names = check.not_finite(updated)[:3] or ["leaves of another rank"]
            fix = "lower learning_rate, or lengthen the warm-up"
            raise RunFailed(
                f"the update of step {int(state.step)} is not finite in {', '.join(names)}: {fix}; nothing of it was saved; "
                f"{self._last_checkpoint()}"
            )

    def _require_finite_loss(self, state: TrainState) -> None:
        """Fail where the last update leaves finite weights that compute a loss which is not: no step follows that would show it."""
        if self.hooks.objective is None:
            return
        if text := faults.find_not_finite_loss(self.hooks.objective, state, self._prepared(state)[:1]):
            fix = "lower learning_rate; nothing of it was saved"
            raise RunFailed(f"after the update of step {int(state.step)} {text}: {fix}; {self._last_checkpoint()}")

    def _require_alive(self, state: TrainState) -> None:
        if self.hooks.objective is None:
            return
        if dead := faults.dead_leaves(self.hooks.objective, state, self._prepared(state)):
            raise RunFailed(f"{len(dead)} trainable leaves get no gradient, the first are {', '.join(dead[:3])}")

    def _explain(self, state: TrainState) -> str:
        if self.hooks.objective is None:
            return "the loss or the gradient"
        return faults.find_not_finite(self.hooks.objective, state, self._prepared(state))

    def _prepared(self, state: TrainState) -> list[Any]:
        """The micro-batches of the last step as its gradient saw them."""
        with torch.no_grad():
            return self.previous if self.hooks.prepare is None else list(self.hooks.prepare(state, self.previous))

    def _last_checkpoint(self) -> str:
        self.finish_saves()
        checkpoints = [] if self.run is None else ckpt.steps(self.run.checkpoints)
        return f"the last checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint yet"

    def report_health(self) -> None:
        """Report each health rule the first time it fires."""
        for event in health.events(self.recorder.history, quiet=self.fired):
            self.fired.add(event.rule)
            self.observers.health(event)

    def _watchdog(self, record: recorder.Record) -> None:
        limit = self.settings.loss_watchdog_threshold
        if limit is not None:
            self.over = self.over + 1 if record["train/loss"] > limit else 0
            if self.over >= self.settings.loss_watchdog_patience:
                text = f"train/loss was above {limit} for {self.over} steps, up to step {record['step']}"
                raise RunFailed(f"{text}; {self._last_checkpoint()}")

    def evaluate(self, state: TrainState) -> str | None:
        """Evaluate, keep the best checkpoint, and say why to stop if patience ran out."""
        if self._evaluate is None or self.settings.evals_per_epoch == 0:
            return None
        step, start = int(state.step), time.perf_counter()
        with self.observers.busy("evaluating what is held out"):
            # Read at once: the best checkpoint and early stopping depend on them before the next step.
            with _failing(f"the evaluation at step {step}"):
                values = {key: value.item() for key, value in self._evaluate(state).items()}
        record: recorder.Record = {"step": step} | {f"eval/{key}": value for key, value in recorder.reported(values).items()}
        if self.settings.perplexity:
            # Beyond 709 exp raises OverflowError, which would end the run.
            record["eval/perplexity"] = math.exp(min(record["eval/loss"], 700.0))
        record["eval/seconds"] = time.perf_counter() - start
        self.recorder.note(record)
        self.observers.evaluation(record)
        self.report_health()
        if self._improved(record) and step:
            self.save(state)
        patience = self.settings.early_stopping_patience
        exhausted = patience is not None and self.progress.bad_evals >= patience
        return f"eval/{self.settings.goal} has not improved in {patience} evaluations" if exhausted else None

    def _improved(self, record: recorder.Record) -> bool:
        """Whether an evaluation is the best so far; counts those that are not."""
        goal, previous = self.settings.goal, self.progress.best
        value = record.get(f"eval/{goal}", math.nan)  # a reward of which no completion is known is not a number, and never the best
        better = value == value and (previous is None or (value < previous if goal.endswith("loss") else value > previous))
        new = {"best": value, "best_step": record["step"], "bad_evals": 0} if better else {"bad_evals": self.progress.bad_evals + 1}
        self.progress = self.progress._replace(**new)
        return better

    def save(self, state: TrainState, *, leaving: bool = False) -> None:
        """Save a checkpoint, unless this step has one, after the one before it. leaving: the run is interrupted."""
        step = int(state.step)
        if self.saves is None:
            return
        self.saves.wait()
        if self.saved == step or self.settings.saves_per_epoch == 0 and not leaving:
            return
        meta = self.hooks.meta | progress.stored(self.progress, self.source.state())  # on every rank: rollouts gather the states of all
        self.saves.begin(state, meta, self.progress)
        self.saved = step
        self.hooks.export(state)

    def finish_saves(self) -> None:
        """Return when no checkpoint is being written any more."""
        if self.saves is not None:
            self.saves.finish()

    def steps(self, state: TrainState) -> Outcome:
        """Run to the last step, or to a reason to stop."""
        self.first, total, stopped = int(state.step), self.source.total_steps, None
        clock = time.perf_counter()
        for index in range(self.first + 1, total + 1):
            epoch = self.source.epoch
            heartbeat.beat()
            try:
                micro_batches, metrics = self.source.next(state, index)
            except StopIteration:
                stopped = self._source_ended(state, index - 1)
                break
            with _failing(f"step {index}"):
                state, numbers = self.step(state, micro_batches)
                if self.hooks.after_step is not None:
                    state = self.hooks.after_step(state, numbers, index)
            now = time.perf_counter()
            record = self.recorder.push(index, numbers | metrics | {"epoch": epoch, "step_seconds": now - clock})
            clock = now
            # The record is that of the step before, whose micro-batches `previous` still holds to explain it.
            self.record(record, state)
            self.previous = micro_batches
            if self.saves is not None:
                self.saves.settle()
            ended = self.source.epoch != epoch and pauses.at_end(index, self.progress.paused, total)
            self.progress = self.progress._replace(paused=index if ended else self.progress.paused)
            leaving = self._leaving(index)
            if leaving or index == total or any(self._due(every, index, ended) for every in (self.evaluations, self.checkpoints)):
                stopped, clock = self._pause(state, index, ended, leaving, last=index == total), time.perf_counter()
            if leaving or stopped:
                break
        if self.saves is not None:
            self.saves.wait()
        signum = self.hooks.stop()
        if signum is not None and int(state.step) < total:
            stopped = "interrupted"
        return Outcome(state, self.progress, stopped, signum, self.recorder.history)

    def _source_ended(self, state: TrainState, index: int) -> str:
        """The source has nothing more after step `index`: evaluate and save as after the last step."""
        evaluated = any("eval/seconds" in record and record["step"] == index for record in self.recorder.history[-1:])
        if evaluated:
            self.save(state)
        elif index > self.first:
            self._pause(state, index, True, False, last=True)
        return f"the source ended after step {index}"

    def _leaving(self, step: int) -> bool:
        """Whether any rank was asked to stop, or could not save: all must leave the loop at the same step.

        Several ranks ask each other every 8 steps.
        """
        asked = self.hooks.stop() is not None or self.saves is not None and self.saves.failed
        if not torch.distributed.is_initialized():
            return asked
        # Not at every step: the flag is a collective, and reading it waits for the device.
        return step % 8 == 0 and shard.any_flag(asked, self.device)

    def _pause(self, state: TrainState, index: int, epoch_ended: bool, leaving: bool, *, last: bool) -> str | None:
        """Catch up with the metrics, then evaluate and save as is due; why to stop, if the evaluation says so."""
        record, stopped = self.recorder.flush(), None
        if record is not None and not record["skipped"]:
            # The loss of a step is that of the weights before its update, and shows nothing of what the update made.
            self.require_finite(state)
            if last:
                self._require_finite_loss(state)
            self._settle()
        self.record(record, state)
        if last or self._due(self.evaluations, index, epoch_ended):
            stopped = self.evaluate(state)
        if last or leaving or stopped or self._due(self.checkpoints, index, epoch_ended):
            self.save(state, leaving=leaving)
        return stopped

    def _due(self, every: pauses.Every, index: int, epoch_ended: bool) -> bool:
        return every.due(index, getattr(self.source, "passes", None), epoch_ended=epoch_ended)


@contextlib.contextmanager
def _failing(place: str) -> Iterator[None]:
    """Inside, weights are computed with: what goes wrong in a user's function or in what it gives ends the run."""
    try:
        yield
    except (ValueError, import_path.Failed) as error:
        raise RunFailed(f"{place}: {error}") from error


def run(
    step: Step,
    source: Source,
    state: TrainState,
    *,
    evaluate: Evaluate | None = None,
    observers: Observers | None = None,
    folder: run_folder.RunDir | None = None,
    settings: Settings = SETTINGS,
    hooks: Hooks = HOOKS,
) -> Outcome:
    """Train from `state` to the last step of the source, or to a reason to stop.

    step(state, micro_batches) -> (state, metrics); evaluate(state) -> metrics of what is held out. Without a folder nothing is saved.
    Works in any thread and handles no signals: `hooks.stop` is asked after each step.
    Errors: RunFailed for a run that cannot go on; OSError where a checkpoint cannot be written, after which nothing is lost.
    """
    loop = _Loop(step, source, evaluate, Observers() if observers is None else observers, folder)
    loop.begin(state, settings, hooks)
    loop.observers.start(source.total_steps, int(state.step), hooks.about)
    stopped: str | None = "failed"
    try:
        hooks.before(state)
        if hooks.resumed is None:
            loop.evaluate(state)
        outcome = loop.steps(state)
        stopped = outcome.stopped
        return outcome
    except Exception as error:
        loop.finish_saves()  # an error of the training costs no checkpoint of a step before it
        stopped = f"failed: {error}"
        if isinstance(error, import_path.Failed):  # of a source, such as an advantage
            raise RunFailed(str(error)) from error
        raise
    finally:
        loop.observers.end(stopped, loop.recorder.history)


def restore(run: run_folder.RunDir, state: TrainState, source: Source) -> tuple[TrainState, dict[str, Any] | None]:
    """The state, in the memory of this one, and meta of the checkpoint to resume from, and the source where it stood; else all as it is."""
    if run.resume is None:
        return state, None
    state, meta = ckpt.load(run.resume, state, in_place=True)
    progress.read(meta, run.resume)  # for its checks alone: damage is told before the run begins
    if not check.finite({"params": state.params, "opt": state.opt}):
        raise ValueError(f"{run.resume} holds weights or moments that are not finite: {ckpt.FIX}")
    cursor = getattr(source, "cursor", None)
    source.restore(progress.position(meta, None if cursor is None else len(cursor), run.resume))
    return state, meta
